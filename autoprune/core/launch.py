"""Which of several processes this one is, by what its launcher (torchrun and its like) left in the environment."""

from __future__ import annotations

import os


def launched_size() -> int:
    """Return how many processes were started together; 1 without a launcher."""
    if not all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR")):
        return 1
    return int(os.environ["WORLD_SIZE"])


def launched_rank() -> int:
    """Return this process's number among them; 0 leads, and writes files and progress."""
    return int(os.environ["RANK"]) if launched_size() > 1 else 0
