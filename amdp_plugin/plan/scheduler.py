"""One scheduler for the whole family: windows of actions, on demand, for ever.

All ranks that hold the same schedule and costs generate the same program. As soon as the state at the
end of a window repeats, up to a shift in time and in micro-batches, the windows between repeat for ever
and are no longer computed.
"""

from __future__ import annotations

from .costs import CostModel
from .list_scheduling import Simulation, Window
from .program import Program, Row
from .schedule import Priority, Schedule

TRIAL_WINDOWS, FILLED_WINDOWS = 7, 3
"""Windows that a trial of a priority simulates, and how many of them fill the pipeline and do not count."""


class Scheduler:
    """Yields the windows of ``schedule`` under ``costs`` (equal stages, backward = 2 forwards, by default).

    ``window(k)[rank]`` is what that rank executes from the end of its window ``k - 1`` to the end of its
    window ``k``: its last backward of the window and the updates that are due by then. What a rank does in
    window ``k`` needs nothing that another does in a later window, so a run may end with any window.

    Raises:
        ValueError: when ``costs`` are of another number of stages.
    """

    def __init__(self, schedule: Schedule, costs: CostModel | None = None) -> None:
        self.schedule = schedule
        self.costs = costs or CostModel.uniform(schedule.num_stages)
        if self.costs.num_stages != schedule.num_stages:
            raise ValueError(f"costs of {self.costs.num_stages} stages for a schedule of {schedule.num_stages}")
        self.period: int | None = None
        """Windows after which the program repeats; ``None`` until that is known."""
        self._windows: list[Window] = []
        self._states: dict[object, int] = {}
        self._simulation = Simulation(schedule, self.costs, _best_priority(schedule, self.costs))

    def row(self, index: int, rank: int) -> Row:
        """What ``rank`` does in window ``index``."""
        while index >= len(self._windows) and self.period is None:
            self._generate()
        if index < len(self._windows):
            return self._windows[index][rank]
        assert self.period is not None
        shift = -(-(index + 1 - len(self._windows)) // self.period) * self.period
        row, micro_batches = self._windows[index - shift][rank], self.schedule.micro_batches
        return tuple(action.shifted(shift, micro_batches) for action in row)

    def window(self, index: int) -> Window:
        """The actions of window ``index``, one row a rank."""
        return tuple(self.row(index, rank) for rank in range(self.schedule.num_ranks))

    def program(self, windows: int) -> Program:
        """The first ``windows`` windows as one value."""
        parts = [self.window(index) for index in range(windows)]
        rows = (tuple(action for part in parts for action in part[rank]) for rank in range(self.schedule.num_ranks))
        return Program(self.schedule, windows, tuple(rows))

    def steady_windows(self, limit: int = 512) -> tuple[int, int]:
        """(first, last + 1) of the windows that repeat for ever.

        Where none was seen to repeat within ``limit`` windows, the later half of those.
        """
        while self.period is None and len(self._windows) < limit:
            self._generate()
        count = len(self._windows)
        return (count - self.period, count) if self.period else (count // 2, count)

    def _generate(self) -> None:
        index = len(self._windows)
        self._windows.append(self._simulation.run_window())
        state = self._simulation.state(index + 1)
        first = self._states.setdefault(state, index)
        if first != index:
            self.period = index - first
            self._states.clear()


def _best_priority(schedule: Schedule, costs: CostModel) -> Priority:
    """The priority under which the schedule's windows follow each other fastest; the earlier one of equals."""
    if len(schedule.priorities) == 1:
        return schedule.priorities[0]
    return min(schedule.priorities, key=lambda priority: _trial(Simulation(schedule, costs, priority)))


def _trial(simulation: Simulation) -> float:
    """Nanoseconds that windows take once the pipeline is full; infinite where ranks wait for each other for ever."""
    ends = []
    try:
        for _ in range(TRIAL_WINDOWS):
            simulation.run_window()
            ends.append(simulation.now)
    except ValueError:
        return float("inf")
    return ends[-1] - ends[FILLED_WINDOWS - 1]
