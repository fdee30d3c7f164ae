"""When stages wait for each other within an update: for the norm of all gradients, an overflow, a tied weight."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from ..compare.recorder import KEPT_EVENTS, timed
from ..plan.action import UPDATE, Action
from ..runtime.timeline import RUN, WAIT, Event


class Meetings:
    """Sums over several stages, which Megatron makes in the middle of an update.

    Args:
        others: global ranks of the pipeline's other stages.
    """

    def __init__(self, others: Iterable[int]) -> None:
        self._others = frozenset(others)
        self._spans: deque[tuple[float, float]] = deque(maxlen=KEPT_EVENTS)

    @contextmanager
    def seen(self) -> Iterator[None]:
        """Within it they are recorded."""
        all_reduce = dist.all_reduce

        def recorded(tensor: Any, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False) -> Any:
            if self._others.isdisjoint(dist.get_process_group_ranks(group)):
                return all_reduce(tensor, op, group, async_op)
            result, span = timed(lambda: all_reduce(tensor, op, group, async_op))
            self._spans.append(span)
            return result

        dist.all_reduce = recorded  # Megatron looks it up there
        try:
            yield
        finally:
            dist.all_reduce = all_reduce

    def cut_out(self, events: Iterable[Event]) -> Iterator[Event]:
        """``events``, in order of time, with updates in pieces: what is run, and the waits between."""
        spans = deque(self._spans)
        for event in events:
            is_update = event.phase == RUN and Action.parse(event.name).kind == UPDATE
            while spans and spans[0][1] <= event.end:
                start, end = spans.popleft()
                if is_update and event.start <= start:
                    yield event._replace(end=start)
                    yield event._replace(phase=WAIT, start=start, end=end)
                    event = event._replace(start=end)
            yield event
