"""Histories to train on, and histories as a file that the command line reads."""
from pathlib import Path

import numpy as np

from workbench.data.histories import Histories, pack


def write_csv(histories: Histories, path: Path) -> Path:
    "Write histories whose timestamps are an order as a log with times in 2020."
    users = np.repeat(histories.user_ids, np.diff(histories.offsets))
    items, times = histories.item_ids[histories.items - 1], 1_600_000_000 + histories.timestamps
    rows = [f"{user},{item},{time}" for user, item, time in zip(users, items, times, strict=True)]
    path.write_text("\n".join(["user_id,item_id,timestamp", *rows]) + "\n")
    return path


def uneven_walks() -> Histories:
    "Make listeners who walk through eighty items, with histories of many lengths."
    random, lengths = np.random.default_rng(0), np.random.default_rng(1).integers(3, 40, 300)
    users = np.repeat(np.arange(300), lengths)
    steps = np.where(random.random(len(users)) < 0.8, 1, random.integers(0, 80, len(users)))
    track = (random.integers(0, 80, 300)[users] + steps.cumsum()) % 80
    return pack("walks", users, track, np.arange(len(users)), np.arange(300).astype(str), np.arange(80).astype(str),
                exclude_seen=False)
