"""RecTools 0.19: SASRecModel with any of its losses, eSASRec and HSTUModel, driven through their public classes.

eSASRec is what RecTools' page says it is: SASRecModel with LiGR layers and sampled softmax (arXiv:2508.06450). The
trainer is the one that a model makes for itself with `verbose=0`, on the CPU, with a callback that counts. A batch is
of users. RecTools knows the items of its training data (the last `length` + 1 of each user); others are ranked last.
"""
from typing import Any

import numpy as np
import pandas as pd
import torch
from measure import Meter, Spec, rank_cases
from pytorch_lightning import Callback, Trainer, seed_everything
from rectools.dataset import Dataset
from rectools.dataset.context import get_context
from rectools.models import HSTUModel, SASRecModel
from rectools.models.nn.transformers.ligr import LiGRLayers

from workbench.data.histories import Histories, Split
from workbench.evaluation.protocol import Batch

ESASREC = {"transformer_layers_type": LiGRLayers, "loss": "sampled_softmax", "n_negatives": 256}
MODELS = {"sasrec": (SASRecModel, {}), "esasrec": (SASRecModel, ESASREC), "hstu": (HSTUModel, {})}
NAMES = {"n_factors": "width", "n_blocks": "blocks", "n_heads": "heads", "session_max_len": "length",
         "dropout_rate": "dropout", "lr": "learning_rate", "batch_size": "batch_size", "loss": "loss",
         "n_negatives": "negatives"}


def interactions(
    log: Histories,
    users: np.ndarray,     # int64 [m], row of each user
    starts: np.ndarray,    # int64 [m], where a piece of the user's history begins
    ends: np.ndarray,      # int64 [m], one past its end
) -> pd.DataFrame:         # a row for each interaction
    "Return pieces of the packed arrays as the table that RecTools reads; users and items keep our numbers."
    lengths = ends - starts
    places = np.repeat(starts - np.concatenate([[0], np.cumsum(lengths)[:-1]]), lengths) + np.arange(lengths.sum())
    return pd.DataFrame({"user_id": np.repeat(users, lengths), "item_id": log.items[places].astype(np.int64),
                         "weight": 1.0, "datetime": pd.to_datetime(np.asarray(log.timestamps[places]), unit="s")})


class Cases:
    "The cases of one part, prepared once by RecTools' own code, scored as often as the training wants."
    def __init__(self, model: Any, log: Histories, split: Split):
        self.model, self.n_items, prepare, context = model, split.n_items, model.data_preparator, None
        if model.require_recommend_context:    # HSTU is told when it is asked, the time of the target
            context = get_context(interactions(log, split.users, split.ends, split.ends + 1))
        table = Dataset.construct(interactions(log, split.users, split.starts, split.ends))
        prepared = prepare.transform_dataset_u2i(table, split.users, context)
        self.loader = prepare.get_dataloader_recommend(prepared, model.recommend_batch_size)
        rows = np.searchsorted(split.users, prepared.user_id_map.external_ids.astype(np.int64))
        self.places = np.full(len(split), -1)          # of each case in the loader; -1 where no item of it is known
        self.places[rows] = np.arange(len(rows))
        self.known = torch.as_tensor(prepare.get_known_item_ids().astype(np.int64))
        self.vectors = torch.as_tensor(prepare.get_known_items_sorted_internal_ids())

    def encode(self) -> None:
        "Compute the vectors of all users and items with the weights of the moment."
        network = self.model.torch_model.eval()
        items = network.item_model.get_all_embeddings()
        self.users = torch.cat([network.encode_sessions(batch, items)[:, -1] for batch in self.loader])
        self.items = items[self.vectors]

    def score(self, batch: Batch) -> torch.Tensor:     # float [b, n_items + 1]
        "Score the catalogue for some cases."
        places = torch.as_tensor(self.places[batch.rows])
        found = self.model.torch_model.similarity_module(self.users[places], self.items)
        scores = (found.amin(1, keepdim=True) - 1).repeat(1, self.n_items + 1)
        scores[:, self.known] = found
        return scores.where((places >= 0)[:, None], 0)


class Counter(Callback):
    "Tells the meter about batches and epochs, and the trainer when to stop."
    def __init__(self, meter: Meter, rank: Any, ready: Any):
        self.meter, self.rank, self.ready = meter, rank, ready

    def __deepcopy__(self, memo: dict) -> "Counter":   # RecTools copies its trainer; the count stays one
        return self

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        self.meter.listen()                            # Lightning has put its own handler of SIGTERM in place
        prepare, sessions = module.data_preparator, trainer.train_dataloader.dataset.sessions
        self.ready(parameters=sum(p.numel() for p in module.parameters()),
                   items_known=prepare.item_id_map.size - prepare.n_item_extra_tokens,
                   targets_per_epoch=sum(len(session) - 1 for session in sessions))
        self.meter.start()

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: dict, batch_idx: int) -> None:
        trainer.should_stop = self.meter.batch(int((batch["y"] != 0).sum()))

    def on_train_epoch_end(self, trainer: Trainer, module: Any) -> None:
        complete = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        trainer.should_stop = self.meter.epoch(float(trainer.callback_metrics["train_loss"]), self.rank, complete)
        module.train()


def train(spec: Spec, log: Histories, meter: Meter, ready: Any) -> None:
    "Train one model as the spec says."
    if spec.model not in MODELS:
        raise SystemExit(f"there is no model {spec.model!r} of rectools: choose one of {', '.join(MODELS)}")
    seed_everything(spec.seed)
    kind, defaults = MODELS[spec.model]
    model, cases = kind(**defaults | spec.given(**NAMES)), {}

    @torch.inference_mode()
    def rank(part: str) -> tuple[np.ndarray, np.ndarray]:
        split = getattr(log, part)
        if part not in cases:
            cases[part] = Cases(model, log, split)
        cases[part].encode()
        return rank_cases(cases[part].score, split)

    model._trainer = Trainer(                          # RecTools' documentation says to assign it
        max_epochs=spec.epochs or -1, accelerator="cpu", devices=1,
        precision="bf16-mixed" if spec.precision == "bfloat16" else None, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[Counter(meter, rank, ready)])
    part = log.train
    model.fit(Dataset.construct(interactions(log, part.users, part.starts, part.ends)))
