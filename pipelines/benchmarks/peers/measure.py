"""What a peer is asked for, and the one way in which all of them are counted and ranked.

Seconds run from the first batch of the first epoch; reading, set-up and rankings are outside, everything that the peer
does between two batches and between two epochs is inside. Core-seconds are the processor time of the process over the
same stretches, whatever else the machine does. A target is an item that the loss asks for: a position that is not
padding (RecTools, which trains on the last `length` of each user) or a row (RecBole, which makes one of every prefix).
A rate leaves out the first `warmup` batches of the run.
"""
import json
import math
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from workbench.data.histories import Split
from workbench.evaluation.metrics import ndcg
from workbench.evaluation.protocol import LISTED, Batch, case_batches, rank_batch


@dataclass(frozen=True, kw_only=True)
class Spec:
    "What to train, on what, for how long; None keeps the peer's default."
    peer: str                             # rectools, recbole or workbench
    data: str                             # folder of histories
    model: str = "sasrec"                 # of the peer
    width: int | None = None              # of item vectors and layers
    blocks: int | None = None             # of the transformer
    heads: int | None = None              # of attention
    length: int | None = None             # longest history the model looks at, items
    dropout: float | None = None          # share of activations dropped in training
    learning_rate: float | None = None    # of Adam
    batch_size: int | None = None         # users (RecTools) or targets (RecBole) in an optimiser step
    loss: str | None = None               # by the peer's name for it
    negatives: int | None = None          # items sampled for each target
    options: dict[str, Any] = field(default_factory=dict)   # anything else, by the peer's own names
    epochs: int = 0                       # at most; 0 for no limit
    seconds: float = 0.0                  # of training, at most; 0 for no limit
    check_every: int = 1                  # epochs between two rankings
    patience: int = 0                     # rankings of validation without a better one; 0 for no limit
    rank: tuple[str, ...] = ()            # parts to rank: validation, test
    output: str = "."                     # where arrays of ranks are written
    warmup: int = 10                      # first batches that no rate counts
    threads: int = 1                      # of torch
    precision: str | None = None          # bfloat16 for autocast (rectools, workbench)
    seed: int = 0                         # of weights, order and dropout
    as_shipped: bool = False              # recbole: leave autograd's anomaly detection on

    def given(self, **names: str) -> dict[str, Any]:
        "Return what the spec sets under the peer's names (theirs=ours), and the options."
        found = {theirs: getattr(self, ours) for theirs, ours in names.items()}
        return {theirs: value for theirs, value in found.items() if value is not None} | self.options


def read_spec(text: str, peers: tuple[str, ...]) -> Spec:
    "Check and return a spec."
    given, names = json.loads(text), [each.name for each in fields(Spec)]
    unknown = sorted(set(given) - set(names))
    if unknown:
        raise SystemExit(f"a spec has no field {unknown[0]!r}: it has {', '.join(names)}")
    places = {name: str(Path(given.get(name, ".")).absolute()) for name in ("data", "output")}    # a peer may chdir
    spec = Spec(**given | places | {"rank": tuple(given.get("rank", ()))})
    if spec.peer not in peers:
        raise SystemExit(f"there is no peer {spec.peer!r}: choose one of {', '.join(peers)}")
    if not (spec.epochs or spec.seconds or spec.patience):
        raise SystemExit("training would not end: set epochs, seconds or patience")
    if spec.patience and "validation" not in spec.rank:
        raise SystemExit('patience needs the ranking of validation: add it to "rank"')
    return spec


class State(NamedTuple):
    "How far training is, or the difference of two such states."
    batches: int = 0
    targets: int = 0
    seconds: float = 0.0        # of the clock
    cpu_seconds: float = 0.0    # of the processor, by all threads of this process

    def since(self, other: "State") -> "State":
        "Return what happened after another state."
        return State(*(b - a for a, b in zip(other, self, strict=True)))


class Meter:
    "Counts targets and seconds of training, ranks between epochs, and says when it is enough."
    def __init__(
        self,
        spec: Spec,
        emit: Callable[..., None],    # writes an event
    ):
        self.spec, self.emit, self.reason = spec, emit, ""
        self.epochs, self.best, self.lost = 0, -math.inf, 0
        self.running: State | None = None                     # the two clocks where counting began or went on
        self.done = self.warm = self.last_epoch = State()

    def listen(self) -> None:
        "Take SIGTERM as a wish to stop; called again where a peer has put its own handler in place."
        signal.signal(signal.SIGTERM, lambda *_: self.stop("terminated"))

    def stop(self, reason: str) -> None:
        "Ask for an end of training; the first reason stays."
        self.reason = self.reason or reason

    def now(self) -> State:
        "Return how far training is."
        clocks = State(0, 0, time.perf_counter(), time.process_time())
        passed = clocks.since(self.running) if self.running else State()
        self.running = clocks
        self.done = State(*(a + b for a, b in zip(self.done, passed, strict=True)))
        return self.done

    def start(self) -> None:
        "Start the clock; called again it does nothing."
        if self.running is None:
            self.now()

    @contextmanager
    def paused(self) -> Iterator[State]:
        "Stop the clock while the block runs."
        yield self.now()
        self.running = None
        self.now()

    def batch(
        self,
        targets: int,    # that a batch was trained on
    ) -> bool:           # whether to stop
        "Count a batch."
        self.done = self.done._replace(batches=self.done.batches + 1, targets=self.done.targets + targets)
        state = self.now()
        if state.batches == self.spec.warmup:
            self.warm = state
        if self.spec.seconds and state.seconds >= self.spec.seconds:
            self.stop("seconds")
        return bool(self.reason)

    def rates(self, since: State, until: State) -> dict[str, float | None]:
        "Return targets per second and per core-second between two states; None where all of it is warm-up."
        part = until.since(max(since, self.warm)) if until.batches > self.spec.warmup else State()
        return {"targets_per_second": part.targets/part.seconds if part.seconds else None,
                "targets_per_core_second": part.targets/part.cpu_seconds if part.cpu_seconds else None}

    def epoch(
        self,
        loss: float,                                               # as the peer reports it; NaN where it does not
        rank: Callable[[str], tuple[np.ndarray, np.ndarray]],      # part → ranks [cases], top [cases, 10]
        complete: bool = True,                                     # whether training went through all of the epoch
    ) -> bool:                                                     # whether to stop
        "Report an epoch, rank when it is time to, and see whether it was enough."
        with self.paused() as state:
            number, part = self.epochs + 1, state.since(self.last_epoch)
            self.epochs += complete
            self.emit("epoch", epoch=number, complete=complete, seconds=state.seconds, cpu_seconds=state.cpu_seconds,
                      batches=part.batches, targets=part.targets, **self.rates(self.last_epoch, state),
                      loss=loss if math.isfinite(loss) else None)
            self.last_epoch = state
            if self.spec.epochs and self.epochs >= self.spec.epochs:
                self.stop("epochs")
            due = number % self.spec.check_every == 0 or self.reason
            if self.spec.rank and due and self.reason != "terminated":
                self.check(rank, number)
        return bool(self.reason)

    def check(self, rank: Callable[[str], tuple[np.ndarray, np.ndarray]], number: int) -> None:
        "Rank the parts after an epoch, write the arrays, and count the checks since the best one."
        found, files, folder = {}, {}, Path(self.spec.output)
        folder.mkdir(parents=True, exist_ok=True)
        for part in self.spec.rank:
            arrays = dict(zip(("ranks", "top"), rank(part), strict=True))
            files[part] = {name: str(folder/f"epoch-{number:05}-{part}-{name}.npy") for name in arrays}
            for name, array in arrays.items():
                np.save(files[part][name], array)
            found[part] = float(ndcg(arrays["ranks"], 10).mean())
        self.emit("check", epoch=number, seconds=self.last_epoch.seconds, cpu_seconds=self.last_epoch.cpu_seconds,
                  **{"ndcg@10": found}, files=files)
        value = found.get("validation", math.nan)
        self.lost = 0 if value > self.best else self.lost + 1
        self.best = max(self.best, value)
        if self.spec.patience and self.lost >= self.spec.patience:
            self.stop("patience")

    def end(self) -> None:
        "Report the whole run."
        state = self.last_epoch
        self.emit("end", reason=self.reason, epochs=self.epochs, **state._asdict(), **self.rates(State(), state),
                  warmup=self.spec.warmup, peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*1024)


def rank_cases(
    score: Callable[[Batch], torch.Tensor],    # some cases → float [b, n_items + 1]
    split: Split,                              # validation or test
) -> tuple[np.ndarray, np.ndarray]:            # ranks int64 [cases], top int32 [cases, ≤ 10]
    "Rank the catalogue for every case by our protocol."
    ranks, top = np.zeros(len(split), np.int64), np.zeros((len(split), min(LISTED, split.n_items)), np.int32)
    longest = int((split.ends - split.starts).max())
    for batch in case_batches(split, split.exclude_seen, longest, torch.device("cpu")):
        scores = score(batch)
        ranks[batch.rows], top[batch.rows] = rank_batch(lambda *_, scores=scores: scores, split, batch)
    return ranks, top
