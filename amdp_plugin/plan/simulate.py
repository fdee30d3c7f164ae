"""When things happen: the times of a program's actions under a cost model."""

from __future__ import annotations

from dataclasses import dataclass

from .action import BACKWARD, FORWARD, Action
from .costs import TICKS_PER_SECOND, CostModel
from .planner import Planner
from .play import play
from .program import Program
from .schedule import Place

Span = tuple[int, int]


@dataclass(frozen=True)
class Timing:
    """``spans[rank][i]`` is (start, end), in nanoseconds, of ``program.rows[rank][i]``."""

    program: Program
    costs: CostModel
    spans: tuple[tuple[Span, ...], ...]

    def busy(self, first: int, last: int) -> tuple[int, ...]:
        """For every rank, the nanoseconds it works for the windows ``first`` to ``last - 1``."""
        size = self.program.schedule.micro_batches
        return tuple(
            sum(
                end - start
                for action, (start, end) in zip(row, spans, strict=True)
                if first <= action.window(size) < last
            )
            for row, spans in zip(self.program.rows, self.spans, strict=True)
        )

    def window_end(self, window: int) -> int:
        """The instant at which the last rank ends its last backward of ``window``."""
        return max(self._last_backward(rank, window) for rank in range(len(self.spans)))

    def seconds_per_window(self, first: int, last: int) -> float:
        """Mean seconds of a window between the ends of the windows ``first - 1`` and ``last - 1``."""
        return self._ticks_between(first, last) / ((last - first) * TICKS_PER_SECOND)

    def utilization(self, first: int, last: int) -> float:
        """Busy share of all ranks between two like instants: the ends of windows ``first - 1`` and ``last - 1``."""
        return sum(self.busy(first, last)) / (self._ticks_between(first, last) * len(self.spans))

    def _ticks_between(self, first: int, last: int) -> int:
        return self.window_end(last - 1) - (self.window_end(first - 1) if first else 0)

    def _last_backward(self, rank: int, window: int) -> int:
        size = self.program.schedule.micro_batches
        return max(
            end
            for action, (_, end) in zip(self.program.rows[rank], self.spans[rank], strict=True)
            if action.kind == BACKWARD and action.window(size) == window
        )


def simulate(program: Program, costs: CostModel) -> Timing:
    """The earliest times at which ``program``'s actions can run, every rank keeping to its row.

    An update of a meeting begins one message after the last rank has entered; what went before was waiting.
    """
    schedule, link = program.schedule, costs.link_ticks()
    finish: dict[Place, int] = {}
    spans: list[list[Span]] = [[] for _ in program.rows]
    free_at = [0 for _ in program.rows]
    met: dict[int, int] = {}

    def arrival(rank: int, place: Place) -> int:
        return finish[place] + (link if place[0] != rank else 0)

    def ready(rank: int, action: Action) -> int:
        return max([free_at[rank], *(arrival(rank, place) for place in schedule.dependencies(rank, action))])

    for rank, action in play(program):
        start = ready(rank, action)
        if meeting := schedule.meeting(rank, action):
            # Here the first of them to go on finds the others where they wait.
            window = action.index
            if window not in met:
                met[window] = max(ready(*place) for place in meeting) + costs.meeting_ticks(schedule.num_ranks)
            start = max(start, met[window])
        work = costs.action_ticks(action) if schedule.computes(rank, action) else 0
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
