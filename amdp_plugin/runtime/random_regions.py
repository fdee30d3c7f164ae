"""What tensor-parallel layers draw from: a host's tracker, with a generator for each of their regions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

STRIDE = 1_000_003
"""Between the seeds of two regions: more than there are tensor-parallel ranks."""


class Tracker(Protocol):
    """A host's. Of every region it holds the generator's state, or the generator itself."""

    def get_states(self) -> dict[str, Any]: ...
    def set_states(self, states: dict[str, Any]) -> None: ...


def region_states(tracker: Tracker) -> dict[str, Tensor]:
    """What every region would draw next. Whatever is drawn later leaves them as they are."""
    held = tracker.get_states()
    return {name: at.get_state() if isinstance(at, torch.Generator) else at for name, at in held.items()}


def put_region_states(tracker: Tracker, states: Mapping[str, Tensor]) -> None:
    """Let the regions go on from :func:`region_states`; a generator that is held stays the same."""
    held = tracker.get_states()
    put: dict[str, Any] = dict(states)
    for name in held.keys() & states.keys():
        if isinstance(held[name], torch.Generator):
            held[name].set_state(states[name])
            put[name] = held[name]
    tracker.set_states(put)


def seed_regions(tracker: Tracker, seed: int, tensor_rank: int, device: str) -> None:
    """Begin every region anew from ``seed``, with numbers that differ between regions and tensor-parallel ranks.

    Args:
        tracker: whose regions.
        seed: the same on all ranks of a stage.
        tensor_rank: this one among them.
        device: what the regions' generators are of.
    """
    numbers = {name: seed + STRIDE * number for number, name in enumerate(sorted(tracker.get_states()), start=1)}
    put_region_states(
        tracker,
        {name: torch.Generator(device).manual_seed(of + tensor_rank).get_state() for name, of in numbers.items()},
    )
