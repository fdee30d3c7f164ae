"""Counts what the memory of a rank holds, whatever its host keeps it in."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .recording import Memory

RESIDENT_UNIT = 1 if sys.platform == "darwin" else 1024
"""Bytes in a unit of ``ru_maxrss``."""


def held(weights: Any, gradients: Any, exchange: Any, optimizer_state: Any) -> Memory:
    """Bytes of the tensors in four nested containers, without the peak.

    A storage counts once, in the first of them that holds it.
    """
    counted: set[tuple[torch.device, int]] = set()

    def count(container: Any) -> int:
        fresh = {}
        for tensor in tensors(container):
            storage = tensor.untyped_storage()
            fresh[tensor.device, storage.data_ptr()] = storage.nbytes()
        found = sum(size for place, size in fresh.items() if place not in counted)
        counted.update(fresh)
        return found

    return Memory(
        weights=count(weights),
        gradients=count(gradients),
        exchange=count(exchange),
        optimizer_state=count(optimizer_state),
    )


def peak_bytes(device: Any) -> int:
    """The most that this process has had so far: on a GPU what PyTorch has allocated on ``device``, on the CPU what
    was resident, with Python and all libraries."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RESIDENT_UNIT


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested containers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from tensors(value.values())
    elif isinstance(value, Iterable) and not isinstance(value, str):
        for item in value:
            yield from tensors(item)
