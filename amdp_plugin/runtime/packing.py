"""Several tensors as one, since a message is one operation of a device, whatever is in it.

What was proven of messages (:mod:`.plan.devices`) holds for no more: of two operations on one stream, the second starts
when the first has ended, and in a device's hardware queue all that was issued after it would wait for that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

Spec = tuple[tuple[int, ...], torch.dtype]
"""A tensor's shape and dtype."""
ALIGNMENT = 512
"""Bytes: every tensor begins at a multiple, as those do that torch allocates (on the CPU: of 64). Kernels are chosen by
where tensors begin: slower ones elsewhere, and with them sums in another order."""


def specs_of(tensors: Sequence[Tensor]) -> tuple[Spec, ...]:
    return tuple((tuple(tensor.shape), tensor.dtype) for tensor in tensors)


def packed_spec(specs: Sequence[Spec]) -> Spec:
    """What tensors of ``specs`` are packed as: one alone as itself, others as bytes."""
    if len(specs) == 1:
        return specs[0]
    return (max((end for _, end in _places(specs)), default=0),), torch.uint8


def allocate(specs: Sequence[Spec], device: torch.device) -> Tensor:
    """Memory for tensors of ``specs``; :func:`parts` are these."""
    shape, dtype = packed_spec(specs)
    return torch.empty(shape, dtype=dtype, device=device)


def parts(packed: Tensor, specs: Sequence[Spec]) -> list[Tensor]:
    """The tensors of ``specs`` in ``packed``, whose memory they share."""
    if len(specs) == 1:
        return [packed]
    places = zip(specs, _places(specs), strict=True)
    return [packed[begin:end].view(dtype).view(shape) for (shape, dtype), (begin, end) in places]


def pack(tensors: Sequence[Tensor]) -> Tensor:
    """One alone as it is, others copied together."""
    if len(tensors) == 1:
        return tensors[0]
    specs = specs_of(tensors)
    packed = allocate(specs, tensors[0].device if tensors else torch.device("cpu"))
    for part, tensor in zip(parts(packed, specs), tensors, strict=True):
        part.copy_(tensor.detach())
    return packed


def _places(specs: Sequence[Spec]) -> Iterator[tuple[int, int]]:
    """Where each begins and ends, in bytes."""
    end = 0
    for shape, dtype in specs:
        begin = -(-end // ALIGNMENT) * ALIGNMENT
        end = begin + torch.Size(shape).numel() * dtype.itemsize
        yield begin, end
