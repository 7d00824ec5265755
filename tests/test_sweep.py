"""A sweep ends what is hopeless, goes on where it was killed, refuses to mix two searches, and what it finds can be trained again."""
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from logs import write_csv

from workbench.data import synthetic
from workbench.errors import Interrupted, RecipeError, TrainingError, UsageError, WorkbenchError
from workbench.files import hold_lock
from workbench.training import sweep as sweeping
from workbench.training.fit import fit
from workbench.training.recipes import load_recipe, sasrec, save_recipe
from workbench.training.sweep import Choices, Range, parse_space, sweep

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parents[1]
QUICK = {"length": 20, "batch_size": 64, "learning_rate": 5e-3, "warmup": 10, "epochs": 8, "check_every": 1}
RATES = {"learning_rate": Choices((1e-6, 2e-3, 5e-3)), "dropout": Range(0.0, 0.5)}


@pytest.fixture(scope="module")
def walks():
    return synthetic.walks(200, plays=25)


def study_in(folder: Path) -> optuna.Study:
    return optuna.load_study(study_name="sweep", storage=f"sqlite:///{folder}/study.db")


def test_a_hopeless_trial_is_ended_early_and_is_never_the_best(walks, tmp_path):
    recipe = sasrec("tiny", **QUICK)
    sweep(recipe, walks, tmp_path, RATES, trials=1, progress=False)
    for rate in (5e-3, 5e-3, 5e-3, 5e-3, 1e-6, 5e-3):
        study_in(tmp_path).enqueue_trial({"learning_rate": rate, "dropout": 0.2})
    found = sweep(recipe, walks, tmp_path, RATES, trials=7, progress=False)
    states = {each["trial"]: each["state"] for each in found.trials}
    assert [states[each] for each in range(5)] == ["complete"]*5         # too early to compare
    hopeless = found.trials[5]
    assert hopeless["parameters"]["learning_rate"] == 1e-6 and hopeless["state"] == "pruned"
    assert max(map(int, hopeless["curve"])) < recipe.epochs
    assert found.best["state"] == "complete" and found.recipe.learning_rate == 5e-3


def test_the_recipe_that_was_found_gives_the_run_of_the_best_trial(walks, tmp_path):
    found = sweep(sasrec("tiny", **QUICK | {"epochs": 3}), walks, tmp_path, RATES, trials=3, progress=False)
    again = fit(load_recipe(found.save(tmp_path / "best.json")), walks, progress=False)
    assert again.metrics["ndcg@10"] == found.best["ndcg@10"]
    assert found.trials[0]["parameters"] == {"learning_rate": 5e-3, "dropout": 0.2}      # the recipe as it is


def test_the_same_sweep_proposes_the_same_and_another_sitting_goes_on_with_it(walks, tmp_path):
    recipe = sasrec("tiny", **QUICK | {"epochs": 2})
    whole = sweep(recipe, walks, tmp_path / "whole", RATES, trials=8, progress=False)
    for trials in (3, 8):
        parts = sweep(recipe, walks, tmp_path / "parts", RATES, trials=trials, progress=False)
    assert [each["parameters"] for each in parts.trials] == [each["parameters"] for each in whole.trials]
    assert [each["ndcg@10"] for each in parts.trials] == [each["ndcg@10"] for each in whole.trials]
    assert json.loads(json.dumps(parts.to_dict()))["best"]["trial"] == whole.best["trial"]
    assert parts.plot().axes and "Sweep sweep" in parts._repr_html_() and sum(parts.importance.values()) == pytest.approx(1)


def test_a_stopped_trial_is_taken_up_where_it_was(walks, tmp_path, monkeypatch):
    "The trial is stopped in the middle of its training; the second call ends with the value of an undisturbed one."
    recipe, train = sasrec("tiny", **QUICK), sweeping.Report.on_train_epoch_end

    def stop(report, trainer, module):
        train(report, trainer, module)
        if report.curve.rows[-1]["epoch"] == 4:
            next(each for each in trainer.callbacks if hasattr(each, "asked")).asked = module.stopping = signal.SIGINT

    monkeypatch.setattr(sweeping.Report, "on_train_epoch_end", stop)
    with pytest.raises(Interrupted, match="was stopped in trial 0, and that is saved"):
        sweep(recipe, walks, tmp_path / "a", RATES, trials=1, progress=False)
    monkeypatch.setattr(sweeping.Report, "on_train_epoch_end", train)
    found = sweep(recipe, walks, tmp_path / "a", RATES, trials=1, progress=False)
    assert [(each["state"], each["reason"]) for each in found.trials] == [("failed", "its process was killed"), ("complete", "")]
    assert found.trials[1]["parameters"] == found.trials[0]["parameters"] and not (tmp_path / "a" / "trial-0001").exists()
    undisturbed = sweep(recipe, walks, tmp_path / "b", RATES, trials=1, progress=False)
    assert found.trials[1]["curve"] == undisturbed.trials[0]["curve"]


@pytest.mark.parametrize(("change", "told"), [
    (lambda given: given | {"histories": synthetic.walks(200, plays=25, seed=1)}, "data was"),
    (lambda given: given | {"recipe": replace(given["recipe"], length=10)}, "recipe.length was 20, now 10"),
    (lambda given: given | {"space": {"dropout": Range(0.0, 0.4)}}, "space.dropout was 0.0..0.5, now 0.0..0.4")])
def test_another_search_under_the_same_name_is_refused_with_the_difference(walks, tmp_path, change, told):
    given = {"recipe": sasrec("tiny", **QUICK | {"epochs": 1}), "histories": walks, "space": {"dropout": Range(0.0, 0.5)}}
    sweep(**given, folder=tmp_path, trials=1, progress=False)
    with pytest.raises(UsageError, match="choose another name") as error:
        sweep(**change(given), folder=tmp_path, trials=1, progress=False)
    assert told in str(error.value)
    assert len(sweep(**given, folder=tmp_path, trials=1, progress=False).trials) == 1        # nothing is lost


@pytest.mark.parametrize(("space", "told"), [
    ("droput=0.1", "has no field 'droput'"), ("dropout=", "is no space"), ("dropout=0.5..0.1", "empty or repeat"),
    ("dropout=0.1..0.1", "empty or repeat"), ("learning_rate=0..1:log", "begin above 0"), ("dropout=nan", "dropout is nan"),
    ("width=8.5", "'8.5' is not a valid int"), ("epochs=1..0", "empty or repeat"), ("seed=0,1", "is not to be searched")])
def test_a_space_that_cannot_be_searched_is_refused_before_anything_is_written(walks, tmp_path, space, told):
    with pytest.raises(WorkbenchError) as error:
        sweep(sasrec("tiny"), walks, tmp_path / "none", parse_space([space]), trials=1)
    assert told in str(error.value) and isinstance(error.value, UsageError | RecipeError)
    assert "\n" not in str(error.value) and not (tmp_path / "none").exists()


def test_when_every_trial_fails_the_reason_is_told(walks, tmp_path):
    recipe = sasrec("tiny", **QUICK | {"epochs": 20, "weight_decay": 10.0, "schedule": "constant", "warmup": 0})
    found = sweep(recipe, walks, tmp_path, {"learning_rate": Choices((9.0, 10.0))}, trials=2, progress=False)
    assert [each["state"] for each in found.trials] == ["failed"]*2
    with pytest.raises(TrainingError, match=r"no trial of sweep sweep was completed: (the loss of|after) optimiser step \d+ .*: lower learning_rate"):
        _ = found.best


def test_a_second_process_is_kept_out(walks, tmp_path):
    with hold_lock(tmp_path / "sweep.lock", "a test"), pytest.raises(WorkbenchError, match="sweep sweep is in use by process"):
        sweep(sasrec("tiny", **QUICK), walks, tmp_path, RATES, trials=1, progress=False)


def words(*given: str) -> list[str]:
    return [str(Path(sys.executable).parent / "workbench"), "sweep", *given]


def test_a_sweep_killed_with_9_goes_on_and_every_trial_is_a_run_below_it(tmp_path):
    home, recipe, log = tmp_path / "home", tmp_path / "start.json", write_csv(synthetic.walks(200, plays=25), tmp_path / "plays.csv")
    save_recipe(sasrec("tiny", **QUICK | {"epochs": 60, "patience": 1000, "packing": "off"}), recipe)
    environment = os.environ | {"WORKBENCH_PATHS_HOME": str(home), "WORKBENCH_TRAINING_THREADS": "1"}
    given = words("--dataset", str(log), "--recipe", str(recipe), "--space", "dropout=0.0,0.1,0.2", "--name", "night", "--trials", "2")
    process = subprocess.Popen(given, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                               start_new_session=True)
    try:
        lines = iter(process.stderr.readline, "")
        assert any(line.startswith("trial 0: NDCG@10") for line in lines)
        time.sleep(0.5)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    done = subprocess.run([*given, "--json", "--output", str(tmp_path / "found.json")], env=environment, cwd=ROOT, capture_output=True,
                          text=True, timeout=300)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    told = json.loads(done.stdout)
    assert [each["state"] for each in told["trials"]] == ["complete", "failed", "complete"]
    assert told["trials"][1]["reason"] == "its process was killed"
    assert load_recipe(tmp_path / "found.json").to_dict() == told["best"]["recipe"]

    from workbench.tracking.runs import open_store
    store = open_store(home)
    runs = store.client.search_runs([store.experiment("plays")])
    parents = {run.info.run_id for run in runs if run.info.run_name == "sweep night"}
    below = [run for run in runs if run.data.tags.get("mlflow.parentRunId") in parents]
    assert len(parents) == 2 and sorted(run.info.run_name for run in below) == ["night trial 0", "night trial 1", "night trial 2"]
    assert sorted(run.info.status for run in runs) == ["FINISHED", "FINISHED", "FINISHED", "KILLED", "KILLED"]
    assert all(run.data.metrics["best_ndcg_at_10"] > 0 for run in below if run.info.status == "FINISHED")
    assert all(float(run.data.params["dropout"]) in (0.0, 0.1, 0.2) for run in below)
