"""When things happen: the times of a program's actions under a cost model."""

from __future__ import annotations

from collections.abc import Sequence

from .action import BACKWARD, FORWARD
from .costs import CostModel
from .planner import Planner
from .play import play
from .program import Program
from .spans import spans
from .timing import Timing


def simulate(program: Program, costs: CostModel, order: Sequence[int] | None = None) -> Timing:
    """The earliest times at which ``program``'s actions can run, every rank keeping to its row.

    Args:
        order: what :func:`.verify` returns, where it is known.
    """
    graph = program.graph
    found = spans(graph, order or play(graph), costs)
    return Timing(program, costs, tuple(tuple(found[numbers.start : numbers.stop]) for numbers in graph.numbers))


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
