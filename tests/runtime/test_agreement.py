"""One rank plans for all, and ranks that would run different programs are told so at the start, all of them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from amdp_plugin.plan import planner as planner_module
from amdp_plugin.plan.action import Action
from amdp_plugin.plan.costs import CostModel
from amdp_plugin.plan.list_scheduler import ListScheduler, Window
from amdp_plugin.plan.planner import Planner
from amdp_plugin.plan.schedule import Schedule
from amdp_plugin.plan.schedules import make
from amdp_plugin.runtime import agreement
from amdp_plugin.runtime.agreement import _said, bound_collectives, plan_together
from amdp_plugin.runtime.watch import FIRST_WINDOW
from tests.processes import run_ranks

Make = Callable[[int], Schedule]
"""The schedule that a rank makes, all with one name and one set of options."""

BASE = make("amdp", 4, 8, preload=1)


def same(rank: int) -> Schedule:
    return BASE


def priority_of_the_rank(rank: int) -> Schedule:
    """The last rank prefers other forwards."""

    def turned(action: Action, since: float) -> tuple[Any, ...]:
        return (action.kind, (action.stage if rank < 3 else -action.stage), action.index)

    return replace(BASE, priorities=(turned,))


def preload_by_trial(rank: int) -> Schedule:
    return make("amdp", 4, 8, directions=2)


def priority_of_chance(rank: int) -> Schedule:
    dice = random.Random(rank)
    return replace(BASE, priorities=(lambda action, since: (dice.random(), action),))


def limit_of_the_rank(rank: int) -> Schedule:
    return replace(BASE, in_flight=(3, 3, 3, 3 + rank // 3))


def bound_of_the_rank(rank: int) -> Schedule:
    """The program is the same, what is promised of it is not."""
    return replace(BASE, max_gap=(1 + rank, 1, 1, 1))


def failing_on(failing: int, rank: int) -> Schedule:
    def late(action: Action, since: float) -> int:
        return action.index if action.index < 12 or rank != failing else {}[action.index]

    return replace(BASE, priorities=(late,))


def failing_on_the_first_rank(rank: int) -> Schedule:
    return failing_on(0, rank)


def failing_on_another_rank(rank: int) -> Schedule:
    return failing_on(1, rank)


def together(schedule: Schedule, costs: CostModel | None = None) -> Planner:
    costs = costs or CostModel.uniform(schedule.num_stages)
    return plan_together(schedule, costs, dist.group.WORLD, torch.device("cpu"))


def attempt(rank: int, make_schedule: Make) -> str:
    try:
        together(make_schedule(rank))
    except ValueError as error:
        return str(error)
    return "agreed"


def planned(rank: int, make_schedule: Make) -> tuple[int, list[Window]]:
    """(windows that this rank simulated, the first ones of its program)"""
    count, run_window = 0, ListScheduler.run_window

    def counted(list_scheduler: ListScheduler) -> Window:
        nonlocal count
        count += 1
        return run_window(list_scheduler)

    ListScheduler.run_window = counted  # type: ignore[method-assign]
    planner = together(make_schedule(rank))
    windows = [planner.window(index) for index in range(40)]
    assert planner.period is not None
    return count, windows


@pytest.mark.parametrize("make_schedule", [same, preload_by_trial, priority_of_the_rank, priority_of_chance])
def test_one_rank_plans_and_all_hold_its_program(make_schedule: Make) -> None:
    (first, windows), *others = run_ranks(4, planned, make_schedule)
    assert first > 0 and [count for count, _ in others] == [0, 0, 0]
    planner = Planner(make_schedule(0))
    assert windows == [planner.window(index) for index in range(40)]
    assert all(received == windows for _, received in others)


def test_what_a_schedule_says_is_the_same_text_in_every_process() -> None:
    """A function's own text has its address in it."""
    for name in ("gpipe", "1f1b", "chimera", "paci", "amdp"):
        assert " at 0x" not in _said(make(name, 4, 8))


@pytest.mark.parametrize("make_schedule", [limit_of_the_rank, bound_of_the_rank])
def test_what_a_schedule_says_of_itself_is_the_same_on_all_ranks_or_refused(make_schedule: Make) -> None:
    for rank, message in enumerate(run_ranks(4, attempt, make_schedule)):
        assert f"configured for different programs, rank {rank} for ('amdp', {{'directions': 2, 'preload': 1" in message
        assert "let nothing in a schedule of your own depend on the rank or on chance" in message


UNEVEN = CostModel((1.0, 1.37, 0.731, 1.19), (2.0, 2.311, 1.73, 2.97), (0.01,) * 4, 0.173)


def in_portions(rank: int) -> tuple[int | None, list[Window]]:
    """The period, and the first windows, where too few are looked at for one to repeat by itself."""
    planner_module.ACTIONS_TO_EXAMINE = 1
    planner = together(preload_by_trial(rank), UNEVEN)
    return planner.period, [planner.window(index) for index in range(8)]


def test_a_window_that_is_made_to_repeat_is_told_to_all() -> None:
    first, *others = run_ranks(4, in_portions)
    assert first[0] == 1 and others == [first] * 3


def flushing(schedule: Schedule) -> Schedule:
    """After more windows than are looked at."""
    cheaper = tuple(map(flushing, schedule.alternatives))
    return replace(schedule, flush_every=64, max_gap=(63,) * schedule.num_stages, alternatives=cheaper)


def without_a_period(rank: int, make_schedule: Make) -> str:
    """As :func:`attempt`, where too few windows are looked at for a repetition to be seen."""
    planner_module.ACTIONS_TO_EXAMINE = 1
    try:
        planner = together(flushing(make_schedule(rank)), UNEVEN)
    except ValueError as error:
        return str(error)
    assert planner.period is None
    return str([planner.window(index) for index in range(8)])


def test_where_nothing_repeats_every_rank_goes_on_by_itself_with_what_was_chosen() -> None:
    first, *others = run_ranks(4, without_a_period, preload_by_trial)
    assert first.startswith("[((Action") and others == [first] * 3


@pytest.mark.parametrize("make_schedule", [priority_of_the_rank, priority_of_chance])
def test_where_nothing_repeats_an_order_that_depends_on_the_rank_or_on_chance_is_refused(make_schedule: Make) -> None:
    for rank, message in enumerate(run_ranks(4, without_a_period, make_schedule)):
        assert f"configured for different programs, rank {rank} for ('amdp'" in message


def test_what_fails_on_the_rank_that_plans_is_told_to_all() -> None:
    for message in run_ranks(4, attempt, failing_on_the_first_rank):
        assert "amdp: the priority failing_on.<locals>.late failed with KeyError: 1" in message


def test_what_fails_where_nobody_plans_does_no_harm() -> None:
    assert run_ranks(4, attempt, failing_on_another_rank) == ["agreed"] * 4


@pytest.mark.parametrize(("backends", "longest"), [("cpu:gloo,cuda:gloo", 7.0), ("cpu:gloo,cuda:nccl", None)])
def test_nccl_gives_up_only_when_the_host_must_have_told(
    backends: str, longest: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends the process, and has no longer limit of its own in the first window."""
    bounds: list[float] = []
    monkeypatch.setattr(dist, "get_backend_config", lambda group: backends)
    monkeypatch.setattr(agreement, "set_timeout", lambda group, seconds: bounds.append(seconds))
    bound_collectives([None], 7.0)  # type: ignore[list-item]
    assert bounds == [longest] if longest else bounds[0] > 7.0 * FIRST_WINDOW
