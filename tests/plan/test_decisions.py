"""What stages know of each other when they update, without waiting."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amdp_plugin.plan import schedules
from amdp_plugin.plan.action import BACKWARD, REDUCE, UPDATE, Action
from amdp_plugin.plan.decisions import check_decisions, sums_of, windows_ago
from amdp_plugin.plan.laws import ProgramError
from amdp_plugin.plan.planner import Planner
from amdp_plugin.plan.program import Program
from amdp_plugin.plan.report import report


def latest(name: str, stages: int, micro_batches: int, **options: Any) -> Planner:
    return Planner(schedules.make(name, stages, micro_batches, decisions="latest", **options))


def without(program: Program, stage: int, window: int) -> set[tuple[int, Action]]:
    """Everything that can still happen where ``stage`` never has its whole gradient of ``window``: law by law, not by
    the means of the code."""
    schedule = program.schedule
    unit = next(iter(schedule.sharing.at_home(stage)), stage)  # a tied weight's guests' gradients come last
    home, *guests = schedule.sharing.holders[unit]
    kind = REDUCE if guests else BACKWARD
    done: set[tuple[int, Action]] = set()
    positions, moved = [0] * len(program.rows), True
    while moved:
        moved = False
        for rank, row in enumerate(program.rows):
            while positions[rank] < len(row):
                action = row[positions[rank]]
                is_it = (rank, action.stage, action.kind) == (home, unit, kind)
                whole = action.index == window if guests else action.index == (window + 1) * schedule.micro_batches - 1
                needs = schedule.dependencies(rank, action)
                if (is_it and whole) or any(place not in done for place in needs):
                    break
                done.add((rank, action))
                positions[rank], moved = positions[rank] + 1, True
    return done


SHAPES = [("paci", 2, 1), ("paci", 4, 1), ("paci", 4, 2), ("paci", 4, 8), ("paci", 5, 4), ("pipedream-2bw", 3, 3),
          ("amdp", 4, 4), ("amdp", 4, 8), ("amdp", 6, 6)]  # fmt: skip
TIED = [(2, 2, (0, 1)), (4, 1, (0, 3)), (4, 4, (0, 3)), (4, 4, (1, 3)), (4, 2, (1, 2, 3)), (5, 3, (2, 4))]


@pytest.mark.parametrize(
    ("name", "stages", "size", "tied"),
    [*((*shape, ()) for shape in SHAPES), *(("paci", stages, size, (weight,)) for stages, size, weight in TIED)],
)
def test_a_sum_is_made_before_its_update_whatever_is_late(name: str, stages: int, size: int, tied: Any) -> None:
    """And the one of a window later would not always be."""
    planner = latest(name, stages, size, tied=tied)
    ago = windows_ago(planner)
    assert ago is not None
    last = planner.settled_windows().stop
    program = planner.program(last)
    could_be_later = {(stage, other): False for stage in range(stages) for other in range(stages) if other != stage}
    for other in range(stages):
        for window in range(last):
            reached = without(program, other, window)
            for stage in set(range(stages)) - {other}:
                for update in range(last):
                    place = planner.schedule.placement.home(stage), Action(stage, UPDATE, update)
                    if place in reached and place[1] in program.rows[place[0]]:
                        assert update - ago[stage][other] < window, f"{place[1]} may come before {other}'s {window}"
                        could_be_later[stage, other] |= update - ago[stage][other] + 1 == window
    late = {pair for pair in could_be_later if ago[pair[0]][pair[1]] > 0}
    assert all(could_be_later[pair] for pair in late)


def test_paci_knows_later_stages_now_and_earlier_ones_a_window_ago() -> None:
    """With windows of as many micro-batches as stages, or more."""
    for size in (4, 9):
        expected = tuple(tuple(int(other < stage) for other in range(4)) for stage in range(4))
        assert windows_ago(latest("paci", 4, size)) == expected


def test_nothing_is_taken_where_nothing_is_asked() -> None:
    assert windows_ago(Planner(schedules.make("paci", 4, 4))) is None
    assert windows_ago(Planner(schedules.make("amdp", 4, 4, decisions="meeting"))) is None


def test_sums_of_other_stages_and_windows() -> None:
    assert dict(sums_of(((0, 0), (2, 0)), Action(1, UPDATE, 7))) == {0: 5}


@pytest.mark.parametrize(("name", "stages", "size"), [("paci", 8, 8), ("paci", 8, 16), ("amdp", 8, 32)])
def test_they_cost_no_time(name: str, stages: int, size: int) -> None:
    free = report(Planner(schedules.make(name, stages, size)), 1)
    assert report(latest(name, stages, size), 1).utilization == free.utilization


def test_a_sum_that_comes_too_late_is_named() -> None:
    planner = latest("paci", 3, 4)
    program = planner.program(3)
    with pytest.raises(ProgramError, match=r"law 3 .* a sum that it takes needs 0B\d+ of rank 0"):
        check_decisions(program, ((0, 0, 0), (1, 0, 0), (-1, 1, 0)))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 9), st.integers(0, 3), st.integers(0, 3))
def test_any_paci(stages: int, size: int, extra: int, every: int) -> None:
    if every == 1:
        every = 0
    planner = latest("paci", stages, size, extra_in_flight=extra, flush_every=every)
    ago = windows_ago(planner)
    assert ago is not None
    check_decisions(planner.program(planner.settled_windows().stop), ago)
    for stage, row in enumerate(ago):
        assert row[stage] == 0 and all(late == 0 for late in row[stage:]) and all(late >= 1 for late in row[:stage])
