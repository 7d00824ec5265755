"""A search for speed keeps to its budget, hands out nothing that learns worse or is slower, and what it writes can be run."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from logs import write_csv

from workbench.data import synthetic
from workbench.errors import RecipeError, UsageError
from workbench.training import throughput
from workbench.training.comparison import Noise, Setting, learn
from workbench.training.fit import decide, fit, quiet
from workbench.training.recipes import load_recipe, sasrec, save_recipe
from workbench.training.throughput import Search, changed, settle, tune

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parents[1]
QUICK = {"length": 20, "batch_size": 32, "steps": 4, "learning_rate": 5e-3, "warmup": 10}


@pytest.fixture(scope="module")
def walks():
    return synthetic.walks(200, plays=25)


@pytest.fixture
def search(walks):
    with torch.random.fork_rng(), quiet():
        yield Search(Setting(decide(sasrec("tiny", **QUICK), walks.train), 1), walks, 5.0, progress=False)


def always_faster(monkeypatch):
    "Every value wins, so that what is learned decides alone."
    monkeypatch.setattr(throughput, "faster", lambda entrant, base: True)


def test_every_setting_has_a_row_with_a_figure_or_a_reason(walks):
    found = tune(sasrec("tiny", **QUICK), walks, minutes=0.2, progress=False)
    assert set(throughput.TRIED) <= {row["setting"] for row in found.rows}
    for row in found.rows:
        assert row["verdict"] and (row["ratio"] or row["verdict"].startswith(("not tried: ", "failed: "))), row
    told = json.loads(json.dumps(found.to_dict()))
    assert told["recipe"] == found.recipe.to_dict() and told["before"]["batch_size"] == 32
    assert "What was tried" in found._repr_html_() and found.plot().axes


def test_a_batch_that_learns_worse_is_not_kept_however_fast_it_is(search, monkeypatch):
    "A thirty-second of the optimiser steps is too few to learn the walk; the control is the default itself under another name."
    always_faster(monkeypatch)
    settle(search, "batch_size", {"1,024": changed(search.default, batch_size=1024, learning_rate=2e-4)}, 6.0)
    assert search.best == search.default
    assert search.rows[-1]["verdict"].startswith("faster, but learns worse") and search.rows[-1]["difference"] > 0
    settle(search, "batch_size", {"32": changed(search.default, name="again")}, 1.0)
    assert search.best.recipe.name == "again" and search.rows[-1]["verdict"].startswith("kept")


def test_a_setting_that_is_only_shown_is_never_kept(search, monkeypatch):
    always_faster(monkeypatch)
    settle(search, "optimiser", throughput.other_optimiser(search.default, search.histories), 1.0)
    assert search.best == search.default and search.rows[-1]["verdict"].startswith("for comparison")


def test_a_loss_that_is_not_finite_is_a_verdict_and_not_the_end(search, monkeypatch):
    always_faster(monkeypatch)
    search.noise = Noise([[1.0]*4]*3, 5_000)
    monkeypatch.setattr(throughput, "learn", lambda setting, *given: learn(changed(setting, learning_rate=float(10), weight_decay=10.0), *given))
    settle(search, "batch_size", {"64": changed(search.default, batch_size=64)}, 1.0)
    assert search.best == search.default and search.rows[-1]["verdict"].startswith("faster, but ")


def test_what_is_not_faster_at_the_end_is_not_handed_out(search):
    search.seconds = 1.0
    search.best = changed(search.default, batch_size=1)          # some thirty times the optimiser steps
    before, best = throughput.confirm(search)
    assert best is before and search.best == search.default and "the default stays" in search.rows[-1]["verdict"]


def test_a_short_time_is_no_reason_to_skip_the_check(search, monkeypatch):
    "Without time to learn, what changes what is learned is not kept."
    always_faster(monkeypatch)
    search.seconds = 1.0
    settle(search, "batch_size", {"64": changed(search.default, batch_size=64)}, 1.0)
    assert search.best == search.default and "time" in search.rows[-1]["verdict"]


def test_threads_and_random_numbers_are_as_before_also_when_it_fails(walks, monkeypatch):
    state = torch.get_rng_state()
    monkeypatch.setattr(throughput, "go_through", lambda search: [search.default][1])
    with pytest.raises(IndexError):
        tune(sasrec("tiny", **QUICK), walks, minutes=0.1, threads=2, progress=False)
    assert torch.get_num_threads() == 1 and torch.equal(state, torch.get_rng_state())


def test_a_recipe_out_of_a_file_gives_the_same_run(walks, tmp_path):
    recipe = sasrec("tiny", **QUICK, epochs=3)
    again = load_recipe(save_recipe(recipe, tmp_path / "found.json"))
    first, second = (fit(each, walks, progress=False).model for each in (recipe, again))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize(("text", "told"), [
    ('{"droput": 0.1}', "has no field 'droput'"), ('{"dropout": 2}', "dropout is 2"), ('{"dropout": null}', "dropout is None"),
    ("[1]", "holds no recipe"), ("{", "is not valid JSON"), ('{"loss": ["a"], "width": "64"}', "width is '64'"), (b"\xff\xfe", "is not valid JSON")])
def test_a_file_that_is_no_recipe_is_refused_in_a_sentence(tmp_path, text, told):
    path = tmp_path / "found.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RecipeError, match=r"found\.json") as error:
        load_recipe(path)
    assert told in str(error.value) and "\n" not in str(error.value)


def test_compiled_training_learns_the_same(walks):
    "The compiled network, on full rows, gives the losses of the other; without dropout there is nothing to draw."
    settings = [Setting(decide(sasrec("tiny", **QUICK | {"dropout": 0.0, "compile": each}), walks.train), 1) for each in (False, True)]
    with torch.random.fork_rng(), quiet():
        plain, compiled = (learn(each, walks, 20_000, seed=0) for each in settings)
    assert compiled == pytest.approx(plain, rel=1e-3)


def test_nobody_needs_a_negative_time(walks):
    with pytest.raises(UsageError, match="minutes is -1"):
        tune(sasrec("tiny"), walks, minutes=-1)


def workbench(home: Path, *words: str) -> list[str]:
    return [str(Path(sys.executable).parent / "workbench"), *words]


def environment(home: Path) -> dict[str, str]:
    return os.environ | {"WORKBENCH_PATHS_HOME": str(home), "WORKBENCH_TRAINING_THREADS": "1"}


@pytest.fixture
def log(tmp_path) -> Path:
    return write_csv(synthetic.walks(200, plays=25), tmp_path / "plays.csv")


def test_the_command_writes_a_recipe_and_a_run_takes_it(tmp_path, log):
    home, picture, recipe = tmp_path / "home", tmp_path / "tune.png", tmp_path / "tuned.json"
    done = subprocess.run(workbench(home, "tune", "--dataset", str(log), "--size", "tiny", "--minutes", "0.1", "--output", str(recipe),
                                    "--plot", str(picture), "--json"), env=environment(home), cwd=ROOT, timeout=300, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    told = json.loads(done.stdout)
    assert load_recipe(recipe).to_dict() == told["recipe"] and told["path"] == str(recipe)
    assert picture.read_bytes().startswith(b"\x89PNG")
    folder = tmp_path / "pipeline"
    folder.mkdir()
    for name in ("prepare", "train"):
        (folder / f"{name}.ipynb").write_bytes((ROOT / "pipelines" / f"{name}.ipynb").read_bytes())
    (folder / "small.toml").write_text('[steps.prepare]\n[steps.train]\nneeds = ["prepare"]\n')
    words = workbench(home, "run", str(folder / "small.toml"), "-p", f"dataset={log}", "-p", f"train.recipe={recipe}", "-p", "train.epochs=2")
    done = subprocess.run(words, env=environment(home), cwd=ROOT, timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shown = subprocess.run(workbench(home, "show", "--json"), env=environment(home), cwd=ROOT, timeout=100, capture_output=True, text=True)
    used = json.loads(shown.stdout)["facts"]["train"]["recipe"]
    assert used == told["recipe"] | {"epochs": 2, "minutes": 4.0}            # what the step says itself


def test_ctrl_c_ends_the_search_with_130_and_writes_nothing(tmp_path, log):
    home = tmp_path / "home"
    process = subprocess.Popen(workbench(home, "tune", "--dataset", str(log), "--size", "tiny", "--minutes", "5"), env=environment(home), cwd=ROOT,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert process.stderr.readline().startswith("threads")     # the search is on
        time.sleep(0.3)
        os.killpg(process.pid, signal.SIGINT)
        out, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, out) == (130, "") and error.splitlines()[-1] == "Error: interrupted"
    assert not list(home.glob("recipes/*"))


@pytest.mark.gpu
def test_on_a_gpu_threads_are_left_alone_and_bfloat16_is_tried(walks):
    found = tune(sasrec("tiny", **QUICK), walks, minutes=0.5, progress=False)
    verdicts = {row["setting"]: row["verdict"] for row in found.rows}
    assert verdicts["threads"] == "not tried: the GPU computes" and not verdicts["precision"].startswith("not tried: this")
