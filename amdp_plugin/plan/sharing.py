"""Who holds what: the stages, and the weights that several stages share, each of which is a unit of its own.

Unit ``s`` below the number of stages is stage ``s``; the units after them are the tied weights. A tied weight has its
home on the first of the stages that share it, where it is stepped with that stage; on the others it is a guest, whose
sum of gradients goes home (R) as soon as a window closes, and takes each new value (U) as soon as that has come.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise

from .placement import Placement

Tied = tuple[tuple[int, ...], ...]
"""For every weight that stages share, those stages, ascending."""


class Sharing:
    """The units of a schedule.

    Args:
        placement: which rank holds which stage.
        tied: the weights that stages share.
    """

    def __init__(self, placement: Placement, tied: Tied) -> None:
        self._placement, self._tied, self.num_stages = placement, tied, placement.num_stages

    def check(self, name: str, weights: str, together: bool) -> None:
        """Refuse tied weights that no program can be made for.

        Args:
            name: of the schedule, for messages.
            weights: which it uses.
            together: whether its updates are one meeting.

        Raises:
            ValueError: with what to do instead.
        """
        for stages in self._tied:
            known = len(stages) > 1 and stages[0] >= 0 and stages[-1] < self.num_stages
            if not known or any(one >= other for one, other in pairwise(stages)):
                raise ValueError(
                    f"{name}: a tied weight needs two or more of the {self.num_stages} stages, ascending; got {stages}"
                )
        if not self._tied:
            return
        meets = 'use a schedule whose updates meet (amdp with "decisions": "meeting", or 1f1b), or untie them'
        if together:
            raise ValueError(
                f"{name}: its updates meet, and there the host sums the gradients of tied weights: they are no units "
                "of the plan, so leave them out"
            )
        if self._placement.directions > 1:
            raise ValueError(
                f"{name}: tied weights are units of the plan where stages update one by one, in one direction, not in "
                f"{self._placement.directions}; {meets}"
            )
        if weights != "latest":
            raise ValueError(
                f"{name}: tied weights have one version, the latest, and its stages use {weights} weights; {meets}"
            )
        for stages in self._tied:
            ranks = [self._placement.home(stage) for stage in stages]
            if len(set(ranks)) < len(ranks):
                raise ValueError(
                    f"{name}: stages that share a weight must be on ranks of their own, {stages} are on {ranks}"
                )

    @cached_property
    def holders(self) -> Sequence[tuple[int, ...]]:
        """For every unit, the ranks that hold it, home first."""
        home = self._placement.home
        return *self._placement.holders, *(tuple(home(stage) for stage in stages) for stages in self._tied)

    @cached_property
    def units(self) -> Sequence[tuple[int, ...]]:
        """For every rank, what it holds, ascending."""
        return tuple(
            tuple(unit for unit, ranks in enumerate(self.holders) if rank in ranks)
            for rank in range(self._placement.num_ranks)
        )

    @cached_property
    def of_stage(self) -> Sequence[tuple[int, ...]]:
        """For every stage, the tied weights that it shares."""
        return tuple(
            tuple(unit for unit, stages in enumerate(self._tied, start=self.num_stages) if stage in stages)
            for stage in range(self.num_stages)
        )

    def is_tied(self, unit: int) -> bool:
        """Whether it is a tied weight, and no stage."""
        return unit >= self.num_stages

    def called(self, unit: int) -> str:
        """Its name for readers."""
        return f"tied weight {unit}" if self.is_tied(unit) else f"stage {unit}"

    def stages(self, unit: int) -> tuple[int, ...]:
        """Those that share the tied weight ``unit``, that of its home first."""
        return self._tied[unit - self.num_stages]

    def stage_on(self, rank: int, unit: int) -> int:
        """The stage on ``rank`` that computes with ``unit``."""
        return self.stages(unit)[self.holders[unit].index(rank)] if self.is_tied(unit) else unit

    def at_home(self, stage: int) -> tuple[int, ...]:
        """The tied weights that are stepped with ``stage``."""
        return tuple(unit for unit in self.of_stage[stage] if self.stages(unit)[0] == stage)
