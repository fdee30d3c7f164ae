"""The generators that Megatron's layers draw from."""

from __future__ import annotations

import random
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from ..runtime.random_regions import put_region_states, region_states, seed_regions
from ..runtime.random_streams import Generators


def random_state() -> dict[str, Any]:
    """torch's generators on the CPU and the device, the tracker of tensor-parallel dropout, and Python's."""
    return {
        "cpu": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "tracker": region_states(get_cuda_rng_tracker()),
        "python": random.getstate(),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Undo what was drawn since :func:`random_state`."""
    torch.set_rng_state(state["cpu"])
    if state["device"] is not None:
        torch.cuda.set_rng_state(state["device"])
    put_region_states(get_cuda_rng_tracker(), state["tracker"])
    random.setstate(state["python"])


def seed_all(seed: int) -> None:
    """Begin a state from ``seed``, the same on all tensor-parallel ranks but for the tracker's regions, whose numbers
    are theirs alone."""
    torch.manual_seed(seed)
    random.seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.manual_seed(seed)
    seed_regions(get_cuda_rng_tracker(), seed, parallel_state.get_tensor_model_parallel_rank(), device)


GENERATORS = Generators(random_state, set_random_state, seed_all)
