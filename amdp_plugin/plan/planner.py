"""One planner for the whole family: windows of actions, on demand, for ever.

Planners of the same schedule and costs generate the same program. As soon as the state at the
end of a window repeats, up to a shift in time and in micro-batches, the windows between repeat for ever
and are no longer computed. Where it does not soon, a window is made that ends as it begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from math import ceil, inf
from typing import NamedTuple
from weakref import WeakValueDictionary

from .action import BACKWARD, FORWARD, UPDATE, Action
from .costs import CostModel
from .laws import ProgramError
from .list_scheduler import ListScheduler, Window
from .postings import Postings, postings, shifted
from .program import Program, Row
from .schedule import Schedule

ACTIONS_TO_EXAMINE, WINDOWS_TO_EXAMINE = 100_000, 512
"""How much is generated, at most, in the search for windows that repeat by themselves, unless the pipeline is not full
before."""

TRIAL_WINDOWS, FILLED_WINDOWS = 13, 3
"""Windows that a trial of a priority simulates, at most, and how many of them fill the pipeline and do not count. Some
orders begin well and go wrong after ten windows."""
TRIAL_STAGES = 16
"""Stages of the pipeline that trials simulate, at most: an order that is fast on so many is fast on 64, too, where each
trial would take as long as the whole plan."""

GOOD_ENOUGH = 1.01
"""Where windows take no longer than this many times the fastest found, the schedule that needs less memory is taken."""
AT_THE_BOUND = 1.001
"""A trial ends the search that takes no longer than this many times what the busiest rank has to do."""
HOPELESS = 0.1
"""A trial ends early that is slower than the best so far by this share after one window that counts, by half of it
after two, and so on."""


class Choice(NamedTuple):
    """What trials found best: the place of a schedule among the alternatives and itself, and of one of its orders."""

    candidate: int
    order: int


class Planner:
    """Yields the windows of ``schedule`` under ``costs`` (equal stages, backward = 2 forwards, by default).

    ``window(k)[rank]`` is what that rank executes from the end of its window ``k - 1`` to the end of its
    window ``k``: its last backward of the window and the updates that are due by then. What a rank does in
    window ``k`` needs nothing that another does in a later window, so a run may end with any window.

    Args:
        schedule: what to plan. Where it has alternatives, the attribute ``schedule`` is the one chosen.
        choice: what to take of it, where that was found before; by default it is found by trial.

    Raises:
        ValueError: when ``costs`` are of another number of stages.
    """

    def __init__(self, schedule: Schedule, costs: CostModel | None = None, choice: Choice | None = None) -> None:
        self.costs = costs or CostModel.uniform(schedule.num_stages)
        if self.costs.num_stages != schedule.num_stages:
            raise ValueError(f"costs of {self.costs.num_stages} stages for a schedule of {schedule.num_stages}")
        self.period: int | None = None
        """Windows after which the program repeats; ``None`` until that is known."""
        self._windows: list[Window] = []
        self._states: dict[object, int] = {}
        self._programs: WeakValueDictionary[int, Program] = WeakValueDictionary()
        self._postings: dict[tuple[int, bool], tuple[Postings, ...]] = {}
        self.choice = choice or _choose(schedule, self.costs)
        self.schedule = _candidates(schedule)[self.choice.candidate]
        self._examined = _windows_to_examine(self.schedule)
        self._list_scheduler = self._scheduling(inf if self.schedule.flush_every else self._examined - 1)

    @classmethod
    def from_windows(
        cls, schedule: Schedule, costs: CostModel, choice: Choice, windows: Sequence[Window], period: int
    ) -> Planner:
        """The planner of a program that is known: ``windows``, of which the last ``period`` repeat for ever."""
        planner = cls(schedule, costs, choice)
        planner._windows, planner.period = list(windows), period
        return planner

    def row(self, index: int, rank: int) -> Row:
        """What ``rank`` does in window ``index``."""
        shift = self._shift(index)
        row, micro_batches = self._windows[index - shift][rank], self.schedule.micro_batches
        return tuple(action.shifted(shift, micro_batches) for action in row) if shift else row

    def postings(self, index: int, rank: int, landing: bool = False) -> Postings:
        """When ``rank`` begins to receive what is sent to it in window ``index``; see :mod:`.postings`."""
        shift = self._shift(index)
        like = index - shift
        if (like, landing) not in self._postings:
            self._postings[like, landing] = postings(self.schedule, self._windows[like], self.costs, landing)
        return shifted(self._postings[like, landing][rank], shift, self.schedule.micro_batches)

    def window(self, index: int) -> Window:
        """The actions of window ``index``, one row a rank."""
        return tuple(self.row(index, rank) for rank in range(self.schedule.num_ranks))

    def program(self, windows: int) -> Program:
        """The first ``windows`` windows as one value, the same one as long as somebody uses it."""
        found = self._programs.get(windows)
        if found is None:
            parts = [self.window(index) for index in range(windows)]
            ranks = range(self.schedule.num_ranks)
            rows = tuple(tuple(action for part in parts for action in part[rank]) for rank in ranks)
            found = self._programs[windows] = Program(self.schedule, windows, rows)
        return found

    def steady_windows(self) -> tuple[int, int]:
        """(first, last + 1) of the windows that repeat for ever.

        Those of a pipeline that is flushed every so many windows may be too many to look at: then the later half of
        the first ones, the same on all ranks.
        """
        while self.period is None and len(self._windows) < self._examined:
            self._generate()
        if self.period is None:  # others may have asked for later windows
            return self._examined // 2, self._examined
        count = len(self._windows)
        return count - self.period, count

    def settled_windows(self) -> range:
        """Windows that repeat for ever, and so late that what is backwarded in them was forwarded in such ones.

        Where no repetition was seen, those of :meth:`steady_windows`.
        """
        first, last = self.steady_windows()
        later = _windows_in_flight(self.schedule) if self.period else 0
        return range(first + later, last + later)

    def _shift(self, index: int) -> int:
        """How many windows after a generated one the like window ``index`` comes: 0 for a generated one."""
        while index >= len(self._windows) and self.period is None:
            self._generate()
        if index < len(self._windows):
            return 0
        assert self.period is not None
        return -(-(index + 1 - len(self._windows)) // self.period) * self.period

    def _scheduling(self, free_windows: float) -> ListScheduler:
        return ListScheduler(self.schedule, self.costs, self.schedule.priorities[self.choice.order], free_windows)

    def _generate(self) -> None:
        index = len(self._windows)
        try:
            window = self._list_scheduler.run_window()
        except ProgramError:
            if index < self._list_scheduler.free_windows:
                raise
            # The order that it prefers gets stuck in portions: let it go on as it would.
            self._list_scheduler = self._scheduling(inf)
            *_, window = (self._list_scheduler.run_window() for _ in range(index + 1))
        self._windows.append(window)
        state = self._list_scheduler.state(index + 1)
        first = self._states.setdefault(state, index)
        if first != index:
            self.period = index - first
        elif index == self._list_scheduler.free_windows:
            self.period = 1
        if self.period:
            self._states.clear()


def _windows_to_examine(schedule: Schedule) -> int:
    """At least one when the pipeline is full and the first late updates are over, and the like one after it."""
    per_window = 2 * schedule.num_stages * schedule.micro_batches
    by_time = min(WINDOWS_TO_EXAMINE, ACTIONS_TO_EXAMINE // per_window)
    late = (schedule.windows_late(rank, unit) for rank, units in enumerate(schedule.sharing.units) for unit in units)
    return max(by_time, _windows_in_flight(schedule) + max(late) + 2)


def _windows_in_flight(schedule: Schedule) -> int:
    """How many windows the micro-batches are of that may be in flight at once, at most."""
    return -(-max(schedule.in_flight) * schedule.placement.directions // schedule.micro_batches)


def _choose(schedule: Schedule, costs: CostModel) -> Choice:
    """By trial; of a deep pipeline, what stands where the choice for a smaller one does."""
    candidates = _candidates(schedule)
    if len(candidates) == len(schedule.priorities) == 1:
        return Choice(0, 0)
    if schedule.num_stages <= TRIAL_STAGES or schedule.smaller is None:
        return _by_trial(candidates, costs)
    smaller = _candidates(schedule.smaller(TRIAL_STAGES))
    found = _by_trial(smaller, costs.sampled(smaller[0].num_stages))
    share = found.candidate / max(1, len(smaller) - 1)
    return Choice(ceil(share * (len(candidates) - 1)), found.order)


def _candidates(schedule: Schedule) -> tuple[Schedule, ...]:
    """Its alternatives, and itself as the last."""
    return *schedule.alternatives, replace(schedule, alternatives=())


def _by_trial(candidates: Sequence[Schedule], costs: CostModel) -> Choice:
    """The first candidate that is good enough, and the order under which it is fastest."""
    # What needs most memory is fastest: tried first, it shortens the trials of the others, and where one with less is
    # no longer good enough, there is no need to try those with less still.
    last = len(candidates) - 1
    best, order = _fastest(candidates[last], costs, inf)
    found = [(best, Choice(last, order or 0))]
    for place in reversed(range(last)):
        pace, order = _fastest(candidates[place], costs, best * GOOD_ENOUGH)
        if order is None:
            break
        best = min(best, pace)
        found.append((pace, Choice(place, order)))
    return next(choice for pace, choice in reversed(found) if pace <= best * GOOD_ENOUGH)


@lru_cache(maxsize=256)
def _fastest(schedule: Schedule, costs: CostModel, limit: float) -> tuple[float, int | None]:
    """(pace of a trial, place among the priorities) of the order under which windows follow each other fastest; the
    earlier one of equals, ``None`` where all take ``limit`` or more."""
    bound = AT_THE_BOUND * _busiest_share(schedule, costs)
    fastest: int | None = None
    for place, priority in enumerate(schedule.priorities):
        pace = _trial(ListScheduler(schedule, costs, priority), limit)
        if pace < limit:
            limit, fastest = pace, place
        if limit <= bound:
            break
    return limit, fastest


def _busiest_share(schedule: Schedule, costs: CostModel) -> float:
    """The share of all work that the busiest rank has: no order is faster than that."""

    def work(rank: int, stage: int) -> int:
        each = sum(costs.action_ticks(Action(stage, kind, 0)) for kind in (FORWARD, BACKWARD))
        update = Action(stage, UPDATE, 0)
        steps = costs.action_ticks(update) if schedule.computes(rank, update) else 0
        return schedule.backwards_per_window(rank, stage) * each + steps

    of_ranks = [sum(work(rank, stage) for stage in stages) for rank, stages in enumerate(schedule.placement.stages)]
    return max(of_ranks) / sum(of_ranks)


def _trial(list_scheduler: ListScheduler, limit: float) -> float:
    """Nanoseconds that it takes until a nanosecond of work is done, once the pipeline is full; infinite where that is
    clearly above ``limit``, and where ranks wait for each other for ever."""
    pace = start = worked = 0.0
    try:
        for window in range(TRIAL_WINDOWS):
            list_scheduler.run_window()
            if window < FILLED_WINDOWS:
                start, worked = list_scheduler.now, list_scheduler.worked
            else:
                pace = (list_scheduler.now - start) / (list_scheduler.worked - worked)
                if pace > limit * (1 + HOPELESS / (window - FILLED_WINDOWS + 1)):
                    return inf
    except ProgramError:
        return inf
    return pace
