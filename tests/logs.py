"""Histories to train on, and histories as a file that the command line reads."""
from pathlib import Path

import numpy as np

from workbench.data.histories import Histories


def write_csv(histories: Histories, path: Path) -> Path:
    "Write histories whose timestamps are an order as a log with times in 2020."
    users = np.repeat(histories.user_ids, np.diff(histories.offsets))
    items, times = histories.item_ids[histories.items - 1], 1_600_000_000 + histories.timestamps
    rows = [f"{user},{item},{time}" for user, item, time in zip(users, items, times, strict=True)]
    path.write_text("\n".join(["user_id,item_id,timestamp", *rows]) + "\n")
    return path
