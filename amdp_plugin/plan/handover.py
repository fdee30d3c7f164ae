"""A planned program as bytes: one rank of a pipeline plans, the others receive what it found."""

from __future__ import annotations

import json
import sys
from array import array

from .action import KINDS, Action
from .collection import uncollected
from .costs import CostModel
from .list_scheduler import Window
from .planner import Choice, Planner
from .schedule import Schedule

NUMBERS_OF_ACTION = 3
"""Four bytes each, little-endian: the stage, the place of the kind in ``KINDS``, the micro-batch or window."""


@uncollected()
def written(planner: Planner) -> bytes:
    """What ``planner`` chose, and its windows up to the end of those that repeat, or all that it looked at."""
    _, end = planner.steady_windows()
    windows = [planner.window(index) for index in range(end)]
    lengths = [[len(row) for row in window] for window in windows]
    head = json.dumps({"choice": planner.choice, "period": planner.period, "lengths": lengths})
    numbers = array(
        "i",
        [
            number
            for window in windows
            for row in window
            for stage, kind, index in row
            for number in (stage, KINDS.index(kind), index)
        ],
    )
    if sys.byteorder == "big":
        numbers.byteswap()
    return head.encode() + b"\n" + numbers.tobytes()


def read(text: bytes, schedule: Schedule, costs: CostModel) -> Planner:
    """The planner of the program that :func:`written` wrote for this ``schedule`` and these ``costs``.

    A program that repeats is taken as it is. Where no repetition was seen, only the choice is: the planner goes on
    by itself beyond the windows of ``text``, and so makes these, too.
    """
    first, _, rows = text.partition(b"\n")
    head = json.loads(first)
    choice = Choice(*head["choice"])
    if head["period"] is None:
        return Planner(schedule, costs, choice)
    numbers = array("i")
    numbers.frombytes(rows)
    if sys.byteorder == "big":
        numbers.byteswap()
    return Planner.from_windows(schedule, costs, choice, _windows(head["lengths"], numbers), head["period"])


def _windows(lengths: list[list[int]], numbers: array[int]) -> list[Window]:
    stages, kinds, indices = (numbers[start::NUMBERS_OF_ACTION] for start in range(NUMBERS_OF_ACTION))
    actions = map(Action, stages, map(KINDS.__getitem__, kinds), indices)
    return [tuple(tuple(next(actions) for _ in range(length)) for length in window) for window in lengths]
