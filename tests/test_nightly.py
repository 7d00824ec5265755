"""The whole night, small: six real steps from the command line, killed on the way, resumed, served, asked."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranking import post

from workbench.serving.packaging import free_port, is_ready
from workbench.training.checkpoints import newest_state

pytestmark = pytest.mark.slow
WORKBENCH = Path(sys.executable).parent / "workbench"
GUARD = Path(__file__).parent / "guard"         # its sitecustomize.py refuses connections to other machines
SMALL = ["-p", "min_history=150", "-p", "train.epochs=2", "-p", "optimize.minutes=0.7", "-p", "optimize.rounds=2"]


def bench_with_data(home: Path) -> Path:
    "Return a bench's home in which the data set has been fetched."
    subprocess.run([WORKBENCH, "data", "fetch", "movielens-100k"], env=os.environ | {"WORKBENCH_PATHS_HOME": str(home)},
                   check=True, capture_output=True)
    return home


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return bench_with_data(tmp_path_factory.mktemp("night") / "home")


def guarded(home: Path) -> dict[str, str]:
    "An environment in which no Python process can reach another machine, and in which those that try are written down."
    path = os.pathsep.join([str(GUARD), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"WORKBENCH_PATHS_HOME": str(home), "PYTHONPATH": path, "NETWORK_GUARD": str(home.parent / "calls.txt")}


def start(home: Path, *words: str, **streams) -> subprocess.Popen:
    environment = guarded(home)
    return subprocess.Popen([WORKBENCH, *words], env=environment, stdin=subprocess.DEVNULL, text=True, **streams)


def workbench(home: Path, *words: str) -> tuple[int, str, str]:
    "Run a command to its end; return exit code, output and error output."
    process = start(home, *words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, error = process.communicate(timeout=900)
    return process.returncode, out, error


def asked(home: Path, *words: str) -> dict:
    "Run a reading command and return its JSON."
    code, out, error = workbench(home, *words, "--json")
    assert code == 0, error
    return json.loads(out)


def record(home: Path) -> dict:
    "Read the record of the newest run."
    found = sorted((home / "runs").glob("*/run.json"))
    return json.loads(found[-1].read_text()) if found else {"steps": []}


def wait_for(home: Path, step: str, process: subprocess.Popen) -> None:
    "Wait until a step is running, for ten minutes at most."
    ends = time.monotonic() + 600
    while not any(each["name"] == step and each["status"] == "running" for each in record(home)["steps"]):
        assert process.poll() is None and time.monotonic() < ends, "the run ended before its step began"
        time.sleep(0.2)


def versions_of(home: Path) -> list:
    "The versions of the only model there is."
    from workbench.tracking.registry import model_names, versions
    from workbench.tracking.runs import open_store

    store = open_store(home)
    assert model_names(store) == ["ranking-movielens-100k"]
    return versions(store, "ranking-movielens-100k")


@pytest.fixture(scope="module")
def night(home) -> dict:
    "The record of a night whose runner was killed while it was packaging, and that was then resumed."
    process = start(home, "run", "nightly", *SMALL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(home, "package", process)
    time.sleep(4)                                   # into the middle of it
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert asked(home, "status")["runs"][0]["status"] == "killed"
    code, out, error = workbench(home, "resume")
    assert code == 0, error
    return record(home) | {"output": out}


def test_a_killed_night_is_finished_and_nothing_is_done_twice(night):
    assert night["status"] == "succeeded"
    assert {step["name"]: step["attempts"] for step in night["steps"]} == {
        "prepare": 1, "train": 1, "evaluate": 1, "optimize": 1, "package": 2, "report": 1}


def test_a_killed_package_step_leaves_one_version(home, night):
    assert [(version.number, version.champion) for version in versions_of(home)] == [(1, True)]


def test_the_summary_says_what_came_of_it_and_what_to_type_next(night):
    for word in ("item_knn", "sasrec", "onnxruntime", "champion", "bundle", "Next:", "serve"):
        assert word in night["output"], word


def test_the_same_night_again_skips_every_step(home, night):
    code, _, error = workbench(home, "run", "nightly", *SMALL)
    assert code == 0
    assert [line.split()[:3] for line in error.splitlines()] == [
        ["=", step["name"], "unchanged"] for step in night["steps"]]
    again = asked(home, "show")
    report = next(row["where"] for row in again["tables"]["paths"]["rows"] if row["what"] == "report")
    assert again["run"]["run_id"] != night["run_id"] and again["run"]["run_id"] in Path(report).read_text()


def test_a_train_step_that_was_terminated_goes_on_after_the_step_it_had_saved(tmp_path):
    home = bench_with_data(tmp_path / "home")
    for name in ("prepare", "train"):
        shutil.copy(Path(__file__).parents[1] / "pipelines" / f"{name}.ipynb", tmp_path)
    (tmp_path / "short.toml").write_text("[steps.prepare]\n[steps.train]\nneeds = ['prepare']\n")
    process = start(home, "run", str(tmp_path / "short.toml"), "-p", "min_history=150", "-p", "size=tiny", "-p", "train.epochs=12",
                    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(home, "train", process)
    while not list(home.glob("unfinished/train/*/best.ckpt")):
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    [states] = home.glob("unfinished/train/*/checkpoints")
    step = newest_state(states)[1]["step"]
    code, _, error = workbench(home, "resume")
    assert code == 0, error
    train = next(each for each in record(home)["steps"] if each["name"] == "train")
    assert f"goes on after {step:,} of" in (Path(train["folder"]) / "notebook.ipynb").read_text()
    assert not list(home.glob("unfinished/train/*"))


def test_packaging_by_hand_proves_the_bento_and_registers_nothing(home, night, tmp_path):
    notebook = Path(__file__).parents[1] / "pipelines" / "package.ipynb"
    done = subprocess.run([sys.executable, "-m", "papermill", "--kernel", "python3", notebook, tmp_path / "package.ipynb"],
                          env=guarded(home), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    left = json.loads((home / "by-hand" / "package" / "end.json").read_text())["facts"]
    assert left["proof"]["questions"] and left["decision"] == {} and left["run"] == ""
    assert [version.number for version in versions_of(home)] == [1]


def test_show_has_every_part(home, night):
    shown = asked(home, "show", night["run_id"])
    assert shown["run"]["status"] == "succeeded"
    assert {"data", "models", "comparisons", "variants", "paths"} <= set(shown["tables"])


def test_the_report_is_one_page_without_outside_links(night):
    folder = next(step["folder"] for step in night["steps"] if step["name"] == "report")
    page = (Path(folder) / "report.html").read_text()
    assert "movielens-100k" in page and "src=\"http" not in page and "@import" not in page


def test_the_champion_answers_from_the_shell(home, night):
    by_user = asked(home, "recommend", "--user", "1", "-k", "5")
    assert len(by_user["items"]) == 5 and not by_user["degraded"]
    by_history = asked(home, "recommend", "--history", "50,181")
    assert len(by_history["items"]) == 10 and not {"50", "181"} & {item["item_id"] for item in by_history["items"]}
    assert asked(home, "recommend", "--user", "nobody")["degraded"]


def test_promoting_the_champion_again_changes_nothing(home, night):
    assert asked(home, "promote")["reason"] == "it was champion already"


def test_evaluate_finds_what_the_run_found(home, night):
    winner = asked(home, "show")["facts"]["evaluate"]
    again = asked(home, "evaluate")
    assert again["metrics"]["ndcg@10"] == winner["reports"][winner["winner"]]["metrics"]["ndcg@10"]


def test_the_champion_is_served(home, night):
    port = free_port()
    process = start(home, "serve", "--port", str(port), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        ends = time.monotonic() + 90
        while not is_ready(port):
            assert process.poll() is None and time.monotonic() < ends
            time.sleep(0.2)
        status, _, answer = post(port, "/recommend", {"user_id": "1", "k": 5})
        assert status == 200 and answer["items"] == asked(home, "recommend", "--user", "1", "-k", "5")["items"]
    finally:
        process.terminate()
        process.wait(30)


def test_a_night_that_fails_leaves_the_champion_and_a_report(home, night, tmp_path):
    log = tmp_path / "plays.csv"
    log.write_text("who,what\n1,2\n")
    code, out, error = workbench(home, "run", "nightly", "-p", f"dataset={log}")
    assert code == 1 and out == "" and error.splitlines()[-1].startswith("Error: step prepare failed in cell")
    assert "no column user_id, item_id" in error and "Traceback" not in error
    newest = asked(home, "status")["runs"][0]
    assert newest["status"] == "failed" and (Path(newest["folder"]) / "report.html").is_file()
    assert not asked(home, "recommend", "--user", "1")["degraded"]


def test_on_another_log_the_champion_is_asked_again_about_its_cases(home, night):
    other = {"min_history=150": "min_history=140", "train.epochs=2": "train.epochs=1", "optimize.minutes=0.7": "optimize.minutes=0.3"}
    code, _, error = workbench(home, "run", "nightly", *(other.get(word, word) for word in SMALL))
    assert code == 0, error
    decision = asked(home, "show")["facts"]["package"]["decision"]
    assert "version 1, which was asked again about these cases" in decision["reason"]
    assert decision["comparison"]["verdict"] in ("better", "level", "worse")
    assert decision["promoted"] == (decision["comparison"]["verdict"] != "worse")
    assert [version.number for version in versions_of(home) if version.champion] == [2 if decision["promoted"] else 1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_an_interrupted_night_says_so_and_does_not_try_again(home, night, number):
    "The train step may be tried twice; an interrupt is not a failure."
    process = start(home, "run", "nightly", *SMALL, "-p", f"seed={number}", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for(home, "train", process)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "workbench resume goes on from here" in error
    assert [(step["status"], step["attempts"]) for step in record(home)["steps"][:3]] == [
        ("skipped", 0), ("killed", 1), ("waiting", 0)]


def test_nothing_phones_home(home, night, tmp_path):
    "In all of the above no process has looked for another machine; one that does is seen."
    calls = home.parent / "calls.txt"
    assert not calls.exists(), calls.read_text()
    code = "import socket; socket.create_connection(('192.0.2.1', 80), timeout=1)"
    done = subprocess.run([sys.executable, "-c", code], env=guarded(tmp_path / "home"), capture_output=True, text=True)
    assert done.returncode == 1 and "192.0.2.1" in (tmp_path / "calls.txt").read_text()


def test_what_a_night_leaves_is_private(home, night):
    folders = [home, *home.glob("*/"), *home.glob("steps/*/"), *home.glob("steps/*/*/"), *home.glob("runs/*/")]
    assert [str(folder) for folder in folders if folder.stat().st_mode & 0o777 != 0o700] == []
