"""A stage on one of the ranks that hold it, in the list scheduler."""

from __future__ import annotations

from .action import REDUCE, UPDATE, Action
from .schedule import Schedule
from .tied_holding import TiedHolding


class Holding:
    """A stage on one of the ranks that hold it: how far its windows have come."""

    def __init__(self, schedule: Schedule, rank: int, stage: int) -> None:
        self.rank, self.stage = rank, stage
        self.home, *self.guests = schedule.placement.holders[stage]
        self.per_window = schedule.backwards_per_window(rank, stage)
        self.delay = schedule.update_delay[stage]
        self.late = schedule.windows_late(rank, stage)
        self.backwards = self.reductions = self.updates = 0
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
        return min([self.updates, *(each.updates for each in self.tied)])

    def closes(self, window: int) -> bool:
        """Whether nothing is left to do in the windows before ``window``."""
        return self.backwards >= window * self.per_window and self.updates >= window - self.late

    def state(self, window: int) -> tuple[int, ...]:
        reductions = self.reductions - window if self.guests else 0
        return self.backwards - window * self.per_window, reductions, self.updates - window
