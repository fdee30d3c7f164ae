"""A device that is as late as it can be: it does nothing until its host waits for it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from amdp_plugin.runtime.device import DEVICE_CLOCK
from amdp_plugin.runtime.watch import InStream, Waitable, Watch


class LateCopy:
    """There when the device has come so far. The values have been taken already: no job changes them meanwhile."""

    def __init__(self, device: LateDevice, tensor: Tensor) -> None:
        with torch._C.DisableTorchFunction():
            self._values = tensor.detach().clone()
        self._device, self._mark = device, device.mark()

    def is_done(self) -> bool:
        return self._device.is_done(self._mark)

    def values(self) -> Tensor:
        assert self.is_done(), "read before it is there"
        return self._values


class LateDevice:
    """Work is numbered as it is given; ``done`` says how far the device is, one further for every pause of its host."""

    clock, runs_ahead = DEVICE_CLOCK, True

    def __init__(self) -> None:
        self.given = self.done = 0

    def mark(self) -> int:
        self.given += 1
        return self.given

    def is_done(self, mark: int) -> bool:
        return mark <= self.done

    def seconds(self, mark: int) -> float:
        assert mark <= self.done, "CUDA refuses the time of an event that is not done"
        return float(mark)

    def to_host(self, tensor: Tensor) -> LateCopy:
        return LateCopy(self, tensor)

    def to_device(self, tensor: Tensor) -> Tensor:
        return tensor

    def go_on(self, seconds: float) -> None:
        self.done = min(self.given, self.done + 1)

    @contextmanager
    def pausing(self) -> Iterator[None]:
        """Within it a host that pauses lets this device go on."""
        now = SimpleNamespace(monotonic=time.monotonic, sleep=self.go_on)
        with patch("amdp_plugin.runtime.watch.time", now):
            yield

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Pipelines that are made and run within it wait for this device where they would wait for a real one, and
        tensors come to it."""
        device, waited = self, Watch.wait

        class Message(InStream):
            def __init__(self, watch: Watch, work: Any) -> None:
                super().__init__(work)
                self._watch = watch

            def wait(self, timeout: timedelta) -> bool:
                # A host that goes on finds the device through with all that does not need the message.
                device.done = device.given
                self._watch.keep_pace(0)
                return bool(self._work.wait(timeout))

            def is_over(self) -> bool:
                return False

            def check(self) -> None:
                pass

        def wait(watch: Watch, work: Waitable, what: str, *others: Any, **named: Any) -> None:
            of_device = what in ("receiving", "sending")
            waited(watch, Message(watch, work) if of_device else work, what, *others, **named)

        with (
            self.pausing(),
            patch("amdp_plugin.runtime.pipeline.device_of", lambda _: self),
            patch.object(Watch, "wait", wait),
        ):
            yield


@contextmanager
def counting_waits(count: Any) -> Iterator[None]:
    """Call ``count`` whenever a host stops until it has values of its device."""
    waited = Watch._await

    def noting(watch: Watch, copy: Any, what: str) -> None:
        if not copy.is_done():
            count()
        waited(watch, copy, what)

    with patch.object(Watch, "_await", noting):
        yield
