"""Gradients of windows that have closed and wait for their update, while those of the next are summed up."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
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

    def multiply(self, factor: float) -> None:
        """Multiply the sums."""

    def tensors(self, parked: Parked) -> Iterable[Tensor]:
        """The memory that it takes."""


class Parking(Generic[Parked]):
    """The windows of one stage that wait, the oldest first. The latest stays in the sums until others come there.

    A gradient has the loss scale that its stage had at the forward, which is one on all stages where decisions are
    relayed. Where that has changed within a window, the sums so far are brought to the new one. All of it is over when
    a window closes, if that has as many micro-batches as may be in flight.

    Args:
        sums: the host's.
        scale: the loss scale after the latest update.
    """

    def __init__(self, sums: Sums[Parked], scale: Callable[[], float] = lambda: 1.0) -> None:
        self._sums, self._scale = sums, scale
        self._windows: deque[Parked] = deque()
        self._is_whole = False
        self._scales: dict[int, float] = {}
        self._present: float | None = None
        """The scale of what is in the sums; ``None`` where that is nothing."""

    def forward(self, micro_batch: int) -> None:
        """Note the scale that the gradient of ``micro_batch`` is going to have."""
        self._scales[micro_batch] = self._scale()

    def forget(self, micro_batch: int) -> None:
        """Its forward is cancelled."""
        self._scales.pop(micro_batch, None)

    def close(self) -> None:
        """A window has closed: the sums are its gradient."""
        self._is_whole, self._present = True, None

    def backward(self, micro_batch: int) -> bool:
        """Before a backward: put aside what must not be added to, and rescale what is. Returns whether anything was put
        aside."""
        scale, moves = self._scales.pop(micro_batch), self._is_whole
        if moves:
            self._windows.append(self._sums.park())
            self._is_whole = False
        if self._present not in (None, scale):
            self._sums.multiply(scale / self._present)
        self._present = scale
        return moves

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

    def drop(self) -> None:
        """Forget the oldest window."""
        if self._windows:
            self._windows.popleft()
        else:
            self._sums.park()
            self._is_whole = False

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

    @torch.no_grad()
    def multiply(self, factor: float) -> None:
        for parameter, name in self._places:
            present = getattr(parameter, name, None)
            if present is not None:
                present.mul_(factor)

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

    @torch.no_grad()
    def multiply(self, factor: float) -> None:
        for buffer in self._buffers:
            buffer.mul_(factor)

    def tensors(self, parked: list[Tensor]) -> Iterator[Tensor]:
        return iter(parked)
