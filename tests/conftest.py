"""What every test shares: where the data sets are, and a home of its own for what a test writes."""
import os
import signal
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MIRROR = ROOT.parent / "shared" / "data"

if MIRROR.is_dir():
    os.environ.setdefault("WORKBENCH_DATA_MIRROR", str(MIRROR))
os.environ.setdefault("WORKBENCH_PATHS_HOME", ".workbench/test")
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:           # what a shell starts in the background ignores Ctrl-C,
    signal.signal(signal.SIGINT, signal.default_int_handler)    # and so would everything that a test starts and interrupts


@pytest.fixture
def mirror() -> Path:
    "The folder with copies of data sets; a test that needs it skips, saying so, where there is none."
    folder = Path(os.environ.get("WORKBENCH_DATA_MIRROR", ""))
    if not folder.is_dir() or not folder.name:
        pytest.skip("needs the data sets of WORKBENCH_DATA_MIRROR, which names no folder here")
    return folder


@pytest.fixture(scope="module")
def one_thread():
    "Models this small are slower on two threads than on one, much slower when the cores are busy."
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


FIRST = ("test_scaling.py", "test_pipeline.py", "test_nightly.py")    # few tests that take minutes: last, they would keep one process waiting


def pytest_collection_modifyitems(items):
    "Begin with the longest files, and skip what is marked `gpu` where there is no NVIDIA GPU, with the reason."
    many = Counter(item.path for item in items)
    items.sort(key=lambda item: (FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST), -many[item.path], str(item.path)))
    if not any("gpu" in item.keywords for item in items):
        return
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU: torch.cuda.is_available() is False"))
