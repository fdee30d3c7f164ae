"""The generators that layers draw from."""

from __future__ import annotations

import random
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.activation_checkpointing.checkpointing import get_cuda_rng_tracker

from ..runtime.random_streams import Generators


def random_state() -> dict[str, Any]:
    """All generators that layers draw from: torch's on the CPU and the device, the tracker of
    tensor-parallel dropout, and Python's."""
    accelerator = get_accelerator()
    device = None if accelerator.device_name() == "cpu" else accelerator.get_rng_state()
    return {
        "cpu": torch.get_rng_state(),
        "device": device,
        "tracker": get_cuda_rng_tracker().get_states(),
        "python": random.getstate(),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Undo what was drawn since :func:`random_state`."""
    torch.set_rng_state(state["cpu"])
    if state["device"] is not None:
        get_accelerator().set_rng_state(state["device"])
    get_cuda_rng_tracker().set_states(state["tracker"])
    random.setstate(state["python"])


def seed_all(seed: int) -> None:
    """Begin a state from ``seed`` (the tracker of tensor-parallel dropout keeps its own)."""
    torch.manual_seed(seed)
    random.seed(seed)


GENERATORS = Generators(random_state, set_random_state, seed_all)
