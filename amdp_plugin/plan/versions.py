"""Which weights every forward and backward sees."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from .action import BACKWARD, FORWARD, UPDATE
from .program import Program


class Version(NamedTuple):
    """The weights that one micro-batch met on one stage, counted in updates.

    ``applied`` is the version to which its gradient is applied.
    """

    forward: int
    backward: int
    applied: int

    @property
    def gap(self) -> int:
        """(version at backward) - (version at forward)."""
        return self.backward - self.forward

    @property
    def staleness(self) -> int:
        """(version to which the gradient is applied) - (version at forward)."""
        return self.applied - self.forward


def versions(program: Program) -> Mapping[tuple[int, int], Version]:
    """The :class:`Version` of every (stage, micro-batch) that ``program`` forwards and backwards."""
    found: dict[tuple[int, int], Version] = {}
    entered = entries(program)
    schedule, size = program.schedule, program.schedule.micro_batches
    for row in program.rows:
        updates: dict[int, int] = {}
        at_forward: dict[tuple[int, int], int] = {}
        for stage, kind, index in row:
            if kind == UPDATE:
                updates[stage] = updates.get(stage, 0) + 1
            elif kind == FORWARD:
                had = updates.get(stage, 0)
                at_forward[stage, index] = schedule.forward_version(index // size, had, entered.get(index, 0))
            elif kind == BACKWARD and (stage, index) in at_forward:
                forward = at_forward[stage, index]
                backward = schedule.backward_version(forward, updates.get(stage, 0))
                found[stage, index] = Version(forward, backward, index // size)
    return found


def entries(program: Program) -> Mapping[int, int]:
    """The version that every micro-batch meets on stage 0."""
    found: dict[int, int] = {}
    for row in program.rows:
        updates = 0
        for stage, kind, index in row:
            if stage == 0 and kind == UPDATE:
                updates += 1
            elif stage == 0 and kind == FORWARD:
                found[index] = updates
    return found
