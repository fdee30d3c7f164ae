"""What a rank did and what it waited for: times of the latest actions, and totals of all."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from torch.profiler import record_function

from .device import Device, Host, Mark

RUN, WAIT = "run", "wait"


class Event(NamedTuple):
    """``name`` from ``start`` to ``end``: seconds of the machine's monotonic clock, common to its processes."""

    name: str
    phase: str
    start: float
    end: float


@dataclass
class Totals:
    """Seconds since the job's start."""

    run: float = 0.0
    wait: float = 0.0


class Timeline:
    """Records the spans of one rank. The latest ``keep`` events stay; totals count them all.

    A span becomes an event when the device is through with it, and whoever records the next one looks: the device
    is never waited for, and the latest spans may still be missing.

    Args:
        device: whose times are taken.

    Attributes:
        latest_end: the instant at which the latest span ended.
    """

    def __init__(self, keep: int = 4096, device: Device | None = None) -> None:
        self.device = device or Host()
        self.events: deque[Event] = deque(maxlen=keep)
        self.totals = Totals()
        self.latest_end: Mark = None
        self._open: list[tuple[str, str, Mark]] = []
        self._under_way: deque[tuple[str, str, Mark, Mark]] = deque()

    def keep(self, events: int) -> None:
        """Keep the latest ``events`` from now on."""
        self.events = deque(self.events, maxlen=events)

    @contextmanager
    def span(self, name: str, phase: str = RUN, start: Mark | None = None) -> Iterator[None]:
        """Record the enclosed block, here and under the same name in a ``torch.profiler`` trace. One within another
        cuts that in pieces, which keep its name.

        Args:
            start: when it began, where that was before the block.
        """
        self._open.append((name, phase, self.device.mark() if start is None else start))
        try:
            with record_function(name if phase == RUN else f"{phase} {name}"):
                yield
        finally:
            *_, begun = ended = self._open.pop()
            self.latest_end = self.device.mark()
            if self._open:
                around, around_phase, since = self._open[-1]
                self._under_way.append((around, around_phase, since, begun))
                self._open[-1] = around, around_phase, self.latest_end
            self._under_way.append((*ended, self.latest_end))
            self.settle()

    def settle(self) -> None:
        """Take the times of all spans that the device is through with."""
        while self._under_way and self.device.is_done(self._under_way[0][3]):
            name, phase, *marks = self._under_way.popleft()
            start, end = map(self.device.seconds, marks)
            self.events.append(Event(name, phase, start, end))
            if phase == RUN:
                self.totals.run += end - start
            else:
                self.totals.wait += end - start
