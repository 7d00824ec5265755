"""Train a model of another library on our histories, and say in JSON lines how fast it went and how well it ranks.

It runs in the peers' own environment, which `make peers` builds, and takes our protocol from this tree: a peer is
ranked by the very code that ranks our own models. Our own training goes through the same script ("peer": "workbench",
in our environment), so that it is counted by the same clock.

    .peers/bin/python pipelines/benchmarks/peers/run_peer.py spec.json        # or - for standard input

A spec. Only `peer`, `data` and an end are needed; what is left out (or null) keeps the peer's own default:

    {"peer": "rectools", "model": "esasrec",          # rectools: sasrec, esasrec, hstu; recbole: sasrec; ours: a recipe
     "data": "histories",                             # a folder that workbench.data.histories.save_histories wrote
     "width": 64, "blocks": 2, "heads": 1, "length": 50, "dropout": 0.2, "learning_rate": 0.001, "batch_size": 128,
     "loss": "sampled_softmax", "negatives": 256,     # rectools: softmax, sampled_softmax, BCE, gBCE; recbole: CE
     "options": {"gbce_t": 0.75},                     # anything else that the peer's class or configuration takes
     "epochs": 100, "seconds": 600,                   # at most so many epochs and seconds of training; 0: no limit
     "check_every": 2, "patience": 5,                 # epochs between rankings; rankings without a better one
     "rank": ["validation", "test"], "output": "out", # the parts to rank at each check, and where the arrays go
     "warmup": 10, "threads": 1, "seed": 0,           # batches that no rate counts; threads of torch; seed
     "as_shipped": false}                             # recbole: true leaves anomaly detection on, see recbole_peer.py

Events, one a line:

    {"event": "setup", "peer", "model", "versions", "parameters", "items_known", "targets_per_epoch", "threads", "spec"}
    {"event": "epoch", "epoch", "complete", "seconds", "cpu_seconds", "batches", "targets", "targets_per_second",
     "targets_per_core_second", "loss"}
    {"event": "check", "epoch", "seconds", "cpu_seconds", "ndcg@10": {"validation": 0.1}, "files": {"validation": {}}}
    {"event": "end", "reason", "epochs", "batches", "seconds", "cpu_seconds", "targets", "targets_per_second",
     "targets_per_core_second", "warmup", "peak_memory_bytes"}

What is counted stands in measure.py. A check writes `epoch-00002-validation-ranks.npy` (int64 [cases], the place of
each target) and `epoch-00002-validation-top.npy` (int32 [cases, 10]), the two arrays of `evaluation.protocol.Ranking`,
for `evaluate_ranking`. SIGTERM ends the training after the batch at hand; the exit status is then 143.
"""
import json
import os
import sys
from dataclasses import asdict
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

PACKAGES = {"rectools": ("RecTools", "pytorch-lightning", "pandas"), "recbole": ("recbole", "pandas"),
            "workbench": ("workbench", "lightning")}


def main() -> int:
    "Run one spec."
    sys.path.insert(1, str(Path(__file__).resolve().parents[3]))    # where workbench lies
    import torch
    from measure import Meter, read_spec

    from workbench.data.histories import Histories
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)                                                   # what a library prints goes to standard error
    spec = read_spec(sys.stdin.read() if sys.argv[1] == "-" else Path(sys.argv[1]).read_text(), tuple(PACKAGES))
    versions = {name: version(name) for name in (*PACKAGES[spec.peer], "torch", "numpy")}

    def emit(event: str, **facts) -> None:
        events.write(json.dumps({"event": event, **facts}, allow_nan=False) + "\n")

    def ready(**facts) -> None:
        emit("setup", peer=spec.peer, model=spec.model, versions=versions, **facts, threads=torch.get_num_threads(),
             spec=asdict(spec))

    meter = Meter(spec, emit)
    meter.listen()
    torch.set_num_threads(spec.threads)
    import_module(f"{spec.peer}_peer").train(spec, Histories.load(spec.data), meter, ready)
    meter.end()
    return 143 if meter.reason == "terminated" else 0


if __name__ == "__main__":
    sys.exit(main())
