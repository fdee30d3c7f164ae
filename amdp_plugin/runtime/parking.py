"""Gradients of windows that have closed and wait for their update, while those of the next are summed up."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

PART = 2**20
"""Elements that are exchanged at once: what exchanging takes of memory."""

Parked = TypeVar("Parked")


class Sums(Protocol[Parked]):
    """Where a host sums up the gradients of a stage."""

    def park(self) -> Parked:
        """Put the gradient of a window aside; the sums begin anew."""

    def swap(self, parked: Parked) -> None:
        """Exchange the sums with what is parked."""

    def restore(self, parked: Parked) -> None:
        """After a step, which has used up the sums: go on with what is parked."""

    def tensors(self, parked: Parked) -> Iterable[Tensor]:
        """The memory that it takes."""


class Parking(Generic[Parked]):
    """The windows of one stage that wait, the oldest first. The latest stays in the sums until others come there."""

    def __init__(self, sums: Sums[Parked]) -> None:
        self._sums = sums
        self._windows: deque[Parked] = deque()
        self._is_whole = False

    def close(self) -> None:
        """A window has closed: the sums are its gradient."""
        self._is_whole = True

    def make_room(self) -> bool:
        """Before a backward: put aside what must not be added to. Returns whether anything was."""
        if not self._is_whole:
            return False
        self._windows.append(self._sums.park())
        self._is_whole = False
        return True

    @contextmanager
    def oldest(self) -> Iterator[None]:
        """Let the sums be the gradient of the oldest window, for its step; afterwards those of the latest go on."""
        if not self._windows:
            yield
            self._is_whole = False
            return
        parked = self._windows.popleft()
        self._sums.swap(parked)
        yield
        self._sums.restore(parked)

    def tensors(self) -> Iterator[Tensor]:
        """What is in memory now."""
        for parked in self._windows:
            yield from self._sums.tensors(parked)


class AttributeSums:
    """Sums that autograd keeps in an attribute of each parameter: they change places, and nothing is copied.

    Args:
        parameters: of the stage, those that are trained.
        attributes: of a parameter, that hold its sum; ``None`` is none.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], attributes: Sequence[str] = ("grad",)) -> None:
        self._places = [(parameter, name) for parameter in parameters for name in attributes]

    def park(self) -> list[Tensor | None]:
        nothing: list[Tensor | None] = [None] * len(self._places)
        self.swap(nothing)
        return nothing

    def swap(self, parked: list[Tensor | None]) -> None:
        for number, (parameter, name) in enumerate(self._places):
            present = getattr(parameter, name, None)
            setattr(parameter, name, parked[number])
            parked[number] = present

    def restore(self, parked: list[Tensor | None]) -> None:
        self.swap(parked)

    def tensors(self, parked: list[Tensor | None]) -> Iterator[Tensor]:
        return (tensor for tensor in parked if tensor is not None)


class BufferSums:
    """Sums in buffers that stay where they are, with one more for every window that waits.

    Args:
        buffers: of the host, of any shapes.
    """

    def __init__(self, buffers: Sequence[Tensor]) -> None:
        self._buffers = [buffer.view(-1) for buffer in buffers]

    @torch.no_grad()
    def park(self) -> list[Tensor]:
        parked = [buffer.clone() for buffer in self._buffers]
        for buffer in self._buffers:
            buffer.zero_()
        return parked

    @torch.no_grad()
    def swap(self, parked: list[Tensor]) -> None:
        for buffer, aside in zip(self._buffers, parked, strict=True):
            for one, other in zip(buffer.split(PART), aside.split(PART), strict=True):
                kept = one.clone()
                one.copy_(other)
                other.copy_(kept)

    @torch.no_grad()
    def restore(self, parked: list[Tensor]) -> None:
        for buffer, aside in zip(self._buffers, parked, strict=True):
            buffer.copy_(aside)

    def tensors(self, parked: list[Tensor]) -> Iterator[Tensor]:
        return iter(parked)
