"""Sums over all stages without a collective: each stage tells its own to those that use it, in small messages."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf, isfinite
from typing import Any, Protocol

from torch import Tensor

from ..plan.action import UPDATE, Action
from ..plan.decisions import WindowsAgo, sums_of
from ..plan.schedule import Schedule
from .channels import Channels
from .watch import Watch

logger = logging.getLogger(__name__)


class Answers(Protocol):
    """What an update is told of all stages."""

    def whole(self, own: Tensor) -> None:
        """Make a stage's own sum, of one element, that of all stages, in place."""

    def broken(self, own: Tensor) -> None:
        """Make a stage's own flag, of one element, say whether the gradient of any stage is broken, in place; where
        decisions are not relayed it stays the stage's own."""


class Decisions:
    """The sums that the updates of one rank's own stage take and give, where a schedule's decisions travel.

    Where they are relayed, a stage tells its sum when its window has closed, :meth:`tell`; else when its update asks
    for that of all.

    Args:
        schedule: what is run.
        ago: of its program, from :func:`.plan.decisions.windows_ago`.
        opening: of that of the first windows, where it is another.
        stage: the stage that is at home on this rank.
        channels: small messages.
        watch: what is being done and waited for.
    """

    def __init__(
        self,
        schedule: Schedule,
        ago: WindowsAgo,
        opening: WindowsAgo | None,
        stage: int,
        channels: Channels,
        watch: Watch,
    ) -> None:
        self._schedule, self._stage, self._channels, self._watch = schedule, stage, channels, watch
        self.relayed = schedule.relays
        self._main, self._opening = ago, opening
        self.begin(0)

    def begin(self, window: int) -> None:
        """Nothing is in flight: a program begins with ``window``, and nobody knows anything of another stage."""
        self._ago, self._base, self._end = self._main, window, inf
        if self._opening is not None and window < self._schedule.flush_first:
            self._ago, self._end = self._opening, self._schedule.flush_first
        self._told: dict[int, float] = {}

    def tell(self, update: Action, own: Tensor | float) -> None:
        """Tell this stage's sum for the window of ``update``, of one element, to those that use it."""
        value = self._watch.fetch(own, "a sum of gradients").item() if isinstance(own, Tensor) else own
        self._told[update.index] = value
        if not isfinite(value):
            logger.warning(
                f"the gradient of stage {update.stage} for window {update.index} is not finite (a sum of squares of "
                f"{value}): other stages skip an update with it"
            )
        for stage, row in enumerate(self._ago):
            if stage != self._stage and update.index + row[self._stage] < self._end:
                self._channels.send_sum(self._home(stage), value, update)

    @contextmanager
    def update(self, action: Action) -> Iterator[Answers]:
        """Around an update. Where its host does not ask for the sum, since it has found its own gradient broken, the
        others are told: their sums are infinite then, too."""
        answers = _Answers(self, action)
        yield answers
        answers.end()

    def sum_up(self, action: Action) -> float:
        """The sum over all stages, in their order, of which something is known."""
        sums = {self._stage: self._told.pop(action.index)}
        for other, _ in self._taken(action):
            sums[other] = self._channels.receive_sum(self._home(other), action)
        return sum(sums[stage] for stage in sorted(sums))

    def drain(self, window: int) -> None:
        """Receive and drop what has been sent for updates of ``window`` and later ones, none of which has begun."""
        for later in range(window, window + 1 + max(self._ago[self._stage])):
            for other, known in self._taken(Action(self._stage, UPDATE, later)):
                if known < window:
                    self._channels.receive_sum(self._home(other), None)

    def _taken(self, action: Action) -> Iterator[tuple[int, int]]:
        """(other stage, window) of the sums that an update takes."""
        for other, known in sums_of(self._ago, action):
            if known >= self._base and action.index < self._end:
                yield other, known

    def _home(self, stage: int) -> int:
        return self._schedule.placement.home(stage)


class _Answers:
    """Of one update: asks the other stages when it is asked first."""

    def __init__(self, decisions: Decisions, action: Action) -> None:
        self._decisions, self._action = decisions, action
        self._total: float | None = None

    def whole(self, own: Tensor) -> None:
        own.fill_(self._sum(own))

    def broken(self, own: Tensor) -> None:
        if self._decisions.relayed:
            own.fill_(0 if isfinite(self._sum(own)) else 1)

    def end(self) -> None:
        self._sum(inf)

    def _sum(self, own: Tensor | float) -> float:
        """Over all stages; ``own`` is told first, where that has not been done."""
        if self._total is None:
            if not self._decisions.relayed:
                self._decisions.tell(self._action, own)
            self._total = self._decisions.sum_up(self._action)
        return self._total


@contextmanager
def answering(
    owner: Any,
    group: Any,
    operations: tuple[Any, Any],
    whole: Callable[[Tensor], None],
    broken: Callable[[Tensor], None],
) -> Iterator[None]:
    """Within it ``whole`` gets the result of the first sum over ``group``, which a host makes of a stage's own, and
    ``broken`` that of every maximum.

    Args:
        owner: where the host looks up ``all_reduce``.
        operations: of a sum and of a maximum, as the host names them.
    """
    all_reduce, summed = owner.all_reduce, False
    total, most = operations

    def hearing(tensor: Tensor, op: Any = total, group_: Any = None, *others: Any, **named: Any) -> Any:
        nonlocal summed
        over = named.pop("group", group_)
        result = all_reduce(tensor, op, over, *others, **named)
        if over is group and op == total and not summed:
            summed = True
            whole(tensor)
        elif over is group and op == most:
            broken(tensor)
        return result

    owner.all_reduce = hearing
    try:
        yield
    finally:
        owner.all_reduce = all_reduce
