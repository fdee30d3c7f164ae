"""The random states of a rank's directions, beside Megatron-LM's own checkpoint files.

Those hold the process's, which is that of one direction; and what builds the data after a load has drawn from it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def save_random_states(states: list[Any], iteration: int) -> None:
    """Write what each of this rank's streams would draw next."""
    from megatron.training import get_args

    path = _file(get_args().save, iteration)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(states, path)


def load_random_states(arguments: Any) -> list[Any] | None:
    """This rank's streams in the checkpoint that was loaded, or ``None`` where it has none: the process's state then
    begins them."""
    path = None if arguments.load is None else _file(arguments.load, arguments.iteration)
    if path is None or not path.is_file() or arguments.no_load_rng or arguments.finetune:
        return None
    states: list[Any] = torch.load(path, weights_only=False)
    return states


def _file(directory: str, iteration: int) -> Path:
    from megatron.training.checkpointing import get_checkpoint_name

    folder = Path(get_checkpoint_name(directory, iteration, return_base_dir=True))
    return folder / f"amdp_random_state_rank_{dist.get_rank():05d}.pt"
