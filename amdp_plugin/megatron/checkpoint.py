"""What a run needs to go on bit for bit, beside Megatron-LM's own checkpoint files.

Those hold the random state of the process, which is that of one direction, and what builds the data after a load has
drawn from it; under error feedback the weights that an optimizer goes on from, not those that its stage computes with;
and no running means of updates.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor


def save_random_states(states: list[Any], iteration: int) -> None:
    """Write what each of this rank's streams would draw next."""
    _save("random_state", dist.get_rank(), states, iteration)


def load_random_states(arguments: Any) -> list[Any] | None:
    """This rank's streams in the checkpoint that was loaded, or ``None`` where it has none: the process's state then
    begins them."""
    return None if arguments.no_load_rng else _load("random_state", dist.get_rank(), arguments)


def save_ahead(ahead: list[Tensor] | None, iteration: int) -> None:
    """Write what this rank's stage computes with under error feedback, once for all data-parallel replicas."""
    if ahead is not None and dist.get_rank() == _first_replica():
        _save("weights", dist.get_rank(), ahead, iteration)


def load_ahead(arguments: Any) -> list[Tensor] | None:
    """What was written of this rank's stage, or ``None`` where it begins with the weights of the checkpoint."""
    return None if arguments.no_load_optim else _load("weights", _first_replica(), arguments)


def save_means(means: list[Tensor] | None, iteration: int) -> None:
    """Write the running means of the updates of what this rank steps."""
    if means is not None:
        _save("mean_updates", dist.get_rank(), means, iteration)


def load_means(arguments: Any) -> list[Tensor] | None:
    """What this rank wrote, or ``None`` where they begin anew."""
    return None if arguments.no_load_optim else _load("mean_updates", dist.get_rank(), arguments)


def _first_replica() -> int:
    return min(dist.get_process_group_ranks(parallel_state.get_data_parallel_group(with_context_parallel=True)))


def _save(kind: str, rank: int, values: list[Any], iteration: int) -> None:
    from megatron.training import get_args

    path = _file(kind, rank, get_args().save, iteration)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(values, path)


def _load(kind: str, rank: int, arguments: Any) -> list[Any] | None:
    if arguments.load is None or arguments.finetune:
        return None
    path = _file(kind, rank, arguments.load, arguments.iteration)
    if not path.is_file():
        return None
    values: list[Any] = torch.load(path, weights_only=False, map_location="cpu")
    return values


def _file(kind: str, rank: int, directory: str, iteration: int) -> Path:
    from megatron.training.checkpointing import get_checkpoint_name

    folder = Path(get_checkpoint_name(directory, iteration, return_base_dir=True))
    return folder / f"amdp_{kind}_rank_{rank:05d}.pt"
