"""Deep pipelines: what is tried on a smaller one, runs and is proved as it is."""

from __future__ import annotations

from typing import Any

import pytest

from amdp_plugin.plan import planner as planner_module
from amdp_plugin.plan.costs import CostModel
from amdp_plugin.plan.handover import read, written
from amdp_plugin.plan.list_scheduler import ListScheduler
from amdp_plugin.plan.planner import TRIAL_STAGES, Planner
from amdp_plugin.plan.priorities import Priority
from amdp_plugin.plan.schedule import Schedule
from amdp_plugin.plan.schedules import make
from amdp_plugin.plan.verify import verify

DEEP: list[tuple[str, dict[str, Any]]] = [("chimera", {}), ("amdp", {"preload": 1}), ("amdp", {"directions": 2})]


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The stages of every pipeline that is simulated."""
    stages: list[int] = []

    class Noted(ListScheduler):
        def __init__(self, schedule: Schedule, costs: CostModel, priority: Priority, *free_windows: float) -> None:
            stages.append(schedule.num_stages)
            super().__init__(schedule, costs, priority, *free_windows)

    monkeypatch.setattr(planner_module, "ListScheduler", Noted)
    planner_module._fastest.cache_clear()
    return stages


@pytest.mark.parametrize(("name", "options"), DEEP)
def test_64_stages_are_tried_on_16_and_proved_on_64(name: str, options: dict[str, Any], simulated: list[int]) -> None:
    planner = Planner(make(name, 64, 64, **options))
    assert set(simulated) == {TRIAL_STAGES, 64} and simulated.count(64) == 1
    program = planner.program(planner.settled_windows().stop)
    assert planner.period and len(verify(program)) == sum(map(len, program.rows))


def test_what_stands_where_the_smaller_choice_does_is_taken() -> None:
    costs = CostModel.uniform(32, link_latency=0.1)
    schedule = make("amdp", 32, 64, directions=2)
    assert schedule.smaller is not None
    smaller = schedule.smaller(TRIAL_STAGES)
    assert (smaller.num_stages, smaller.micro_batches, smaller.placement.directions) == (16, 32, 2)
    found, chosen = Planner(smaller, CostModel.uniform(16, link_latency=0.1)), Planner(schedule, costs)
    assert chosen.choice.order == found.choice.order
    assert chosen.schedule.options["preload"] == 2 * found.schedule.options["preload"]


@pytest.mark.parametrize(("stages", "directions"), [(18, 3), (20, 5), (28, 7), (64, 32), (34, 1)])
def test_a_smaller_pipeline_has_the_same_orders(stages: int, directions: int) -> None:
    schedule = make("amdp", stages, stages * directions, directions=directions)
    assert schedule.smaller is not None
    smaller = schedule.smaller(TRIAL_STAGES)
    assert smaller.num_stages <= TRIAL_STAGES and smaller.placement.directions == min(directions, TRIAL_STAGES // 2)
    assert len(smaller.priorities) == len(schedule.priorities)


def test_costs_of_fewer_stages_keep_both_ends() -> None:
    forward = tuple(map(float, range(1, 65)))
    sampled = CostModel(forward, forward[::-1], (0.0,) * 64, 0.5).sampled(4)
    assert (sampled.forward, sampled.backward) == ((1.0, 22.0, 43.0, 64.0), (64.0, 43.0, 22.0, 1.0))
    assert sampled.link_latency == 0.5


@pytest.mark.parametrize("name", ["paci", "amdp"])
def test_what_is_handed_over_is_read_as_it_was_written(name: str) -> None:
    schedule, costs = make(name, 4, 8), CostModel.uniform(4, link_latency=0.1)
    planner = Planner(schedule, costs)
    received = read(written(planner), schedule, costs)
    assert received.schedule == planner.schedule and received.steady_windows() == planner.steady_windows()
    assert received.program(30).rows == planner.program(30).rows
