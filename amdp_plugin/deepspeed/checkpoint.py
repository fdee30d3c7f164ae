"""What a run needs to go on bit for bit, beside DeepSpeed's own checkpoint files (which do not hold it)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import logger

RANDOM_STATE = "random_state"
"""What each stream of random numbers of a rank would draw next."""
AHEAD = "weights"
"""What the stage of a rank, and of its replicas, computes with under error feedback."""
MEANS = "mean_updates"
"""Running means of the updates of what a rank steps."""


def save_beside(kind: str, value: Any, directory: Path, global_rank: int) -> None:
    """Write ``value``, a list of ``kind``, of this rank."""
    torch.save(value, _file(kind, directory, global_rank))


def load_beside(kind: str, directory: Path, global_rank: int) -> list[Any] | None:
    """What a rank wrote into the ``directory`` of a checkpoint, or ``None`` where it has none."""
    path = _file(kind, directory, global_rank)
    if path.is_file():
        values: list[Any] = torch.load(path, weights_only=False, map_location="cpu")
        return values
    if kind == RANDOM_STATE:
        logger.info(f"{directory} holds no random state for rank {global_rank}; dropout goes on from the present one")
    return None


def _file(kind: str, directory: Path, global_rank: int) -> Path:
    return directory / f"amdp_{kind}_rank_{global_rank:05d}.pt"
