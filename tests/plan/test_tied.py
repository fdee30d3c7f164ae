"""Weights that several stages share, as units of their own: programs, breaches, lateness, and what they cost."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amdp_plugin.plan import schedules
from amdp_plugin.plan.action import BACKWARD, FORWARD, REDUCE, UPDATE, Action
from amdp_plugin.plan.costs import CostModel
from amdp_plugin.plan.decisions import check_decisions, windows_ago
from amdp_plugin.plan.devices import gradient_buffers
from amdp_plugin.plan.handover import read, written
from amdp_plugin.plan.planner import Planner
from amdp_plugin.plan.program import Program
from amdp_plugin.plan.report import report
from amdp_plugin.plan.simulate import steady_state
from amdp_plugin.plan.tied import tied_versions, tied_weights
from amdp_plugin.plan.verify import verify

from .strategies import BIDIRECTIONAL, costs_of, made
from .test_breaches import breach, moved, without

WINDOWS = 6


def tied(stages: int, micro_batches: int, *weights: tuple[int, ...], **options) -> Planner:
    """Under paci; by default the first and the last stage share one."""
    return Planner(schedules.make("paci", stages, micro_batches, tied=weights or ((0, stages - 1),), **options))


@st.composite
def shared(draw, stages: int) -> tuple[int, ...]:
    """The stages of one weight."""
    return tuple(sorted(draw(st.sets(st.integers(0, stages - 1), min_size=2))))


@st.composite
def cases(draw) -> tuple[Planner, CostModel]:
    stages, micro_batches = draw(st.integers(2, 6)), draw(st.integers(1, 9))
    weights = tuple(draw(st.lists(shared(stages), min_size=1, max_size=3)))
    flush_every = draw(st.sampled_from([0, 0, 1, 2, 3]))
    decisions = "auto" if flush_every == 1 else draw(st.sampled_from(["local", "latest", "relayed"]))
    if decisions == "relayed":
        weights = tuple((0, *stages[1:]) for stages in weights)
    schedule = schedules.make(
        "paci", stages, micro_batches, tied=weights, decisions=decisions,
        extra_in_flight=draw(st.integers(0, 3)), flush_every=flush_every,
    )  # fmt: skip
    costs = draw(costs_of(schedule))
    return Planner(schedule, costs), costs


@settings(deadline=None, max_examples=80)
@given(cases())
def test_every_law_holds(case):
    """Also with uneven stages and slow links, for windows below, at and above the stages."""
    planner, costs = case
    program = planner.program(max(WINDOWS, planner.settled_windows().stop))
    verify(program)
    assert Program.from_csv(program.to_csv(), program.schedule) == program
    again = read(written(planner), planner.schedule, costs)
    assert again.program(WINDOWS) == planner.program(WINDOWS)
    gradient_buffers(planner)
    ago = windows_ago(planner)
    if ago is not None:
        check_decisions(program, ago)


@settings(deadline=None, max_examples=60)
@given(cases())
def test_all_but_the_tied_weight_goes_on_as_without_it(case):
    """Forwards, backwards and updates of stages stand where they would: nothing gets staler."""
    planner, costs = case
    if planner.schedule.flush_every:
        return  # a forward beyond a flush waits for its tied weight, too
    plain = Planner(replace(planner.schedule, tied=()), costs)
    for rank in range(planner.schedule.num_ranks):
        own = [action for window in range(WINDOWS) for action in planner.row(window, rank)]
        without_it = [action for window in range(WINDOWS) for action in plain.row(window, rank)]
        assert [action for action in own if action.stage < planner.schedule.num_stages] == without_it


@settings(deadline=None, max_examples=60)
@given(cases())
def test_lateness_is_bounded_and_counted(case):
    """By replaying the rows; a gradient goes into the update of its own window."""
    planner, _ = case
    schedule, program = planner.schedule, planner.program(WINDOWS)
    found = tied_versions(program)
    for unit, (home, *guests) in enumerate(schedule.tied, start=schedule.num_stages):
        for stage in (home, *guests):
            values, at_forward = 0, {}
            for action in program.rows[stage]:
                values += action.kind == UPDATE and action.stage == (home if stage == home else unit)
                if action.stage == stage and action.kind == FORWARD:
                    at_forward[action.index] = values
                elif action.stage == stage and action.kind == BACKWARD:
                    version = found[unit, stage, action.index]
                    assert (version.forward, version.backward) == (at_forward[action.index], values)
                    assert version.applied == action.index // schedule.micro_batches
                    assert 0 <= version.gap <= schedule.max_gap[home]
                    assert version.staleness <= -(-schedule.in_flight[home] // schedule.micro_batches)


@pytest.mark.parametrize(("stages", "size"), [(2, 2), (4, 2), (4, 4), (8, 1), (8, 8), (8, 16)])
@pytest.mark.parametrize("link", [0.0, 0.1])
@pytest.mark.parametrize("decisions", ["local", "relayed"])
def test_utilization_is_that_of_free_running(stages: int, size: int, link: float, decisions: str) -> None:
    costs = CostModel.uniform(stages, link_latency=link)
    schedule = schedules.make("paci", stages, size, tied=((0, stages - 1),), decisions=decisions)
    plain = steady_state(Planner(schedules.make("paci", stages, size, decisions=decisions), costs))
    assert steady_state(Planner(schedule, costs)) == pytest.approx(plain, rel=1e-6)


def test_one_window_by_hand() -> None:
    """Two stages, windows of two: the guest sends as it closes a window and takes the value while it runs the next."""
    program = tied(2, 2).program(3)
    assert [" ".join(map(str, row)) for row in program.rows] == [
        "0F0 0F1 0B0 0F2 0B1 2R0 0U0 2U0 0F3 0B2 0F4 0B3 2R1 0U1 2U1 0F5 0B4 0F6 0B5 2R2 0U2 2U2",
        "1F0 1B0 1F1 1B1 2R0 1U0 1F2 1B2 2U0 1F3 1B3 2R1 1U1 1F4 1B4 2U1 1F5 1B5 2R2 1U2",
    ]


def test_a_forward_beyond_a_flush_waits_for_the_tied_weight() -> None:
    planner = tied(4, 4, flush_every=2)
    row = list(planner.program(4).rows[3])
    assert row.index(Action(4, UPDATE, 1)) < row.index(Action(3, FORWARD, 8))
    error = breach(moved(planner.program(4), 3, "4U1", "3F9"))
    assert error.law == 6
    assert "3F8" in str(error) and "4U1" in str(error)


@pytest.mark.parametrize("rank", [0, 3])
def test_a_reduction_is_missing(rank: int) -> None:
    error = breach(without(tied(4, 4).program(4), rank, "4R1"))
    assert error.law in (2, 4)
    assert f"rank {rank} owes 4R1" in str(error) or "due on rank 0 is 4R1" in str(error)


def test_the_last_reduction_is_missing() -> None:
    error = breach(without(tied(4, 4).program(4), 3, "4R3"))
    assert (error.law, error.cell) == (4, (3, len(tied(4, 4).program(4).rows[3]) - 1))
    assert "rank 3 owes 4R3 and never runs it" in str(error)


def test_an_update_comes_before_its_reduction() -> None:
    """At home; on the guest, whose reduction the home needs before."""
    program = tied(4, 4).program(4)
    error = breach(moved(program, 0, "4U1", "4R1"))
    assert error.law == 2 and "rank 0 owes 4R1 first" in str(error)
    error = breach(moved(program, 3, "4U1", "4R1"))
    assert error.law == 2 and "rank 3 owes 4R1 first" in str(error)


def test_the_stage_steps_before_the_guests_gradients_are_in() -> None:
    error = breach(moved(tied(4, 4).program(4), 0, "0U1", "4R1"))
    assert error.law == 2
    assert "it needs 4R1, which rank 0 owes only at step" in str(error)


def test_the_value_is_sent_before_the_step() -> None:
    error = breach(moved(tied(4, 4).program(4), 0, "4U1", "0U1"))
    assert error.law == 2
    assert "it needs 0U1, which rank 0 owes only at step" in str(error)


def test_a_sum_mixes_two_windows() -> None:
    error = breach(moved(tied(4, 4).program(4), 3, "4R1", "3B9"))
    assert error.law == 4
    assert "rank 3 owes 4R1 first, or mixes two windows" in str(error)


def test_a_sum_is_not_whole() -> None:
    error = breach(moved(tied(4, 4).program(4), 3, "4R1", "3B7"))
    assert error.law == 4
    assert "only 3 of 4 backwards of window 1 are in it" in str(error)


def test_values_are_taken_in_another_order() -> None:
    error = breach(moved(tied(4, 1).program(6), 3, "4U2", "4U1"))
    assert error.law == 4
    assert "the next one due on rank 3 is 4U1" in str(error)


def test_two_weights_are_sent_in_another_order() -> None:
    planner = tied(4, 4, (0, 3), (0, 3))
    row = [str(action) for action in planner.program(4).rows[3]]
    assert row.index("4R1") < row.index("5R1")
    error = breach(moved(planner.program(4), 3, "5R1", "4R1"))
    assert error.law == 3
    assert "the next that rank 3 sends to rank 0 is 5R1" in str(error)


def test_a_value_never_comes() -> None:
    error = breach(without(tied(4, 4).program(6), 3, "4U2"))
    assert error.law == 4
    assert "the next one due on rank 3 is 4U2" in str(error)


def test_values_come_too_late() -> None:
    """A guest that goes on without them breaks the bound of the schedule."""
    program = tied(4, 4).program(8)
    for window in range(1, 7):
        program = without(program, 3, f"4U{window}")
    error = breach(program)
    assert error.law == 4
    assert "rank 3 owes 4U1 and never runs it" in str(error)


def test_a_tied_weight_is_forwarded() -> None:
    program = tied(4, 4).program(4)
    rows = list(program.rows)
    rows[3] = (*rows[3], Action(4, FORWARD, 0))
    error = breach(Program(program.schedule, program.windows, tuple(rows)))
    assert error.law == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tied": ((3, 0),)}, "ascending"),
        ({"tied": ((4, 5),)}, "two or more of the 4 stages"),
        ({"tied": ((0,),)}, "two or more"),
        ({"tied": ((0, 4),)}, "of the 4 stages"),
        ({"tied": ((0, 3),), "weights": "stashed", "weight_versions": (2, 2, 2, 2)}, "the latest"),
        ({"tied": ((0, 3),), "decisions": "meeting"}, "the host sums the gradients of tied weights"),
        ({"tied": ((1, 3),), "decisions": "relayed"}, "where updates stand 1 backwards late"),
    ],
)
def test_what_cannot_be_tied(options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(schedules.make("paci", 4, 4), **options)


def test_several_directions_cannot_be_tied() -> None:
    with pytest.raises(ValueError, match="in one direction, not in 2; use a schedule whose updates meet"):
        replace(made(BIDIRECTIONAL, 4), tied=((0, 3),))


@pytest.mark.parametrize(("stages", "size", "values", "sums"), [(8, 8, (1, 2), (1, 1)), (8, 1, (1, 6), (1, 6))])
def test_what_the_report_says(stages: int, size: int, values: tuple[int, ...], sums: tuple[int, ...]) -> None:
    """Where windows are short, several are under way, each with a sum that is sent and a value that comes."""
    found = report(tied(stages, size), 1)
    (weight,) = found.tied
    assert (weight.unit, weight.stages) == (stages, (0, stages - 1))
    assert (weight.values, weight.sums) == (values, sums)
    assert weight.mean_staleness[0] == pytest.approx((stages - 1) / size)
    assert weight.mean_staleness[1] <= weight.mean_staleness[0] < weight.staleness[0] + 1e-9
    plain = report(Planner(schedules.make("paci", stages, size)), 1)
    assert found.mean_staleness_by_stage == plain.mean_staleness_by_stage
    assert "tied weight" in found.to_text() and f"of the stages 0 {stages - 1}" in found.to_text()


def test_decisions_go_on_as_without_it() -> None:
    """Which sums an update may take; each is made after the guests' gradients are in."""
    planner = tied(4, 4, decisions="latest")
    plain = Planner(schedules.make("paci", 4, 4, decisions="latest"))
    assert windows_ago(planner) == windows_ago(plain)
    check_decisions(planner.program(WINDOWS), windows_ago(planner))


def test_buffers_are_enough() -> None:
    """Counted by hand on a guest: sums that are sent until the new value comes."""
    planner = tied(6, 2)
    (weight,) = tied_weights(planner, planner.settled_windows())
    under_way = most = 0
    for action in planner.program(planner.settled_windows().stop).rows[5]:
        under_way += Counter({REDUCE: 1, UPDATE: -1})[action.kind] if action.stage == 6 else 0
        most = max(most, under_way)
    assert weight.sums[1] == most == 2


def test_options_make_the_schedule_again() -> None:
    """As a record of a run keeps them."""
    schedule = tied(4, 4, (0, 3), (1, 2)).schedule
    kept = json.loads(json.dumps(schedule.options))
    assert schedules.make("paci", 4, 4, **kept) == schedule
