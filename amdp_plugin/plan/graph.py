"""The actions of a program by number, and what each waits for: looked up once, for all that follow their order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate

from .action import Action
from .schedule import Place, Schedule

ABSENT = -1
"""What is waited for, and not in the program."""


class Graph:
    """Of the rows of all ranks, numbered rank by rank, in their order.

    Args:
        schedule: whose dependencies hold.
        rows: what every rank does.
        is_part: whether what is not in the rows was done before, so that nothing waits for it.
    """

    def __init__(self, schedule: Schedule, rows: Sequence[Sequence[Action]], is_part: bool = False) -> None:
        self.schedule, self._is_part = schedule, is_part
        self.places: list[Place] = [(rank, action) for rank, row in enumerate(rows) for action in row]
        self.number = {place: number for number, place in enumerate(self.places)}
        ends = list(accumulate(map(len, rows)))
        self.numbers = [range(end - len(row), end) for row, end in zip(rows, ends, strict=True)]
        """Of every rank."""
        self.needs = [self._needs(number) for number in range(len(self.places))]
        """What every action waits for, but for what its rank has done before."""

    def meeting(self, number: int) -> list[int]:
        """What enters the meeting of that action, itself included; empty when it is none of a meeting."""
        return self._numbers(self.schedule.meeting(*self.places[number]))

    def _needs(self, number: int) -> list[int]:
        place = self.places[number]
        first = self.numbers[place[0]].start
        needs = self._numbers(self.schedule.dependencies(*place))
        return [other for other in needs if not first <= other < number]

    def _numbers(self, places: Iterable[Place]) -> list[int]:
        found = [self.number.get(place, ABSENT) for place in places]
        return [number for number in found if number != ABSENT] if self._is_part else found
