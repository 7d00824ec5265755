"""Training that was killed, terminated, or left with a damaged checkpoint ends where an undisturbed run ends."""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from workbench.data.histories import Histories, pack
from workbench.data.synthetic import walks
from workbench.errors import TrainingError
from workbench.training import checkpoints
from workbench.training.checkpoints import STATE, load_checkpoint, newest_state, state_folders
from workbench.training.fit import fit, set_up
from workbench.training.recipes import Recipe, sasrec

RECIPE = sasrec("tiny", length=15, epochs=4, check_every=1, warmup=5, batch_size=16, steps=4, packing="off")

SCRIPT = """
import json, resource, sys, torch
torch.set_num_threads(1)
from workbench.data.histories import Histories, pack
from workbench.training.fit import fit, set_up
from workbench.training.recipes import Recipe
log, folder, recipe, every, limit = sys.argv[1:]
if int(limit): resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
print("ready", flush=True)
fit(Recipe(**json.loads(recipe)), Histories.load(log), folder, progress=False, every=float(every))
"""


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return walks(300, 80, plays=(3, 39)).save(tmp_path_factory.mktemp("log")/"histories")


def start(log, folder, recipe=RECIPE, every=0.0, limit=0):
    "Start a training in a process of its own, and wait until it has imported everything."
    arguments = [sys.executable, "-c", SCRIPT, log, folder, json.dumps(recipe.to_dict()), every, limit]
    process = subprocess.Popen([str(each) for each in arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert process.stdout.readline() == "ready\n", process.stderr.read()
    return process


def trained(log, folder, recipe=RECIPE, **changes):
    "Train, or go on, to the end; return the curve and all weights in one row."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run = fit(recipe, Histories.load(log), folder, progress=False, **changes)
    finally:
        torch.set_num_threads(threads)
    return [(row["step"], row["loss"], row.get("ndcg@10")) for row in run.curve], torch.cat(
        [parameter.detach().flatten() for parameter in run.model.parameters()])


@pytest.fixture(scope="module")
def undisturbed(log, tmp_path_factory):
    return trained(log, tmp_path_factory.mktemp("undisturbed"))


def same(found, wanted):
    return found[0] == wanted[0] and torch.equal(found[1], wanted[1])


def wait_for_states(folder, process, count=1):
    "Wait until a training has saved; False when it ended first."
    while process.poll() is None:
        if len(state_folders(folder/"checkpoints")) >= count:
            return True
        time.sleep(0.005)
    return False


def killed_again_and_again(log, folder, recipe, times):
    "Kill a training at random moments after it has saved something new; return how many steps were done each time."
    moments, done = random.Random(0), []
    for _ in range(times):
        process = start(log, folder, recipe)
        wait_for_states(folder, process)
        time.sleep(moments.random()*0.6)
        process.kill()
        process.communicate()
        done += [newest_state(folder/"checkpoints")[1]["step"]] if state_folders(folder/"checkpoints") else [0]
    return done


@pytest.mark.parametrize("change", [{}, {"packing": "on", "loss": "sampled_softmax"}], ids=["padded", "packed and sampled"])
def test_killed_at_any_step_it_ends_with_the_weights_of_an_undisturbed_run(log, tmp_path, change):
    recipe = Recipe(**RECIPE.to_dict() | change)
    done = killed_again_and_again(log, tmp_path/"killed", recipe, times=3)
    assert done == sorted(done) and done[-1] > 0
    assert same(trained(log, tmp_path/"killed", recipe), trained(log, tmp_path/"undisturbed", recipe))
    assert not list((tmp_path/"killed").rglob("*.partial"))


def test_it_would_not_if_the_place_in_the_data_were_forgotten(log, tmp_path, undisturbed, monkeypatch):
    process = start(log, tmp_path)
    assert wait_for_states(tmp_path, process, 2)
    process.kill()
    process.communicate()
    from workbench.data.batches import WindowBatches
    monkeypatch.setattr(WindowBatches, "load_state_dict", lambda self, state: None)
    assert not same(trained(log, tmp_path), undisturbed)


def test_sigterm_saves_the_step_it_is_at_and_exits_with_143(log, tmp_path):
    recipe = Recipe(**RECIPE.to_dict() | {"epochs": 15, "patience": 15})
    process = start(log, tmp_path/"ended", recipe, every=1000)
    while not (tmp_path/"ended"/"best.ckpt").exists() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    step = newest_state(tmp_path/"ended"/"checkpoints")[1]["step"]
    assert f"training was stopped after optimiser step {step}, and that is saved" in errors
    assert same(trained(log, tmp_path/"ended", recipe), trained(log, tmp_path/"undisturbed", recipe))


@pytest.mark.parametrize("moment", ["on_train_epoch_start", "on_train_batch_start", "on_train_epoch_end", "on_train_end"])
def test_a_signal_between_two_epochs_or_at_the_end_is_heard_too(log, tmp_path, undisturbed, moment):
    class Ending(Callback):
        "Stands for a scheduler whose signal comes at this moment, once two epochs are done."

    def end(self, trainer, module, *rest):
        if module.done >= 2*training.batches.n_steps and not sent:
            sent.append(module.done)
            os.kill(os.getpid(), signal.SIGTERM)

    sent, training = [], set_up(RECIPE, Histories.load(log), tmp_path/"unused")
    setattr(Ending, moment, end)
    with pytest.raises(SystemExit) as ended:
        trained(log, tmp_path/"run", every=1000, callbacks=[Ending()])
    assert ended.value.code == 143 and newest_state(tmp_path/"run"/"checkpoints")[1]["step"] == sent[0]
    assert same(trained(log, tmp_path/"run"), undisturbed)


def half_way(log, folder):
    "Leave a training with two states, not finished."
    process = start(log, folder)
    assert wait_for_states(folder, process, 2)
    process.kill()
    process.communicate()
    return state_folders(folder/"checkpoints")


def flip_a_bit(path):
    whole = bytearray(path.read_bytes())
    whole[len(whole)//2] ^= 1
    path.write_bytes(whole)


@pytest.mark.parametrize("damage", [flip_a_bit, lambda path: os.truncate(path, 1000), lambda path: path.unlink()],
                         ids=["a flipped bit", "truncated", "missing"])
def test_a_damaged_newest_checkpoint_is_passed_over(log, tmp_path, undisturbed, capfd, damage):
    states = half_way(log, tmp_path)
    damage(states[-1]/STATE)
    assert newest_state(tmp_path/"checkpoints")[1]["step"] == int(states[0].name.removeprefix("step-"))
    assert f"{states[-1].name} is damaged" in capfd.readouterr().err
    assert same(trained(log, tmp_path), undisturbed)


def test_a_flipped_bit_is_read_without_a_word_where_nothing_verifies(log, tmp_path, monkeypatch):
    states = half_way(log, tmp_path)
    state = states[-1]/STATE
    table = torch.load(state, weights_only=True)["weights"]["items.weight"].numpy().tobytes()
    place = state.read_bytes().index(table[:64])
    content = bytearray(state.read_bytes())
    content[place] ^= 1
    state.write_bytes(content)
    monkeypatch.setattr(checkpoints, "sha256", lambda path: json.loads((path.parent/"facts.json").read_text())["sha256"])
    assert newest_state(tmp_path/"checkpoints")[1]["step"] == int(states[-1].name.removeprefix("step-"))


def test_with_no_whole_checkpoint_left_a_person_decides(log, tmp_path, undisturbed):
    for folder in half_way(log, tmp_path):
        flip_a_bit(folder/STATE)
    with pytest.raises(TrainingError, match=r"none of the 2 checkpoints in .* is whole"):
        trained(log, tmp_path)
    assert same(trained(log, tmp_path, resume=False), undisturbed)


def test_a_full_disk_is_said_and_nothing_that_was_saved_is_lost(log, tmp_path, undisturbed):
    states = half_way(log, tmp_path)
    process = start(log, tmp_path, limit=20_000)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and "make room" in errors
    assert state_folders(tmp_path/"checkpoints") == states and not list((tmp_path/"checkpoints").glob("*.partial"))
    assert same(trained(log, tmp_path), undisturbed)


@pytest.mark.parametrize(("change", "said"), [
    ({"learning_rate": 0.01}, "recipe.learning_rate was 0.001, now 0.01"), ({"seed": 3}, "recipe.seed was 0, now 3")])
def test_another_recipe_is_refused_with_the_difference(log, tmp_path, change, said):
    half_way(log, tmp_path)
    before = {path: path.stat().st_mtime for path in tmp_path.rglob("*")}
    with pytest.raises(TrainingError, match=said):
        trained(log, tmp_path, Recipe(**RECIPE.to_dict() | change))
    assert {path: path.stat().st_mtime for path in tmp_path.rglob("*")} == before


def test_another_log_or_version_is_refused_with_the_difference(log, tmp_path, monkeypatch):
    half_way(log, tmp_path/"run")
    whole = Histories.load(log)
    users = np.repeat(np.arange(whole.n_users), np.diff(whole.offsets))
    other = pack("other", users[:-5], whole.items[:-5] - 1, whole.timestamps[:-5], whole.user_ids, whole.item_ids,
                 exclude_seen=False)
    with pytest.raises(TrainingError, match=f"data was {whole.fingerprint}, now {other.fingerprint}"):
        fit(RECIPE, other, tmp_path/"run", progress=False)
    monkeypatch.setattr("workbench.__version__", "99.0")
    with pytest.raises(TrainingError, match=r"workbench was .*, now 99\.0"):
        trained(log, tmp_path/"run")


def test_a_finished_run_is_not_trained_again(log, tmp_path, undisturbed, monkeypatch):
    trained(log, tmp_path)
    shutil.copy(tmp_path/"best.ckpt", tmp_path/"kept")
    monkeypatch.setattr("workbench.training.fit.make_trainer", None)
    assert same(trained(log, tmp_path), undisturbed)
    (tmp_path/"best.ckpt").unlink()
    trained(log, tmp_path)                                         # the state has the best weights too
    assert torch.equal(load_checkpoint(tmp_path/"best.ckpt")["weights"]["items.weight"],
                       load_checkpoint(tmp_path/"kept")["weights"]["items.weight"])
