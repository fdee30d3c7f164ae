"""What a rank did and what it waited for: host times of the latest actions, and totals of all."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from torch.profiler import record_function

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
    """Records the spans of one rank. The latest ``keep`` events stay; totals count them all."""

    def __init__(self, keep: int = 4096) -> None:
        self.events: deque[Event] = deque(maxlen=keep)
        self.totals = Totals()

    def keep(self, events: int) -> None:
        """Keep the latest ``events`` from now on."""
        self.events = deque(self.events, maxlen=events)

    @contextmanager
    def span(self, name: str, phase: str = RUN, start: float | None = None) -> Iterator[None]:
        """Record the enclosed block, here and under the same name in a ``torch.profiler`` trace.

        Args:
            start: when it began, where that was before the block.
        """
        start = time.perf_counter() if start is None else start
        try:
            with record_function(name if phase == RUN else f"{phase} {name}"):
                yield
        finally:
            end = time.perf_counter()
            self.events.append(Event(name, phase, start, end))
            if phase == RUN:
                self.totals.run += end - start
            else:
                self.totals.wait += end - start
