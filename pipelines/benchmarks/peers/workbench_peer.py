"""Ours, counted and ranked like every peer: `fit`'s own trainer with its callbacks, curve and checkpoints.

A model is a named recipe; `options` are other fields of it. A batch here is a call of the trainer, which takes
`steps` optimiser steps. Validation is the meter's: the recipe's own is put off.
"""
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.callbacks import Callback
from measure import Meter, Spec

from workbench.data.histories import Histories
from workbench.evaluation.protocol import ranks
from workbench.training.fit import quiet, set_up
from workbench.training.recipes import recipes

NAMES = ("width", "blocks", "heads", "length", "dropout", "learning_rate", "batch_size", "loss", "negatives",
         "precision")


class Counter(Callback):
    "Tells the meter about calls and epochs, and the trainer when to stop."
    def __init__(self, meter: Meter, rank: Any, ready: Any):
        self.meter, self.rank, self.ready = meter, rank, ready

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.meter.listen()                            # the trainer has put its own handler of SIGTERM in place
        self.ready()
        self.meter.start()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: dict, batch: Any, index: int) -> None:
        if self.meter.batch(int((batch.targets > 0).sum())):
            trainer.should_stop = True

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        complete = module.done % trainer.train_dataloader.n_steps == 0
        if self.meter.epoch(float("nan"), self.rank, complete):
            trainer.should_stop = True


def train(spec: Spec, log: Histories, meter: Meter, ready: Any) -> None:
    "Train one recipe as the spec says."
    recipe = recipes[spec.model](**{"seed": spec.seed, "epochs": spec.epochs or 1000, "check_every": 100_000,
                                    **spec.given(**{name: name for name in NAMES})})
    with quiet(), tempfile.TemporaryDirectory() as folder:
        training = set_up(recipe, log, Path(folder))
        model = training.module.model

        def rank(part: str) -> tuple[np.ndarray, np.ndarray]:
            found = ranks(model.eval(), getattr(log, part))
            model.train()
            return found.ranks, found.top

        counter = Counter(meter, rank, lambda: ready(
            parameters=sum(each.numel() for each in model.parameters()), items_known=log.n_items,
            targets_per_epoch=training.batches.n_targets))
        training.train(progress=False, callbacks=[counter])
