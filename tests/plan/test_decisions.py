"""What stages know of each other when they update, without waiting."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amdp_plugin.plan import schedules
from amdp_plugin.plan.action import BACKWARD, FORWARD, REDUCE, UPDATE, Action
from amdp_plugin.plan.costs import CostModel
from amdp_plugin.plan.decisions import check_decisions, sums_of, windows_ago
from amdp_plugin.plan.laws import ProgramError
from amdp_plugin.plan.planner import Planner
from amdp_plugin.plan.program import Program
from amdp_plugin.plan.report import report
from amdp_plugin.plan.verify import verify
from amdp_plugin.plan.versions import versions


def latest(name: str, stages: int, micro_batches: int, **options: Any) -> Planner:
    return Planner(schedules.make(name, stages, micro_batches, decisions="latest", **options))


def without(program: Program, stage: int, window: int) -> set[tuple[int, Action]]:
    """Everything that can still happen where ``stage`` never has its whole gradient of ``window``: law by law, not by
    the means of the code."""
    schedule = program.schedule
    home, *guests = schedule.placement.holders[stage]
    kind = REDUCE if guests else BACKWARD
    done: set[tuple[int, Action]] = set()
    positions, moved = [0] * len(program.rows), True
    while moved:
        moved = False
        for rank, row in enumerate(program.rows):
            while positions[rank] < len(row):
                action = row[positions[rank]]
                is_it = (rank, action.stage, action.kind) == (home, stage, kind)
                whole = action.index == window if guests else action.index == (window + 1) * schedule.micro_batches - 1
                needs = schedule.dependencies(rank, action)
                if (is_it and whole) or any(place not in done for place in needs):
                    break
                done.add((rank, action))
                positions[rank], moved = positions[rank] + 1, True
    return done


SHAPES = [("paci", 2, 1), ("paci", 4, 1), ("paci", 4, 2), ("paci", 4, 8), ("paci", 5, 4), ("pipedream-2bw", 3, 3),
          ("amdp", 4, 4), ("amdp", 4, 8), ("amdp", 6, 6)]  # fmt: skip


@pytest.mark.parametrize(("name", "stages", "size"), SHAPES)
def test_a_sum_is_made_before_its_update_whatever_is_late(name: str, stages: int, size: int) -> None:
    """And the one of a window later would not always be."""
    planner = latest(name, stages, size)
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


def relayed(stages: int, micro_batches: int, **options: Any) -> Planner:
    return Planner(schedules.make("paci", stages, micro_batches, decisions="relayed", **options))


@pytest.mark.parametrize("link", [0.0, 0.1])
@pytest.mark.parametrize("stages", [2, 3, 5, 8, 12, 16])
@pytest.mark.parametrize("times", [1, 1.5, 2, 4])
def test_relayed_decisions_keep_ranks_as_busy_as_none(stages: int, times: float, link: float) -> None:
    micro_batches, costs = round(times * stages), CostModel.relative(stages, link_cost=link)
    schedule = schedules.make("paci", stages, micro_batches)
    free = report(Planner(schedule, costs), 1)
    exact = report(Planner(replace(schedule, decisions="relayed"), costs), 1)
    assert exact.deadlock_free and exact.utilization >= free.utilization - 0.005
    assert exact.max_version_gap <= free.max_version_gap_stated
    assert exact.peak_in_flight_by_rank == free.peak_in_flight_by_rank
    assert exact.windows_ago == ((0,) * stages,) * stages
    assert exact.gradient_copies_by_rank == (1, *(2,) * (stages - 1))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 7), st.integers(1, 15), st.integers(0, 3), st.sampled_from([0, 2, 3]), st.floats(0, 0.5))
def test_any_relayed(stages: int, size: int, extra: int, every: int, link: float) -> None:
    """Every stage forwards every micro-batch with one version, which is that of stage 0: the first that it forwards
    after it has closed a window is the first with that window's update."""
    schedule = schedules.make("paci", stages, size, decisions="relayed", extra_in_flight=extra, flush_every=every)
    planner = Planner(schedule, CostModel.relative(stages, link_cost=link))
    last = planner.settled_windows().stop
    program = planner.program(last)
    verify(program)
    ago = windows_ago(planner)
    assert ago == ((0,) * stages,) * stages
    check_decisions(program, ago)
    found = versions(program)
    for micro_batch in range(last * size):
        forwards = {found[stage, micro_batch].forward for stage in range(stages) if (stage, micro_batch) in found}
        assert forwards == {schedule.updates_before(micro_batch)}
    for row in program.rows:
        for update, following in pairwise(row):
            if update.kind == UPDATE and following.kind == FORWARD:
                assert following.index >= schedule.forward_after(update.index)


def test_staleness_of_relayed_decisions_is_the_same_on_all_stages() -> None:
    found = report(relayed(8, 16), 1)
    assert found.mean_staleness_by_stage == (7 / 16,) * 8
    assert found.version_gap_by_stage == report(Planner(schedules.make("paci", 8, 16)), 1).version_gap_by_stage
    assert found.update_delay_by_stage == (0, 1, 2, 3, 4, 5, 6, 7)
    assert "0 1 2 3 4 5 6 7" in found.to_text()


def test_windows_that_are_parked_at_once() -> None:
    """Three micro-batches pass the last of four stages between the end of a window and its update."""
    assert report(relayed(4, 1), 1).gradient_copies_by_rank == (1, 2, 3, 4)
    assert report(relayed(4, 2), 1).gradient_copies_by_rank == (1, 2, 2, 3)


@pytest.mark.parametrize(
    ("name", "options", "why"),
    [("amdp", {}, "up and down one direction, it has 2"), ("pipedream-2bw", {}, "its weights are 'previous'")],
)
def test_what_cannot_relay(name: str, options: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        schedules.make(name, 4, 4, decisions="relayed", **options)


def test_an_update_before_its_decision_is_named() -> None:
    program = relayed(3, 2).program(3)
    row = [action for action in program.rows[2] if action != Action(2, UPDATE, 0)]
    row.insert(row.index(Action(2, FORWARD, 3)), Action(2, UPDATE, 0))
    with pytest.raises(ProgramError, match=r"law 4 .* at 2U0 .* its decision comes with 2F4"):
        verify(replace(program, rows=(*program.rows[:2], tuple(row))))
