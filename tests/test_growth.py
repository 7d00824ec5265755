"""Large logs: memory grows with the numbers of a log, not with its text, and the benchmark of growth runs."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from workbench.data.histories import Histories

ROOT = Path(__file__).resolve().parents[1]
ROWS = 1_000_000
PROGRAM = """
import sys
from workbench.data.interactions import read_interactions, schema
def peak(): return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
schema()
before = peak()
read_interactions(sys.argv[1]).histories().save(sys.argv[2])
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc, which only Linux has")
def test_preparing_holds_numbers_and_not_the_text_of_a_log(tmp_path):
    "The text of this log takes 104 bytes a row as polars holds it; two copies of it would break the limit."
    draw = np.random.default_rng(0)
    pl.DataFrame({"user_id": draw.integers(0, 60_000, ROWS), "item_id": draw.integers(0, 50_000, ROWS),
                  "timestamp": draw.integers(1_600_000_000, 1_700_000_000, ROWS)}).with_columns(
        user_id=pl.format("listener-of-the-house-{}", "user_id"), item_id=pl.format("track-of-the-catalogue-{}", "item_id")
    ).write_csv(tmp_path / "log.csv")
    done = subprocess.run([sys.executable, "-c", PROGRAM, tmp_path / "log.csv", tmp_path / "histories"], capture_output=True,
                          text=True, env={**os.environ, "POLARS_MAX_THREADS": "1", "PYTHONPATH": str(ROOT)}, check=True)
    assert int(done.stdout) / ROWS < 250
    assert Histories.load(tmp_path / "histories", verify=True).n_interactions > 0.99 * ROWS


@pytest.mark.slow
def test_the_benchmark_of_growth_runs(tmp_path):
    "Small, so that it is known to run before somebody gives it an hour."
    target = tmp_path / "growth.ipynb"
    parameters = {"smallest": 2_000, "largest": 20_000, "items": 3_000, "listeners": 50, "threads": 1}
    given = [word for name, value in parameters.items() for word in ("-p", name, str(value))]
    done = subprocess.run([sys.executable, "-m", "papermill", "--no-progress-bar", "--kernel", "python3", *given,
                           ROOT / "pipelines" / "benchmarks" / "growth.ipynb", target],
                          capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-2000:]
    outputs = [output for cell in json.loads(target.read_text())["cells"] for output in cell.get("outputs", [])]
    pages = ["".join(output["data"]["text/markdown"]) for output in outputs if "text/markdown" in output.get("data", {})]
    assert any("| 20,000 |" in page and "peak, prepare [GB]" in page for page in pages)
    assert not any(output["output_type"] == "error" for output in outputs)
