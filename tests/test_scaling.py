"""A real Ray cluster trains what one process trains, also when a worker is killed, and prepares what one process prepares."""
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import polars as pl
import psutil
import pytest
import torch

from workbench.cluster import cluster
from workbench.data import parts
from workbench.data.datasets import load
from workbench.data.histories import Histories
from workbench.data.synthetic import walks
from workbench.errors import TrainingError
from workbench.training import scaling
from workbench.training.checkpoints import newest_state, state_folders
from workbench.training.fit import fit
from workbench.training.recipes import sasrec
from workbench.training.scaling import fit_on_ray

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(find_spec("ray") is None, reason="needs the extra `scale`")]

PLAIN = sasrec("tiny", length=15, epochs=4, check_every=1, warmup=5, batch_size=15, steps=4, dropout=0.0, packing="on")
DROPPING = replace(PLAIN, dropout=0.2, epochs=8, patience=8)


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return walks(300, 80, plays=(3, 39)).save(tmp_path_factory.mktemp("log")/"histories")


def children():
    return psutil.Process().children(recursive=True)


def of_each(question):
    "Ask every process below this one; those that end meanwhile have no answer."
    answers = {}
    for child in children():
        with suppress(psutil.NoSuchProcess):
            answers[child] = question(child)
    return answers


def wait_until(ready, seconds=600.0):
    "Wait for something; False when it did not come."
    last = time.monotonic() + seconds
    while time.monotonic() < last:
        if found := ready():
            return found
        time.sleep(0.01)
    return False


@pytest.fixture(scope="module", autouse=True)
def two_processors():
    "One cluster for all tests, and nothing of it left afterwards."
    before = set(children())
    with cluster("local", 2):
        yield
    assert wait_until(lambda: not set(children()) - before, 20), f"left behind: {set(children()) - before}"


def weights(run):
    return torch.cat([parameter.detach().flatten() for parameter in run.model.parameters()])


def losses(run):
    return [row["loss"] for row in run.curve]


def in_one_process(log, recipe, folder):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return fit(recipe, Histories.load(log), folder, progress=False)
    finally:
        torch.set_num_threads(threads)


def test_two_workers_train_what_one_process_trains(log, tmp_path):
    two, one = fit_on_ray(PLAIN, log, tmp_path/"two", progress=False), in_one_process(log, PLAIN, tmp_path/"one")
    assert np.allclose(losses(two), losses(one), rtol=1e-5)
    assert np.allclose([row["ndcg@10"] for row in two.curve], [row["ndcg@10"] for row in one.curve], atol=1e-3)
    assert torch.allclose(weights(two), weights(one), atol=1e-3)
    assert [row["step"] for row in two.curve] == [row["step"] for row in one.curve]
    assert not list(tmp_path.rglob("histories*")) and not (tmp_path/"two"/"asked").exists()


@pytest.fixture(scope="module")
def undisturbed(log, tmp_path_factory):
    return fit_on_ray(DROPPING, log, tmp_path_factory.mktemp("undisturbed"), progress=False)


def beside(action):
    "Do something in a thread of its own, and return a function that waits for what came of it."
    found = []
    thread = threading.Thread(target=lambda: found.append(action()), daemon=True)
    thread.start()
    return lambda: (thread.join(600), found[0])[1]


def training_workers():
    return [child for child, line in of_each(psutil.Process.cmdline).items() if "RayTrainWorker" in " ".join(line)]


def kill_one(folder):
    "Kill a worker as soon as something was saved; return after which optimiser step that was."
    wait_until(lambda: len(state_folders(folder/"checkpoints")) > 1)
    training_workers()[-1].kill()
    return int(state_folders(folder/"checkpoints")[-1].name.removeprefix("step-"))


def test_a_worker_killed_in_an_epoch_is_survived_and_the_result_is_the_same(log, tmp_path, undisturbed):
    killed = beside(lambda: kill_one(tmp_path))
    run = fit_on_ray(DROPPING, log, tmp_path, progress=False, every=0.0)
    assert 0 < killed() < undisturbed.curve[-1]["step"]
    assert losses(run) == losses(undisturbed)
    assert torch.equal(weights(run), weights(undisturbed))


def test_a_model_in_parts_ends_as_in_one_process_also_when_a_worker_is_killed(log, tmp_path, monkeypatch):
    def counting(task):
        from workbench.training import parallel
        divide = parallel.shard

        def noted(model, mesh):
            whole = sum(each.numel() for each in model.parameters())
            divide(model, mesh)
            held = sum(each.to_local().numel() for each in model.parameters())
            (Path(task["folder"])/f"held-{parallel.Group().rank}").write_text(str(held/whole))

        parallel.shard = noted
        return worker(task)

    worker = scaling.worker
    monkeypatch.setattr(scaling, "worker", counting)
    one, killed = in_one_process(log, PLAIN, tmp_path/"one"), beside(lambda: kill_one(tmp_path/"parts"))
    sharded = fit_on_ray(PLAIN, log, tmp_path/"parts", progress=False, every=0.0, sharded=True)
    assert 0 < killed() < one.curve[-1]["step"]
    assert np.allclose(losses(sharded), losses(one), rtol=1e-5)
    assert torch.allclose(weights(sharded), weights(one), atol=1e-3)
    held = [float(path.read_text()) for path in (tmp_path/"parts").glob("held-*")]
    assert len(held) == 2 and max(held) < 0.6 and 1 <= sum(held) < 1.1       # rows are not always even
    with pytest.raises(TrainingError, match="sharded was True, now False"):
        fit_on_ray(PLAIN, log, tmp_path/"parts", progress=False)


def test_scores_that_are_not_finite_on_one_worker_are_heard_of_by_all(log, tmp_path, monkeypatch):
    def poisoned(task):
        from workbench.errors import EvaluationError
        from workbench.training import callbacks, parallel
        right = callbacks.own_cases

        def own_cases(model, split):
            if parallel.Group().rank:
                raise EvaluationError("the scores are not finite: of no use")
            return right(model, split)

        callbacks.own_cases = own_cases
        return worker(task)

    worker = scaling.worker
    monkeypatch.setattr(scaling, "worker", poisoned)
    with pytest.raises(TrainingError, match=r"after optimiser step \d+ the scores are not finite: lower learning_rate"):
        fit_on_ray(PLAIN, log, tmp_path, progress=False)


def test_a_worker_that_dies_too_often_is_said_in_a_sentence(log, tmp_path):
    killed = beside(lambda: kill_one(tmp_path))
    with pytest.raises(TrainingError, match=r"the workers failed 1 times, at last with: .*; fit the same recipe"):
        fit_on_ray(DROPPING, log, tmp_path, progress=False, every=0.0, max_failures=0)
    assert newest_state(tmp_path/"checkpoints")[1]["step"] >= killed() > 0


def stop_it(folder):
    "Ask the process that started the training to stop, as soon as something was saved."
    wait_until(lambda: state_folders(folder/"checkpoints"))
    os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_saves_for_all_workers_and_no_random_number_may_be_forgotten(log, tmp_path, undisturbed, monkeypatch):
    beside(lambda: stop_it(tmp_path))
    with pytest.raises(SystemExit) as ended:
        fit_on_ray(DROPPING, log, tmp_path, progress=False, every=0.2)
    assert ended.value.code == 143
    assert 0 < newest_state(tmp_path/"checkpoints")[1]["step"] < undisturbed.curve[-1]["step"]

    def forgetful(task):
        from workbench.training import scaling
        scaling.Saver.set_random = lambda self, states: None
        return worker(task)

    worker = scaling.worker
    monkeypatch.setattr(scaling, "worker", forgetful)
    drawn_anew = fit_on_ray(DROPPING, log, tmp_path, progress=False)
    assert [row["step"] for row in drawn_anew.curve] == [row["step"] for row in undisturbed.curve]
    assert not torch.equal(weights(drawn_anew), weights(undisturbed))


def test_a_loss_that_is_not_finite_on_one_worker_comes_back_as_what_it_is(log, tmp_path, monkeypatch):
    def poisoned(task):
        from workbench.training import parallel
        right = parallel.weight
        parallel.weight = lambda batch, mine, workers: right(batch, mine, workers)*(np.nan if parallel.Group().rank else 1)
        return worker(task)

    worker = scaling.worker
    monkeypatch.setattr(scaling, "worker", poisoned)
    with pytest.raises(TrainingError, match=r"the loss of optimiser step 1 is nan: lower learning_rate"):
        fit_on_ray(PLAIN, log, tmp_path, progress=False)


def test_more_workers_than_processors_are_refused_and_not_waited_for(log, tmp_path):
    with pytest.raises(TrainingError, match="3 workers need 3 processors and the cluster has 2"):
        fit_on_ray(PLAIN, log, tmp_path, workers=3)


def test_a_cluster_of_this_machine_listens_to_it_alone_and_reports_to_nobody():
    sockets = of_each(lambda child: child.net_connections("inet")) | {psutil.Process(): psutil.Process().net_connections("inet")}
    heard = {each.laddr.ip.removeprefix("::ffff:") for found in sockets.values() for each in found if each.status == "LISTEN"}
    assert heard == {"127.0.0.1"}
    names, told = of_each(psutil.Process.name), of_each(psutil.Process.environ)        # others have overwritten theirs
    servers = [child for child, name in names.items() if name in ("gcs_server", "raylet")]
    assert [told[each].get("RAY_USAGE_STATS_ENABLED") for each in servers] == ["0", "0"]
    pages = [line for line in of_each(psutil.Process.cmdline).values() if any(each.endswith("dashboard.py") for each in line)]
    assert all("--disable-frontend" in line for line in pages)


def folder_of(log, folder):
    "Write histories as a log of two Parquet files, in groups of a few hundred rows."
    whole = Histories.load(log)
    users = np.repeat(whole.user_ids, np.diff(whole.offsets))
    table = pl.DataFrame({"user_id": users, "item_id": whole.item_ids[whole.items - 1], "timestamp": 1_600_000_000 + whole.timestamps})
    folder.mkdir()
    for name, part in (("a", table[:4000]), ("b", table[4000:])):
        part.write_parquet(folder/f"{name}.parquet", row_group_size=700)
    return folder


def test_a_worker_killed_while_it_prepares_a_part_is_survived_and_the_result_is_the_same(log, tmp_path, monkeypatch):
    def dies_once(part, **given):
        if part == 1 and not (tmp_path/"died").exists():
            (tmp_path/"died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return clean_part(part, **given)

    clean_part = parts.clean_part
    monkeypatch.setattr(parts, "clean_part", dies_once)
    dataset = folder_of(log, tmp_path/"plays")
    done = parts.prepare_parts(dataset, folder=tmp_path/"histories", parts=3, home=tmp_path)
    assert (tmp_path/"died").exists()
    monkeypatch.undo()
    undisturbed = parts.prepare_parts(dataset, folder=tmp_path/"again", parts=3, home=tmp_path)
    assert done.histories.fingerprint == undisturbed.histories.fingerprint
    assert done.to_dict() == undisturbed.to_dict()


def prepare_step(home, folder, dataset):
    "Run the prepare step of the pipeline alone."
    folder.mkdir()
    shutil.copy(ROOT/"pipelines"/"prepare.ipynb", folder)
    (folder/"small.toml").write_text("[steps.prepare]\n")
    command = [Path(sys.executable).parent/"workbench", "run", str(folder/"small.toml"), "-p", f"dataset={dataset}", "-p", "parts=3"]
    return subprocess.run(command, env=os.environ | {"WORKBENCH_PATHS_HOME": str(home)}, capture_output=True, text=True, timeout=300)


def test_the_pipeline_prepares_a_folder_of_files_in_parts(log, tmp_path):
    dataset = folder_of(log, tmp_path/"plays")
    done = prepare_step(tmp_path/"home", tmp_path/"one", dataset)
    assert done.returncode == 0, done.stderr
    prepared = next((tmp_path/"home").glob("steps/prepare/*/histories"))
    pl.concat([pl.read_parquet(each) for each in sorted(dataset.glob("*"))]).write_parquet(tmp_path/"plays.parquet")
    assert Histories.load(prepared, verify=True).fingerprint == load(tmp_path/"plays.parquet").histories().fingerprint
    with open(dataset/"b.parquet", "r+b") as file:
        file.seek(2000)
        file.write(b"\0"*200)
    failed = prepare_step(tmp_path/"home", tmp_path/"two", dataset)
    assert failed.returncode == 1 and "b.parquet cannot be read" in failed.stderr and "restore it" in failed.stderr
