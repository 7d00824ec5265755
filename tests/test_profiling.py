"""A profile adds up, counts what is computed, keeps to its bounds and is the same for people, programs and the eye."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from logs import write_csv

from workbench.data.histories import pack
from workbench.training import profiling
from workbench.training.bottlenecks import PARTS, with_gradients
from workbench.training.profiling import profile
from workbench.training.recipes import sasrec

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parents[1]
QUICK = {"length": 20, "batch_size": 32, "steps": 4}


def plays(items: int, users: int = 200, each: int = 25) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    "User, item and time of listeners who play at random."
    tracks = np.random.default_rng(0).integers(0, items, users*each)
    return np.repeat(np.arange(users), each), tracks, np.tile(np.arange(each), users)


def histories(items: int = 60, **shape: int):
    users, tracks, times = plays(items, **shape)
    return pack("plays", users, tracks, times, np.arange(users.max() + 1).astype(str), np.arange(items).astype(str))


def test_parts_add_up_and_each_has_its_figures():
    found = profile(sasrec("tiny", **QUICK), histories(), seconds=2)
    assert [row["part"] for row in found.parts] == list(PARTS) and all(row["seconds"] > 0 for row in found.parts)
    assert sum(map(found.share, PARTS)) == pytest.approx(1)
    assert found.facts["positions"] == 32*20 and found.facts["targets"] == round(640*(1 - found.facts["padding"]))
    roofline = found.roofline
    assert min(*roofline.peak.values(), *roofline.bandwidth.values(), roofline.dispatch) > 0
    assert found.advice and all(any(sign.isdigit() for sign in each.text) for each in found.advice)
    assert json.loads(json.dumps(found.to_dict()))["step"]["flops"] == found.total("flops") > 0


def test_twice_the_batch_is_twice_the_work_and_ten_times_the_catalogue_is_more_of_the_loss():
    def of(items, **changes):
        return profile(sasrec("tiny", **QUICK | {"loss": "cross_entropy"} | changes), histories(items, each=22), seconds=2)

    single, double, wide = of(600), of(600, batch_size=64), of(6000)
    assert double.total("flops") == pytest.approx(2*single.total("flops"), rel=0.05)
    assert with_gradients(wide, "loss") > with_gradients(single, "loss")
    row = 4*(6000 - 600)                                      # bytes of logits; there are never more than 128 rows of them
    assert 128*row < wide.facts["peak_memory"] - single.facts["peak_memory"] < wide.facts["targets"]*row


def test_windows_that_are_mostly_empty_are_told_to_be_packed():
    users, tracks, times = plays(60)
    short = users % 10 != 0                     # nine of ten listeners keep four plays of twenty-five
    kept = ~short | (times < 4)
    log = pack("short", users[kept], tracks[kept], times[kept], np.arange(200).astype(str), np.arange(60).astype(str))
    found = profile(sasrec("tiny", packing="off", **QUICK), log, seconds=1)
    assert found.facts["padding"] > 0.3 and "padding" in {each.about for each in found.advice}


def test_a_slow_step_is_measured_in_few_calls(monkeypatch):
    "Where twelve calls of eight steps do not fit into the time, a call holds fewer steps; two are enough."
    calls = []
    observed = profiling.train_observed

    def slow(recipe, log, clock, over, *tools):
        found = observed(recipe, log, clock, over, *tools)
        calls.append((recipe.steps, len(clock.laps)))
        for lap in clock.laps[:2]:
            lap["seconds"] += 100
        return found

    monkeypatch.setattr(profiling, "train_observed", slow)
    monkeypatch.setattr(profiling, "measure_roofline", lambda device, seconds: ROOFLINE)
    ROOFLINE = profiling.Roofline("cpu", 1, {"float32": 100.0, "bfloat16": 100.0}, {2**20: 10.0, 2**29: 10.0}, 1.0)
    found = profile(sasrec("tiny", **QUICK | {"steps": 8}), histories(), seconds=1)
    assert calls[0] == (1, 4) and calls[1][0] == 1 and calls[1][1] >= 2 and found.facts["steps"] == 1


def test_a_profile_leaves_the_random_numbers_and_the_disk_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = torch.random.get_rng_state()
    profile(sasrec("tiny", **QUICK), histories(), seconds=1)
    assert torch.equal(before, torch.random.get_rng_state()) and not list(tmp_path.iterdir())


def workbench(home: Path, *words: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"WORKBENCH_PATHS_HOME": str(home), "WORKBENCH_TRAINING_THREADS": "1"}
    return subprocess.run([Path(sys.executable).parent / "workbench", *words], env=environment, cwd=ROOT, timeout=300,
                          capture_output=True, text=True, stdin=subprocess.DEVNULL)


@pytest.fixture
def log(tmp_path) -> Path:
    return write_csv(histories(), tmp_path / "plays.csv")


def test_the_command_profiles_a_log_for_programs_and_draws_it(tmp_path, log):
    picture = tmp_path / "page" / "profile.png"
    done = workbench(tmp_path / "home", "profile", "--dataset", str(log), "--size", "tiny", "--seconds", "2",
                     "--output", str(picture), "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert sum(row["share"] for row in told["parts"]) == pytest.approx(1) and told["recipe"]["name"] == "sasrec-tiny"
    assert picture.read_bytes().startswith(b"\x89PNG") and done.stderr == ""


def test_without_a_data_set_the_command_takes_what_the_newest_run_prepared(tmp_path, log):
    home, folder = tmp_path / "home", tmp_path / "pipeline"
    folder.mkdir()
    shutil.copy(ROOT / "pipelines" / "prepare.ipynb", folder)
    (folder / "small.toml").write_text("[steps.prepare]\n")
    made = workbench(home, "run", str(folder / "small.toml"), "-p", f"dataset={log}")
    assert made.returncode == 0, made.stderr
    done = workbench(home, "profile", "--size", "tiny", "--seconds", "2")
    assert done.returncode == 0 and "sasrec-tiny on plays" in done.stdout and "What to change first" in done.stdout


@pytest.mark.gpu
def test_on_a_gpu_kernels_and_the_allocator_are_seen(tmp_path):
    found = profile(sasrec("tiny", **QUICK), histories(), seconds=5, folder=tmp_path)
    assert found.facts["busy"] > 0 and found.facts["peak_memory"] > 0 and found.roofline.device != "cpu"
    assert (tmp_path / "memory.pickle").stat().st_size > 0
