"""The random state of every rank, beside DeepSpeed's own checkpoint files (which hold none)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import logger


def _file(directory: Path, global_rank: int) -> Path:
    return directory / f"amdp_random_state_rank_{global_rank:05d}.pt"


def save_random_states(states: list[Any], save_dir: str, tag: object, global_rank: int) -> None:
    """Write what each of this rank's streams of random numbers would draw next."""
    torch.save(states, _file(Path(save_dir) / str(tag), global_rank))


def load_random_states(checkpoint: str, global_rank: int) -> list[Any] | None:
    """This rank's streams in ``checkpoint`` (the path that DeepSpeed's load returns), or ``None`` where it has none."""
    path = _file(Path(checkpoint).parent, global_rank)
    if path.is_file():
        states: list[Any] = torch.load(path, weights_only=False)
        return states
    logger.info(f"{path.parent} holds no random state for rank {global_rank}; dropout goes on from the present one")
    return None
