"""A stage of one direction in the list scheduler, as its micro-batches pass through it."""

from __future__ import annotations

from collections import deque
from math import inf
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .holding import Holding

Message = tuple[int, int]
"""(nanosecond of its arrival, window in which its sender sent it: the receiver uses it in no earlier one)"""


class Lane:
    """One direction's stage on its rank: its micro-batches so far, and the messages that wait or are under way."""

    def __init__(self, direction: int, holding: Holding, in_flight: int) -> None:
        self.direction, self.holding, self.stage, self.in_flight = direction, holding, holding.stage, in_flight
        self.forwards = self.backwards = 0
        self.most_forwards = self.most_backwards = inf
        self.freed_at = 0
        """On a first stage, when its latest backward made room for a forward (nanoseconds)."""
        self.forward_arrivals: deque[Message] = deque()
        self.backward_arrivals: deque[Message] = deque()

    @property
    def has_had_portion(self) -> bool:
        """Whether no more may pass."""
        return self.forwards >= self.most_forwards and self.backwards >= self.most_backwards

    def portion(self, micro_batches: int) -> None:
        """Let no more than ``micro_batches`` of them pass from now on, either way."""
        self.most_forwards, self.most_backwards = self.forwards + micro_batches, self.backwards + micro_batches

    def state(self, window: int, done: int, now: int) -> tuple[object, ...]:
        waiting = (self.forward_arrivals, self.backward_arrivals)
        messages = (tuple((time - now, sent - window) for time, sent in arrivals) for arrivals in waiting)
        return self.forwards - done, self.backwards - done, self.freed_at and self.freed_at - now, *messages
