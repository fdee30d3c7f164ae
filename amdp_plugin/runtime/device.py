"""What a rank's device is to its host: instants on it, and copies that the host does not wait for."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

HOST_CLOCK, DEVICE_CLOCK = "host", "device"
"""What times are taken with: where the host computes, or by events of the device."""
REFERENCE_SECONDS = 10.0
"""After so long another event becomes the reference: CUDA tells the time between two in single precision."""

Mark = Any
"""An instant on the device: when it has done all that was given to it before."""


class Copy(Protocol):
    """A copy on its way to the host."""

    def is_done(self) -> bool:
        """Whether the values are there; asking waits for nothing."""

    def values(self) -> Tensor:
        """The values, on the CPU; only once they are there."""


class Device(Protocol):
    """Where tensors are computed. Nothing here waits for the device.

    Attributes:
        clock: :data:`HOST_CLOCK` or :data:`DEVICE_CLOCK`.
        runs_ahead: whether the host gives the device work, and goes on before it is done.
    """

    clock: str
    runs_ahead: bool

    def mark(self) -> Mark:
        """Now, in the order of the work given to the device."""

    def is_done(self, mark: Mark) -> bool:
        """Whether the device has come as far as ``mark``."""

    def seconds(self, mark: Mark) -> float:
        """When it came there, on the machine's monotonic clock. Only once it has, and in the order of marks."""

    def to_host(self, tensor: Tensor) -> Copy:
        """Start to copy ``tensor`` to the CPU."""

    def to_device(self, tensor: Tensor) -> Tensor:
        """``tensor`` on the device, for work that is given to it from now on."""


class _Here:
    """A tensor that is on the host already."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def is_done(self) -> bool:
        return True

    def values(self) -> Tensor:
        return self._tensor


class Host:
    """The CPU: what it was told to do is done when the call returns."""

    clock, runs_ahead = HOST_CLOCK, False

    def mark(self) -> float:
        return time.perf_counter()

    def is_done(self, mark: float) -> bool:
        return True

    def seconds(self, mark: float) -> float:
        return mark

    def to_host(self, tensor: Tensor) -> Copy:
        return _Here(tensor.detach().cpu())

    def to_device(self, tensor: Tensor) -> Tensor:
        return tensor


class _Pinned:
    """A copy into pinned memory, done with an event."""

    def __init__(self, tensor: Tensor) -> None:
        self._values = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._values.copy_(tensor.detach(), non_blocking=True)
        self._done = torch.cuda.Event()
        self._done.record(torch.cuda.current_stream(tensor.device))  # the process may have chosen another device since

    def is_done(self) -> bool:
        return self._done.query()

    def values(self) -> Tensor:
        return self._values


class Cuda:
    """A GPU: marks are events on the current stream. It is waited for once, when this is made."""

    clock, runs_ahead = DEVICE_CLOCK, True

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._reference = self.mark()
        self._reference.synchronize()
        self._reference_seconds = time.perf_counter()

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def is_done(self, mark: torch.cuda.Event) -> bool:
        return mark.query()

    def seconds(self, mark: torch.cuda.Event) -> float:
        since = self._reference.elapsed_time(mark) / 1e3
        seconds = self._reference_seconds + since
        if since > REFERENCE_SECONDS:
            self._reference, self._reference_seconds = mark, seconds
        return seconds

    def to_host(self, tensor: Tensor) -> Copy:
        return _Pinned(tensor)

    def to_device(self, tensor: Tensor) -> Tensor:
        if tensor.device.type != "cpu":
            return tensor.to(self._device)
        # PyTorch keeps pinned memory that it lets go of until the copies out of it are done.
        return tensor.pin_memory().to(self._device, non_blocking=True)


def device_of(device: torch.device) -> Device:
    """How to work with ``device``."""
    return Cuda(device) if device.type == "cuda" else Host()


def placed(value: Any, place: Callable[[Tensor], Tensor]) -> Any:
    """``value``, a tensor or tuples and lists of tensors, with ``place`` done to each; whatever else as it is."""
    if isinstance(value, Tensor):
        return place(value)
    return type(value)(placed(part, place) for part in value) if type(value) in (tuple, list) else value
