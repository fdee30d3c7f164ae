"""Step through a program in an order that its dependencies allow."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import chain

from .action import Action
from .program import Program
from .schedule import Place


class Stuck(Exception):
    """No rank can go on. ``blocked[rank]`` is (position in the row, action there, what it waits for)."""

    def __init__(self, blocked: dict[int, tuple[int, Action, Place]]) -> None:
        super().__init__(f"{len(blocked)} ranks wait for ever")
        self.blocked = blocked


def play(
    program: Program, others: Callable[[int, Action], Iterable[Place]] = lambda rank, action: ()
) -> Iterator[Place]:
    """Yield every (rank, action) once, each rank's in its row's order, each after its dependencies.

    Args:
        others: what an action on a rank needs beside the dependencies of its schedule.

    Receives block, sends are buffered, and an update of a meeting comes after every rank has entered that.
    Raises :class:`Stuck` when that leads nowhere.
    """
    rows, schedule = program.rows, program.schedule
    position = [0] * len(rows)
    done: set[Place] = set()
    entered: set[tuple[int, int]] = set()
    waiting: dict[Place, list[int]] = {}
    meeting: dict[Place, list[int]] = {}
    """Ranks that wait for others to do an action, and to enter it."""
    blocked: dict[int, tuple[int, Action, Place]] = {}
    unseen: dict[int, Iterator[Place]] = {}
    """Of a rank that waits, what its action needs beside what was looked at."""
    runnable = deque(range(len(rows)))

    def not_done(rank: int, action: Action) -> Place | None:
        needs = unseen.pop(rank, None) or chain(schedule.dependencies(rank, action), others(rank, action))
        for place in needs:
            if place not in done:
                unseen[rank] = needs
                return place
        return None

    def not_entered(rank: int, action: Action) -> Place | None:
        met, window = schedule.meeting(rank, action), action.index
        if met and (rank, window) not in entered:
            entered.add((rank, window))
            for place in met:
                if place[0] == rank:
                    runnable.extend(meeting.pop(place, ()))
        return next((place for place in met if (place[0], window) not in entered), None)

    while runnable:
        rank = runnable.popleft()
        blocked.pop(rank, None)
        row = rows[rank]
        while position[rank] < len(row):
            action = row[position[rank]]
            missing, waits = not_done(rank, action), waiting
            if missing is None:
                missing, waits = not_entered(rank, action), meeting
            if missing is not None:
                waits.setdefault(missing, []).append(rank)
                blocked[rank] = (position[rank], action, missing)
                break
            yield rank, action
            position[rank] += 1
            done.add((rank, action))
            runnable.extend(waiting.pop((rank, action), ()))
    if blocked:
        raise Stuck(blocked)
