"""Stages and tied weights on the ranks that hold them, in the list scheduler: how far their windows have come."""

from __future__ import annotations

from collections.abc import Callable
from math import inf

from .action import REDUCE, UPDATE, Action
from .schedule import Schedule


class _Stepped:
    """What is reduced, if several ranks hold it, and updated once a window."""

    reduces: bool

    def __init__(self) -> None:
        self.reductions = self.updates = 0
        self.most_reductions = self.most_updates = inf

    @property
    def has_had_portion(self) -> bool:
        """Whether no more may be done with it."""
        return self.reductions >= self.most_reductions and self.updates >= self.most_updates

    def portion(self) -> None:
        """Let it be reduced and updated no more than once from now on."""
        self.most_reductions, self.most_updates = self.reductions + self.reduces, self.updates + 1

    def may(self, action: Action) -> bool:
        """Whether that is within its portion."""
        return self.reductions < self.most_reductions if action.kind == REDUCE else self.updates < self.most_updates


class Holding(_Stepped):
    """A stage on one of the ranks that hold it: how far its windows have come."""

    def __init__(self, schedule: Schedule, rank: int, stage: int) -> None:
        super().__init__()
        self.rank, self.stage = rank, stage
        self.home, *self.guests = schedule.placement.holders[stage]
        self.reduces = bool(self.guests)
        self.per_window = schedule.backwards_per_window(rank, stage)
        self.delay = schedule.update_delay[stage]
        self.late = schedule.windows_late(rank, stage)
        self.backwards = 0
        self.tied: list[TiedHolding] = []
        """The tied weights that it computes with."""

    @property
    def completed(self) -> int:
        """Windows of which it has run all backwards."""
        return self.backwards // self.per_window

    @property
    def next(self) -> Action:
        """The reduction or update that is next."""
        kind = REDUCE if self.guests and self.reductions == self.updates else UPDATE
        return Action(self.stage, kind, self.updates)

    @property
    def gathered(self) -> int:
        """On a home, windows whose whole gradient it has."""
        own = self.reductions if self.guests else self.completed
        return min([own, *(each.reductions for each in self.tied if each.home == self.rank)])

    @property
    def applied(self) -> int:
        """Updates that all has had that it computes with."""
        return min([self.updates, *(each.updates for each in self.tied)]) if self.tied else self.updates

    def closes(self, window: int) -> bool:
        """Whether nothing is left to do in the windows before ``window``."""
        return self.backwards >= window * self.per_window and self.updates >= window - self.late

    def state(self, window: int) -> tuple[int, ...]:
        reductions = self.reductions - window if self.guests else 0
        return self.backwards - window * self.per_window, reductions, self.updates - window


class TiedHolding(_Stepped):
    """Goes with the :class:`Holding` of its stage on the rank, whose backwards are its own.

    A guest sends the sum of a window and goes on to the next, whatever has become of the one before, so that several
    windows may be under way; its home adds, is stepped with its stage, and sends the new value.

    Args:
        unit: its number, see :mod:`.sharing`.
        carrier: the stage.
    """

    reduces = True

    def __init__(self, schedule: Schedule, unit: int, carrier: Holding) -> None:
        super().__init__()
        self.rank, self.stage, self._carrier = carrier.rank, unit, carrier
        self.home, *self.guests = schedule.sharing.holders[unit]
        self.late = schedule.windows_late(self.rank, unit)
        carrier.tied.append(self)

    @property
    def completed(self) -> int:
        """Windows of which all backwards are done here."""
        return self._carrier.completed

    @property
    def next(self) -> Action:
        """The reduction or update that is next."""
        if self.completed > self.reductions:
            return Action(self.stage, REDUCE, self.reductions)
        return Action(self.stage, UPDATE, self.updates)

    def is_due(self, has_come: Callable[[int], bool]) -> bool:
        """Whether the next one may start.

        Args:
            has_come: whether it has come from that rank.
        """
        if self.rank != self.home:
            return self.next.kind == REDUCE or has_come(self.home)
        if self.next.kind == REDUCE:
            return all(map(has_come, self.guests))
        return self._carrier.updates > self.updates

    def closes(self, window: int) -> bool:
        """Whether nothing is left to do here in the windows before ``window``: the home needs a window's sum in its own
        like window, and the guest has the new value a bounded number of windows later."""
        return self.reductions >= window and self.updates >= window - self.late

    def state(self, window: int) -> tuple[int, ...]:
        return self.reductions - window, self.updates - window
