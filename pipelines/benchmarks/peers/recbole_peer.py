"""RecBole 1.2.1: SASRec with cross entropy, driven through its Config, SequentialDataset, TrainDataLoader and Trainer.

RecBole is given the training part alone, as its own kind of file, and makes a row of every prefix itself: a batch is of
targets. All items of the catalogue stand in its item file, so that its vocabulary is ours. Times are positions, since
it keeps them in float32.

To import any sequential model of RecBole imports them all, and one of them (sine.py) turns autograd's anomaly detection
on for the whole process, which slows every step. It is turned off again here: a peer is measured at its best.
`"as_shipped": true` leaves it on.
"""
import contextlib
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import Meter, Spec, rank_cases
from recbole.config import Config
from recbole.data import create_dataset
from recbole.data.dataloader import TrainDataLoader
from recbole.data.interaction import Interaction
from recbole.model.sequential_recommender import SASRec
from recbole.trainer import Trainer
from recbole.utils import init_seed

from workbench.data.histories import Histories
from workbench.evaluation.protocol import Batch

NAMES = {"hidden_size": "width", "n_layers": "blocks", "n_heads": "heads", "MAX_ITEM_LIST_LENGTH": "length",
         "hidden_dropout_prob": "dropout", "attn_dropout_prob": "dropout", "learning_rate": "learning_rate",
         "train_batch_size": "batch_size", "loss_type": "loss"}


class Enough(Exception):
    "Raised to leave RecBole's training loop, which has no other way out."


def write_log(log: Histories, folder: Path) -> None:
    "Write the training part and the catalogue as RecBole's atomic files."
    part = log.train
    (folder/"log").mkdir()
    with open(folder/"log/log.inter", "w") as file:
        file.write("user_id:token\titem_id:token\ttimestamp:float\n")
        for user, start, end in zip(part.users.tolist(), part.starts.tolist(), part.ends.tolist(), strict=True):
            file.writelines(f"{user}\t{item}\t{i}\n" for i, item in enumerate(part.items[start:end].tolist()))
    (folder/"log/log.item").write_text("item_id:token\n" + "".join(f"{i}\n" for i in range(1, part.n_items + 1)))


def settings(spec: Spec, folder: Path) -> dict[str, Any]:
    "Return RecBole's configuration: what it needs to find the files, and what the spec sets."
    return {"data_path": str(folder), "checkpoint_dir": str(folder/"saved"), "use_gpu": False, "show_progress": False,
            "load_col": {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id"]},
            "eval_args": {"split": {"RS": [1, 0, 0]}, "order": "TO", "group_by": "user", "mode": "full"},
            "train_neg_sample_args": None,             # cross entropy over all items samples none
            "seed": spec.seed, "epochs": spec.epochs or 10**9, **spec.given(**NAMES)}


class CountedTrainer(Trainer):
    "RecBole's trainer, which tells the meter about batches and epochs."
    def __init__(self, config: Config, model: SASRec, meter: Meter, rank: Any):
        super().__init__(config, model)
        self.meter, self.rank, self.pending = meter, rank, 0

    def count(self) -> None:
        "Count the batch before this one, whose step is over by now."
        if self.pending and self.meter.batch(self.pending):
            self.pending = 0
            raise Enough
        self.pending = 0

    def loss(self, rows: Interaction) -> torch.Tensor:
        "Compute the loss of a batch as the model does."
        self.count()
        self.pending = len(rows)
        return self.model.calculate_loss(rows)

    def _train_epoch(self, train_data: Any, epoch_idx: int, loss_func: Any = None, show_progress: Any = False) -> float:
        self.meter.start()
        total = float("nan")
        with contextlib.suppress(Enough):
            total = super()._train_epoch(train_data, epoch_idx, self.loss, show_progress)
            self.count()
        complete = self.meter.done.batches - self.meter.last_epoch.batches == len(train_data)
        self.model.eval()                              # RecBole goes back to training itself
        if self.meter.epoch(total/len(train_data), self.rank, complete):
            raise Enough
        return total


def scorer(model: SASRec, numbers: torch.Tensor) -> Any:    # Batch → float [b, n_items + 1]
    "Return a function that scores our catalogue for some cases; `numbers` holds RecBole's number of each of our items."
    columns = torch.arange(model.max_seq_length)

    def score(batch: Batch) -> torch.Tensor:
        kept = batch.lengths.clamp(max=model.max_seq_length)
        places = ((batch.lengths - kept)[:, None] + columns).clamp(max=batch.items.shape[1] - 1)
        items = numbers[batch.items.gather(1, places)].where(columns < kept[:, None], 0)
        return model.full_sort_predict(Interaction({model.ITEM_SEQ: items, model.ITEM_SEQ_LEN: kept}))[:, numbers]
    return score


def train(spec: Spec, log: Histories, meter: Meter, ready: Any) -> None:
    "Train one model as the spec says."
    if spec.model != "sasrec":
        raise SystemExit(f"there is no model {spec.model!r} of recbole: choose sasrec")
    logging.disable(logging.INFO)
    sys.argv = sys.argv[:1]                            # RecBole takes the command line for configuration
    torch.autograd.set_detect_anomaly(spec.as_shipped)
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):    # it writes tensorboard logs where it stands
        write_log(log, Path(name))
        config = Config(model="SASRec", dataset="log", config_dict=settings(spec, Path(name)))
        init_seed(config["seed"], config["reproducibility"])
        dataset = create_dataset(config)
        rows = dataset.build()[0]
        model = SASRec(config, rows).to(config["device"])
        numbers = dataset.token2id("item_id", [str(i) for i in range(1, log.n_items + 1)])
        score = scorer(model, torch.as_tensor(np.append(0, numbers)))

        @torch.inference_mode()
        def rank(part: str) -> tuple[np.ndarray, np.ndarray]:
            return rank_cases(score, getattr(log, part))

        ready(parameters=sum(p.numel() for p in model.parameters()), items_known=dataset.item_num - 1,
              targets_per_epoch=len(rows))
        with contextlib.suppress(Enough):
            loader = TrainDataLoader(config, rows, None, shuffle=True)
            CountedTrainer(config, model, meter, rank).fit(loader, saved=False, verbose=False)
