"""What stock Megatron does on a rank, as events named like ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..compare.recorder import KEPT_EVENTS
from ..plan.action import BACKWARD, FORWARD, UPDATE, Action
from ..runtime.device import device_of
from ..runtime.timeline import RUN, WAIT, Timeline

MESSAGES = {
    "recv_forward": (-1, 0, FORWARD),
    "recv_backward": (1, 0, BACKWARD),
    "send_forward": (1, 1, FORWARD),
    "send_backward": (-1, -1, BACKWARD),
    "send_forward_recv_backward": (1, 0, BACKWARD),
    "send_backward_recv_forward": (-1, 0, FORWARD),
}
"""For every method of Megatron's communicator that 1F1B calls: whom it talks to and whose action it waits for, counted
from this stage; and the action's kind. Of two messages at once it is the one that comes in."""


class StockTimeline:
    """Events of stock 1F1B, within :meth:`recording` and up to :meth:`end_update`.

    Args:
        stage: of this rank.
        stages: of the pipeline.

    Attributes:
        timeline: the events.
        peak_in_flight: the most micro-batches that were forwarded and not yet backwarded.
        is_recording: whether what Megatron calls is to be recorded.
    """

    def __init__(self, stage: int, stages: int) -> None:
        self.timeline = Timeline(KEPT_EVENTS, device_of(torch.device("cuda" if torch.cuda.is_initialized() else "cpu")))
        self.peak_in_flight = 0
        self.is_recording = False
        self._stage, self._stages = stage, stages
        self._counts = dict.fromkeys((FORWARD, BACKWARD, UPDATE), 0)

    def compute(self, kind: str, function: Callable[[], Any]) -> Any:
        """One forward or backward."""
        with self.timeline.span(self._name(kind)):
            result = function()
        self._counts[kind] += 1
        self.peak_in_flight = max(self.peak_in_flight, self._counts[FORWARD] - self._counts[BACKWARD])
        return result

    def communicate(self, method: str, function: Callable[[], Any]) -> Any:
        """One call of Megatron's communicator; at the ends of the pipeline some do nothing."""
        neighbour, shift, kind = MESSAGES[method]
        if not 0 <= self._stage + neighbour < self._stages:
            return function()
        sent = self._counts[kind] - (1 if shift else 0)
        with self.timeline.span(str(Action(self._stage + shift, kind, sent)), WAIT):
            return function()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """One call of the schedule."""
        self.is_recording = True
        try:
            yield
        finally:
            self.is_recording = False

    def end_update(self) -> None:
        """The optimizer has stepped. Everything since the latest event belongs to it: reductions too, as with ours."""
        with self.timeline.span(self._name(UPDATE), RUN, self.timeline.latest_end):
            pass
        self._counts[UPDATE] += 1

    def _name(self, kind: str) -> str:
        return str(Action(self._stage, kind, self._counts[kind]))
