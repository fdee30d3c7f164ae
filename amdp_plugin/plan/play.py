"""Step through a program in an order that its dependencies allow."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain

from .action import Action
from .graph import ABSENT, Graph
from .schedule import Place

Others = Callable[[int, Action], Iterable[Place]]


class Stuck(Exception):
    """No rank can go on. ``blocked[rank]`` is (position in the row, action there, what it waits for)."""

    def __init__(self, blocked: dict[int, tuple[int, Action, Place]]) -> None:
        super().__init__(f"{len(blocked)} ranks wait for ever")
        self.blocked = blocked


def play(graph: Graph, others: Others = lambda rank, action: ()) -> Iterator[int]:
    """Yield the number of every action once, each rank's in its row's order, each after its dependencies.

    Args:
        others: what an action on a rank needs beside the dependencies of its schedule.

    Receives block, sends are buffered, and an update of a meeting comes after every rank has entered that.
    Raises :class:`Stuck` when that leads nowhere.
    """
    needs, number_of, together = graph.needs, graph.number, graph.schedule.together
    position = [numbers.start for numbers in graph.numbers]
    done, entered = bytearray(len(needs)), bytearray(len(needs))
    waiting: dict[int, list[int]] = {}
    meeting: dict[int, list[int]] = {}
    """Ranks that wait for others to do an action, and to enter it."""
    runnable = deque(range(len(position)))

    def not_done(number: int) -> int | None:
        more = [number_of.get(place, ABSENT) for place in others(*graph.places[number])]
        return next((need for need in chain(needs[number], more) if need == ABSENT or not done[need]), None)

    def not_entered(number: int) -> int | None:
        met = graph.meeting(number)
        if met and not entered[number]:
            for other in met:
                if other in graph.numbers[rank]:  # which enters with its first of them
                    entered[other] = True
                    runnable.extend(meeting.pop(other, ()))
        return next((other for other in met if other == ABSENT or not entered[other]), None)

    while runnable:
        rank = runnable.popleft()
        while position[rank] < graph.numbers[rank].stop:
            number = position[rank]
            missing, waits = not_done(number), waiting
            if missing is None and together:
                missing, waits = not_entered(number), meeting
            if missing is not None:
                waits.setdefault(missing, []).append(rank)
                break
            yield number
            position[rank] += 1
            done[number] = True
            runnable.extend(waiting.pop(number, ()))
    if not all(done):
        raise Stuck(dict(_blocked(graph, position, others, done, entered)))


def _blocked(
    graph: Graph, position: Sequence[int], others: Others, done: bytearray, entered: bytearray
) -> Iterator[tuple[int, tuple[int, Action, Place]]]:
    """(rank, what :class:`Stuck` says of it)."""
    schedule = graph.schedule
    for rank, numbers in enumerate(graph.numbers):
        if position[rank] in numbers:
            _, action = graph.places[position[rank]]
            needs = [(done, place) for place in chain(schedule.dependencies(rank, action), others(rank, action))]
            needs += [(entered, place) for place in schedule.meeting(rank, action)]
            missing = next(
                place for over, place in needs if place not in graph.number or not over[graph.number[place]]
            )
            yield rank, (position[rank] - numbers.start, action, missing)
