"""What the tracking store promises under faults: opened by many at once, honest about the dead, one champion at a time."""
import subprocess
import sys
import time
from pathlib import Path

import pytest

from workbench.errors import PromotionError
from workbench.files import write_atomic
from workbench.tracking.promotion import promote
from workbench.tracking.registry import champion, register, version
from workbench.tracking.runs import open_store, start_run

NAME = "ranking-demo"

# Every process imports what it needs, says that it is ready, and waits for the word: the six really start together.
HEAD = """
import logging, sys, time
from contextlib import nullcontext
from pathlib import Path
from workbench.tracking import runs
from workbench.tracking.promotion import promote
runs.quiet_mlflow()
import mlflow.store.model_registry.sqlalchemy_store, mlflow.store.tracking.sqlalchemy_store
home, number = Path(sys.argv[1]), sys.argv[2]
def together():
    (home/f"ready-{number}").touch()
    while not (home/"go").exists(): time.sleep(0.002)
"""
OPEN = """
together()
store = runs.open_store(home)
with runs.start_run(store, f"run {number}") as run: run.log_metrics({"loss": float(number)})
"""
UNLOCKED = "runs.hold_lock = lambda *args, **kwargs: nullcontext()\n" + OPEN
PROMOTE = """
store = runs.open_store(home)
together()
decision = promote(store, "ranking-demo", int(number), expected=1)
print(decision.promoted, decision.reason)
"""


def start_together(home: Path, code: str, numbers: range) -> list[tuple[int, str, str]]:
    "Run `code` in one process a number, released at the same moment; return exit codes, output and errors."
    home.mkdir(exist_ok=True)
    (home / "go").unlink(missing_ok=True)
    processes = [subprocess.Popen([sys.executable, "-c", HEAD + code, str(home), str(n)], stdout=subprocess.PIPE,
                                  stderr=subprocess.PIPE, text=True) for n in numbers]
    deadline = time.monotonic() + 240
    try:
        while any(p.poll() is None and not (home / f"ready-{n}").exists() for p, n in zip(processes, numbers, strict=True)):
            assert time.monotonic() < deadline, "the processes did not get ready"
            time.sleep(0.01)
        (home / "go").touch()
        found = [(p, *p.communicate(timeout=240)) for p in processes]
        return [(p.returncode, out, err) for p, out, err in found]
    finally:
        for process in processes:
            process.kill()


def registered(store, folder: Path, value: float):
    "Register a version with this NDCG@10."
    write_atomic(folder / "bundle" / "manifest.json", "{}")
    with start_run(store, "night") as run:
        return register(store, NAME, run, folder / "bundle", {"ndcg@10": value}, {"data_fingerprint": "abc"})


@pytest.mark.slow
def test_six_processes_open_a_fresh_store_together(tmp_path):
    done = start_together(tmp_path / "home", OPEN, range(6))
    assert [(code, err) for code, _, err in done if code] == []
    store = open_store(tmp_path / "home")
    runs = store.client.search_runs([store.experiment("workbench")])
    assert sorted(run.info.run_name for run in runs) == [f"run {n}" for n in range(6)]
    assert {run.info.status for run in runs} == {"FINISHED"}


@pytest.mark.slow
def test_without_the_lock_the_six_fail(tmp_path):
    "The negative control: the same six with the lock taken out. A race is not lost every time, so it has three chances."
    for attempt in range(3):
        done = start_together(tmp_path / f"home-{attempt}", UNLOCKED, range(6))
        if any(code for code, _, _ in done):
            assert any("already exists" in err or "locked" in err for _, _, err in done), done
            return
    pytest.fail("six processes opened three fresh stores without the lock: is it needed any longer?")


@pytest.mark.slow
def test_a_killed_run_is_reconciled_and_a_living_one_left_alone(tmp_path):
    code = HEAD + f"""
with runs.start_run(runs.open_store({str(tmp_path)!r}), "killed") as run:
    print(run.run_id, flush=True)
    time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", code, ".", "0"], stdout=subprocess.PIPE, text=True)
    try:
        run_id = process.stdout.readline().strip()
        assert open_store(tmp_path).killed == ()
    finally:
        process.kill()
        process.communicate()
    store = open_store(tmp_path)
    assert store.killed == (run_id,)
    assert store.client.get_run(run_id).info.status == "KILLED"
    assert open_store(tmp_path).killed == ()


def test_a_metric_that_is_not_finite_is_never_the_best(tmp_path):
    store = open_store(tmp_path)
    for value in (0.1, float("nan"), float("inf")):
        with start_run(store, f"{value}") as run:
            run.log_metrics({"ndcg@10": value})
    best = store.client.search_runs([store.experiment("workbench")], order_by=["metrics.ndcg_at_10 DESC"])[0]
    assert best.data.metrics == {"ndcg_at_10": 0.1}


def test_mlflow_by_itself_lets_infinity_win(tmp_path):
    "The negative control of the test above: the guard is ours, and still needed."
    store = open_store(tmp_path)
    for value in (0.1, float("inf")):
        with start_run(store, f"{value}") as run:
            store.client.log_metric(run.run_id, "ndcg_at_10", value)
    best = store.client.search_runs([store.experiment("workbench")], order_by=["metrics.ndcg_at_10 DESC"])[0]
    assert best.info.run_name == "inf"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_model_without_a_finite_metric_never_becomes_champion(tmp_path, value):
    store = open_store(tmp_path / "home")
    registered(store, tmp_path, value)
    assert not promote(store, NAME, force=True).promoted
    registered(store, tmp_path, 0.1)
    assert promote(store, NAME).promoted
    assert not promote(store, NAME, 1, force=True).promoted
    assert champion(store, NAME).number == 2


def test_a_changed_bundle_is_not_promoted(tmp_path):
    store = open_store(tmp_path / "home")
    found = registered(store, tmp_path, 0.1)
    write_atomic(found.folder / "manifest.json", "{'evil': 1}")
    decision = promote(store, NAME, force=True)
    assert not decision.promoted and "manifest.json was changed" in decision.reason


@pytest.mark.slow
def test_of_two_promotions_at_once_one_wins_and_the_other_is_told(tmp_path):
    store = open_store(tmp_path / "home")
    for value in (0.1, 0.2, 0.3):
        registered(store, tmp_path, value)
    promote(store, NAME, 1)
    done = start_together(tmp_path / "home", PROMOTE, range(2, 4))
    assert [code for code, _, _ in done] == [0, 0], done
    told = [out for _, out, _ in done if out.startswith("False")]
    assert len(told) == 1
    assert champion(store, NAME).number in (2, 3)
    if champion(store, NAME).number == 2 or "changed" in told[0]:
        assert "the champion changed from version 1 to version" in told[0]
    else:
        assert "0.2000 against 0.3000" in told[0]


def test_what_was_registered_is_there_for_the_next_process(tmp_path):
    found = registered(open_store(tmp_path / "home"), tmp_path, 0.1)
    again = version(open_store(tmp_path / "home"), NAME, found.number)
    assert again == found and again.changes() == []


def test_promoting_what_was_never_registered_says_what_to_do(tmp_path):
    with pytest.raises(PromotionError, match="has no versions: run the pipeline first"):
        promote(open_store(tmp_path), NAME)
