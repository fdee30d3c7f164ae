"""The random state of every rank, beside DeepSpeed's own checkpoint files (which hold none)."""

from __future__ import annotations

from pathlib import Path

import torch
from deepspeed.utils import logger

from .random_state import random_state, set_random_state


def _file(directory: Path, global_rank: int) -> Path:
    return directory / f"amdp_random_state_rank_{global_rank:05d}.pt"


def save_random_state(save_dir: str, tag: object, global_rank: int) -> None:
    """Write what this rank's generators would draw next."""
    torch.save(random_state(), _file(Path(save_dir) / str(tag), global_rank))


def load_random_state(checkpoint: str, global_rank: int) -> None:
    """Continue this rank's generators from ``checkpoint`` (the path that DeepSpeed's load returns), if it can."""
    path = _file(Path(checkpoint).parent, global_rank)
    if path.is_file():
        set_random_state(torch.load(path, weights_only=False))
    else:
        logger.info(f"{path.parent} holds no random state for rank {global_rank}; dropout goes on from the present one")
