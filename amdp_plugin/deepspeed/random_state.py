"""The generators that layers draw from."""

from __future__ import annotations

import random
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.activation_checkpointing import checkpointing
from deepspeed.utils.bwc import bwc_tensor_model_parallel_rank

from ..runtime.random_regions import put_region_states, region_states, seed_regions
from ..runtime.random_streams import Generators


def random_state() -> dict[str, Any]:
    """All generators that layers draw from: torch's on the CPU and the device, the tracker of
    tensor-parallel dropout, and Python's."""
    accelerator = get_accelerator()
    device = None if accelerator.device_name() == "cpu" else accelerator.get_rng_state()
    return {
        "cpu": torch.get_rng_state(),
        "device": device,
        "tracker": region_states(checkpointing.get_cuda_rng_tracker()),
        "python": random.getstate(),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Undo what was drawn since :func:`random_state`."""
    torch.set_rng_state(state["cpu"])
    if state["device"] is not None:
        get_accelerator().set_rng_state(state["device"])
    put_region_states(checkpointing.get_cuda_rng_tracker(), state["tracker"])
    random.setstate(state["python"])


def seed_all(seed: int) -> None:
    """Begin a state from ``seed``, the same on all tensor-parallel ranks but for the tracker's regions, whose numbers
    are theirs alone."""
    torch.manual_seed(seed)
    random.seed(seed)
    tensor_rank = bwc_tensor_model_parallel_rank(checkpointing.mpu)  # as when the tracker was seeded
    seed_regions(checkpointing.get_cuda_rng_tracker(), seed, tensor_rank, get_accelerator().device_name())


GENERATORS = Generators(random_state, set_random_state, seed_all)
