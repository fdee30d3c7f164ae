"""Where windows do not repeat soon by themselves, one is made that does."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amdp_plugin.plan import planner as planner_module
from amdp_plugin.plan import schedules
from amdp_plugin.plan.costs import CostModel
from amdp_plugin.plan.list_scheduler import ListScheduler, Window
from amdp_plugin.plan.planner import Planner
from amdp_plugin.plan.report import report
from amdp_plugin.plan.schedule import Schedule
from amdp_plugin.plan.simulate import simulate
from amdp_plugin.plan.verify import verify

from .strategies import cases, costs_of


def hurried(schedule: Schedule, costs: CostModel) -> Planner:
    """It looks at no more windows than it must."""
    with patch.object(planner_module, "ACTIONS_TO_EXAMINE", 1):
        return Planner(schedule, costs)


@st.composite
def tied(draw) -> tuple[Schedule, CostModel]:
    stages = draw(st.integers(2, 5))
    decisions = draw(st.sampled_from(["local", "latest", "relayed"]))
    schedule = schedules.make(
        "paci", stages, draw(st.integers(1, 6)), decisions=decisions, tied=((0, stages - 1),)
    )
    return schedule, draw(costs_of(schedule))


@settings(deadline=None, max_examples=200)
@given(st.one_of(cases(), tied()))
def test_the_first_window_in_portions_may_repeat_for_ever(case):
    schedule, costs = case
    planner = hurried(schedule, costs)
    first, after = planner.steady_windows()
    assert planner.period is not None or schedule.flush_every > 1
    verify(planner.program(after + 2 * (after - first) + planner.settled_windows().stop))


@settings(deadline=None, max_examples=60)
@given(st.one_of(cases(), tied()))
def test_in_a_window_of_portions_every_rank_does_as_much_of_everything(case):
    schedule, costs = case
    planner = hurried(schedule, costs)
    _, after = planner.steady_windows()
    if planner.period != 1:
        return
    for rank, stages in enumerate(schedule.placement.stages):
        for stage in stages:
            kinds = [action.kind for action in planner.row(after - 1, rank) if action.stage == stage]
            assert kinds.count("F") == kinds.count("B") == schedule.backwards_per_window(rank, stage)
            assert kinds.count("U") == 1
            assert kinds.count("R") == (len(schedule.placement.holders[stage]) > 1)


class Stuck(ListScheduler):
    """Finds nothing to start in portions."""

    def run_window(self) -> Window:
        if min(self.closed) == self.free_windows:
            raise self._deadlock()
        return super().run_window()


def test_an_order_that_gets_stuck_in_portions_goes_on_as_it_would(monkeypatch: pytest.MonkeyPatch):
    schedule = schedules.make("amdp", 6, 12, preload=1)
    free = Planner(schedule)
    monkeypatch.setattr(planner_module, "ListScheduler", Stuck)
    planner = hurried(schedule, free.costs)
    first, after = planner.steady_windows()
    assert (planner.period, first) == (None, after // 2)
    assert planner.program(after + 3).rows == free.program(after + 3).rows


DEEP: list[tuple[int, int, dict[str, Any]]] = [(10, 20, {}), (16, 32, {"directions": 2})]


@pytest.mark.parametrize(("stages", "micro_batches", "options"), DEEP)
def test_it_is_about_as_fast_as_windows_that_never_repeat(stages, micro_batches, options):
    schedule = schedules.make("amdp", stages, micro_batches, **options)
    found = report(hurried(schedule, CostModel.uniform(stages)), 1)
    assert found.period == 1
    free = Planner(schedule)
    free._examined, free._list_scheduler.free_windows = 512, 512
    timing = simulate(free.program(16), free.costs)
    assert found.utilization > 0.95 * timing.utilization(5, 15)
