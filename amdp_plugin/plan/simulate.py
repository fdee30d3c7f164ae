"""When things happen: the times of a program's actions under a cost model."""

from __future__ import annotations

from collections.abc import Iterable

from .action import BACKWARD, FORWARD, KINDS, Action
from .costs import CostModel
from .planner import Planner
from .play import play
from .program import Program
from .schedule import Place
from .timing import Span, Timing


def simulate(program: Program, costs: CostModel, order: Iterable[Place] | None = None) -> Timing:
    """The earliest times at which ``program``'s actions can run, every rank keeping to its row.

    An update of a meeting begins one message after the last rank has entered; what went before was waiting.
    ``order`` is what :func:`.verify` returns, where it is known.
    """
    schedule, link = program.schedule, costs.link_ticks()
    finish: dict[Place, int] = {}
    spans: list[list[Span]] = [[] for _ in program.rows]
    free_at = [0 for _ in program.rows]
    met: dict[int, int] = {}

    stages = range(costs.num_stages)
    work_of = {kind: [costs.action_ticks(Action(stage, kind, 0)) for stage in stages] for kind in KINDS}

    def ready(rank: int, action: Action) -> int:
        time = free_at[rank]
        for place in schedule.dependencies(rank, action):
            arrival = finish[place] + (link if place[0] != rank else 0)
            if arrival > time:
                time = arrival
        return time

    for rank, action in order or play(program):
        start = ready(rank, action)
        if meeting := schedule.meeting(rank, action):
            # Here the first of them to go on finds the others where they wait.
            window = action.index
            if window not in met:
                met[window] = max(ready(*place) for place in meeting) + costs.meeting_ticks(schedule.num_ranks)
            start = max(start, met[window])
        work = work_of[action.kind][action.stage] if schedule.computes(rank, action) else 0
        free_at[rank] = finish[rank, action] = start + work
        spans[rank].append((start, free_at[rank]))
    return Timing(program, costs, tuple(tuple(row) for row in spans))


def steady_state(planner: Planner, costs: CostModel | None = None) -> tuple[float, float]:
    """(utilization, seconds per window) of the schedule once it repeats, under its own costs or others."""
    first, last = planner.steady_windows()
    settle = last - first if costs is None else max(last - first, 2 * planner.schedule.num_stages)
    timing = simulate(planner.program(last + settle), costs or planner.costs)
    return timing.utilization(first + settle, last + settle), timing.seconds_per_window(first + settle, last + settle)


def in_flight(program: Program, rank: int) -> list[int]:
    """Micro-batches forwarded and not yet backwarded on ``rank``, over its stages, after each of its actions."""
    count, counts = 0, []
    for action in program.rows[rank]:
        count += _IN_FLIGHT.get(action.kind, 0)
        counts.append(count)
    return counts


_IN_FLIGHT = {FORWARD: 1, BACKWARD: -1}
