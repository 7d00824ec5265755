"""The peers are trained on our histories, counted as the page says, and ranked by our protocol."""
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from workbench.data.histories import Histories, pack
from workbench.evaluation.protocol import Ranking, evaluate_ranking

ROOT = Path(__file__).resolve().parents[1]
PYTHON, SCRIPT = ROOT / ".peers/bin/python", ROOT / "pipelines/benchmarks/peers/run_peer.py"
PEERS = [("rectools", "sasrec", {}), ("rectools", "sasrec", {"loss": "gBCE", "negatives": 16}), ("rectools", "esasrec", {"negatives": 16}),
         ("rectools", "hstu", {}), ("recbole", "sasrec", {})]
SMALL = {"width": 32, "blocks": 2, "heads": 1, "length": 8, "learning_rate": 5e-3, "batch_size": 16, "warmup": 2}

needs_peers = pytest.mark.skipif(not (ROOT / ".peers/.ready").exists(), reason="the peers are not installed: run make peers")


@pytest.fixture(scope="module")
def walks(tmp_path_factory) -> Path:
    "Listeners who walk through sixty items one step at a time: what comes next is certain, and nothing repeats."
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 15, 400)
    users, steps = np.repeat(np.arange(400), lengths), np.concatenate([np.arange(n) for n in lengths])
    tracks = (np.repeat(rng.integers(0, 60, 400), lengths) + steps) % 60
    log = pack("walks", users, tracks, 3600*steps, np.arange(400).astype(str), np.arange(60).astype(str))
    return log.save(tmp_path_factory.mktemp("walks") / "histories")


def run(data: Path, output: Path, **spec) -> list[dict]:
    "Run a spec and return its events."
    text = json.dumps({"data": str(data), "output": str(output), **SMALL, **spec})
    done = subprocess.run([PYTHON, SCRIPT, "-"], input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@needs_peers
@pytest.mark.slow
@pytest.mark.parametrize("peer,model,more", PEERS, ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value)))
def test_a_peer_learns_our_split_and_is_ranked_by_our_protocol(walks, tmp_path, peer, model, more):
    events = run(walks, tmp_path, peer=peer, model=model, epochs=8, check_every=8, rank=["validation", "test"], **more)
    assert [each["event"] for each in events] == ["setup", *["epoch"]*8, "check", "end"]
    log, check = Histories.load(walks), events[-2]
    for part in ("validation", "test"):
        ranks, top = (np.load(check["files"][part][name]) for name in ("ranks", "top"))
        split = getattr(log, part)
        report = evaluate_ranking(Ranking(ranks, top, 0.0), split, log.train, model)
        assert report["ndcg@10"] == pytest.approx(check["ndcg@10"][part]) and report["ndcg@10"] > 0.8
        assert not (split.seen(np.arange(len(split)))[:, :, None] == top[:, None, :]).any()    # seen items are left out


@needs_peers
@pytest.mark.slow
@pytest.mark.parametrize("peer", ["rectools", "recbole"])
def test_targets_are_counted_without_padding_and_an_untrained_peer_is_no_better_than_chance(walks, tmp_path, peer):
    lengths = np.diff(Histories.load(walks).offsets)
    train = np.where(lengths >= 3, lengths - 2, lengths)
    targets = {"rectools": np.minimum(train, SMALL["length"] + 1) - 1, "recbole": train - 1}[peer].sum()
    setup, epoch, check, end = run(walks, tmp_path, peer=peer, epochs=1, rank=["test"], learning_rate=1e-8)
    assert setup["targets_per_epoch"] == epoch["targets"] == end["targets"] == targets and epoch["complete"]
    assert setup["items_known"] == 60 and check["ndcg@10"]["test"] < 0.3
    assert epoch["cpu_seconds"] > 0 and end["targets_per_second"] == epoch["targets_per_second"] > targets/epoch["seconds"]/2
    assert end["peak_memory_bytes"] > 50e6


@needs_peers
@pytest.mark.slow
@pytest.mark.parametrize("peer", ["rectools", "recbole"])
def test_sigterm_ends_a_peer_with_its_last_word(walks, tmp_path, peer):
    spec = json.dumps({"peer": peer, "data": str(walks), "output": str(tmp_path), "epochs": 10**6, **SMALL})
    (tmp_path / "spec.json").write_text(spec)
    with subprocess.Popen([PYTHON, SCRIPT, tmp_path / "spec.json"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
        for line in child.stdout:
            if json.loads(line)["event"] == "epoch":
                break
        child.send_signal(signal.SIGTERM)
        last = json.loads(child.stdout.read().splitlines()[-1])
        assert child.wait(60) == 143
    assert last["event"] == "end" and last["reason"] == "terminated" and last["batches"] > 0


@needs_peers
@pytest.mark.slow
@pytest.mark.parametrize("peer", ["rectools", "recbole"])
def test_a_budget_ends_a_peer_and_patience_ends_it_when_nothing_gets_better(walks, tmp_path, peer):
    events = run(walks, tmp_path, peer=peer, seconds=0.01, rank=["test"], batch_size=2)
    assert [each["event"] for each in events] == ["setup", "epoch", "check", "end"] and events[-1]["reason"] == "seconds"
    assert not events[1]["complete"] and events[1]["targets"] < events[0]["targets_per_epoch"]
    end = run(walks, tmp_path, peer=peer, learning_rate=1e-9, patience=2, rank=["validation"])[-1]
    assert end["reason"] == "patience" and end["epochs"] <= 6


@pytest.mark.parametrize("spec,message", [
    ({"peer": "recbole", "data": "x", "epochs": 1, "lenght": 9}, "a spec has no field 'lenght'"),
    ({"peer": "surprise", "data": "x", "epochs": 1}, "there is no peer 'surprise'"),
    ({"peer": "recbole", "data": "x"}, "training would not end"),
])
def test_a_bad_spec_is_refused_in_words(spec, message):
    done = subprocess.run([sys.executable, SCRIPT, "-"], input=json.dumps(spec), capture_output=True, text=True)
    assert done.returncode == 1 and message in done.stderr and not done.stdout
