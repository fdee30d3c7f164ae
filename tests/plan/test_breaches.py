"""Programs that break a law: each is caught, with the law, the cell and who owes it."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amdp_plugin.plan import schedules
from amdp_plugin.plan.action import Action
from amdp_plugin.plan.costs import CostModel
from amdp_plugin.plan.laws import ProgramError
from amdp_plugin.plan.planner import Planner
from amdp_plugin.plan.program import Program
from amdp_plugin.plan.schedule import Schedule
from amdp_plugin.plan.verify import verify

from .strategies import BIDIRECTIONAL, ONE_HOME, ROUND, cases, made, shifted_pairs, with_row


def paci(stages=4, micro_batches=4, windows=3) -> Program:
    return Planner(schedules.make("paci", stages, micro_batches)).program(windows)


def breach(program: Program) -> ProgramError:
    with pytest.raises(ProgramError) as caught:
        verify(program)
    return caught.value


def without(program: Program, rank: int, cell: str) -> Program:
    return with_row(program, rank, (action for action in program.rows[rank] if str(action) != cell))


def moved(program: Program, rank: int, cell: str, before: str) -> Program:
    """``cell`` taken out of the row and put in front of ``before``."""
    row = [action for action in program.rows[rank] if str(action) != cell]
    row.insert([str(action) for action in row].index(before), Action.parse(cell))
    return with_row(program, rank, row)


@pytest.mark.parametrize("cell", ["1F2", "1B5", "1F0", "1B11"])
def test_an_action_is_missing(cell):
    error = breach(without(paci(), 1, cell))
    assert error.law == 1
    assert error.cell == (1, len(paci().rows[1]) - 1)
    assert f"rank 1 owes {cell} and never runs it" in str(error)
    assert "[end]" in str(error)


@pytest.mark.parametrize("cell", ["2F3", "2B3", "2U1"])
def test_an_action_runs_twice(cell):
    program = paci()
    row = program.rows[2]
    error = breach(with_row(program, 2, (*row, Action.parse(cell))))
    assert error.law == 1
    assert error.cell == (2, len(row))
    assert f"rank 2 has run {cell} before" in str(error)
    assert f"[{cell}]" in str(error)


def test_an_action_stands_on_a_rank_without_its_stage():
    program = without(paci(), 1, "1F3")
    row = program.rows[2]
    error = breach(with_row(program, 2, (*row[:5], Action.parse("1F3"), *row[5:])))
    assert (error.law, error.cell) == (1, (2, 5))
    assert "rank 2 holds the stages (2,), not 1" in str(error)


def test_an_action_stands_on_a_replica_of_another_direction():
    program = without(Planner(made(BIDIRECTIONAL, 4)).program(2), 1, "1F2")
    row = program.rows[2]
    error = breach(with_row(program, 2, (*row[:3], Action.parse("1F2"), *row[3:])))
    assert (error.law, error.cell) == (1, (2, 3))
    assert "it belongs to rank 1" in str(error)


def test_a_rank_is_missing():
    program = paci()
    error = breach(Program(program.schedule, program.windows, program.rows[:-1]))
    assert (error.law, error.cell) == (1, None)
    assert "it has 4 ranks, the program has 3 rows" in str(error)


def test_an_update_is_missing():
    program = without(paci(), 1, "1U0")
    error = breach(program)
    assert error.law == 4
    assert error.cell == (1, program.rows[1].index(Action.parse("1B4")))
    assert "rank 1 owes 1U0 first" in str(error)


def test_the_last_update_is_missing():
    program = without(paci(), 3, "3U2")
    error = breach(program)
    assert (error.law, error.cell) == (4, (3, len(program.rows[3])))
    assert "rank 3 owes 3U2 and never runs it" in str(error)


def test_the_last_update_of_a_replica_is_missing():
    error = breach(without(Planner(made(BIDIRECTIONAL, 4)).program(2), 2, "1U1"))
    assert error.law == 4
    assert "rank 2 owes 1U1 and never runs it" in str(error)


def test_an_update_comes_too_early():
    program = moved(paci(), 1, "1U0", before="1B3")
    error = breach(program)
    assert (error.law, error.cell) == (4, (1, program.rows[1].index(Action.parse("1U0"))))
    assert "only 3 of 4 backwards of window 0 are in it" in str(error)


def test_an_update_comes_too_late():
    program = moved(paci(), 1, "1U0", before="1B5")
    error = breach(program)
    assert (error.law, error.cell) == (4, (1, program.rows[1].index(Action.parse("1B4"))))


def test_a_delayed_update_may_stand_later_but_not_later_than_stated():
    program = Planner(made(schedules.make("paci", 3, 4).placement, 4, update_delay=2)).program(3)
    verify(program)
    verify(moved(program, 1, "1U0", before="1B5"))
    error = breach(moved(program, 1, "1U0", before="1B7"))
    assert error.law == 4


def test_updates_come_out_of_turn():
    program = moved(paci(), 1, "1U1", before="1U0")
    error = breach(program)
    assert error.law == 4
    assert "the next one due on rank 1 is 1U0" in str(error)


def test_a_backward_stands_before_its_forward():
    program = moved(paci(), 1, "1B2", before="1F2")
    error = breach(program)
    assert (error.law, error.cell) == (2, (1, program.rows[1].index(Action.parse("1B2"))))
    assert "it needs 1F2, which rank 1 owes only at step" in str(error)


def test_a_message_is_never_sent():
    """Beyond the windows of the program, so that no count is short: a forward that rank 0 never runs."""
    program = paci()
    beyond = Action.parse("1F15")
    row = (*program.rows[1], beyond)
    error = breach(with_row(program, 1, row))
    assert (error.law, error.cell) == (2, (1, len(row) - 1))
    assert "it needs 0F15, which rank 0 owes and never runs" in str(error)


def test_two_ranks_wait_for_each_other():
    program = Planner(schedules.make("1f1b", 2, 2)).program(1)
    blocked = moved(program, 0, "0F1", before="0U0")
    blocked = moved(blocked, 1, "1F1", before="1B0")
    error = breach(blocked)
    assert error.law == 3
    assert error.cell == (0, 1)
    assert "it needs 1B0, which rank 1 owes only at step 2" in str(error)
    assert "but rank 1 itself waits at 1F1 for 0F1 of rank 0" in str(error)


def test_a_flushing_schedule_forwards_before_its_update():
    program = moved(Planner(schedules.make("1f1b", 3, 4)).program(2), 1, "1F4", before="1U0")
    error = breach(program)
    assert error.law == 6
    assert "it needs 1U0" in str(error)


def test_a_forward_stands_beyond_a_flush_before_its_update():
    program = Planner(schedules.make("paci", 3, 4, flush_every=2)).program(4)
    row = [str(action) for action in program.rows[1]]
    assert row.index("1F4") < row.index("1U0"), "windows between two flushes flow"
    error = breach(moved(program, 1, "1F8", before="1U1"))
    assert error.law == 6
    assert "breaks law 6 (flush: " in str(error)
    assert "it needs 1U1" in str(error)


def test_the_gap_is_above_the_stated_bound():
    program = paci()
    stingy = replace(program.schedule, max_gap=(1, 0, 1, 0))
    error = breach(Program(stingy, program.windows, program.rows))
    assert error.law == 5
    assert str(error).startswith("paci breaks law 5 (bounds: the gap and what is in flight stay within what ")
    assert error.cell is not None and error.cell[0] == 1
    assert "the gap is 1 updates, at most 0 are stated" in str(error)


def test_more_is_in_flight_than_stated():
    program = paci()
    stingy = replace(program.schedule, in_flight=(4, 3, 1, 1))
    error = breach(Program(stingy, program.windows, program.rows))
    assert (error.law, error.cell) == (5, (2, 1))
    assert "2 micro-batches in flight on stage 2, at most 1 are stated" in str(error)


def _swapped_messages(program: Program):
    """For every rank, the program with two of its messages to one receiver swapped, of one kind and next to each
    other."""
    schedule = program.schedule
    for rank, row in enumerate(program.rows):
        for at, (first, then) in enumerate(pairwise(row)):
            if first.kind == then.kind and _receivers(schedule, rank, first) & _receivers(schedule, rank, then):
                yield with_row(program, rank, (*row[:at], then, first, *row[at + 2 :]))


def _receivers(schedule: Schedule, rank: int, action: Action) -> set[int]:
    """Of the message that a guest's reduction and a home's update is."""
    home, *guests = schedule.placement.holders[action.stage]
    return {(home, "U"): set(guests)}.get((rank, action.kind), {home} if action.kind == "R" and rank != home else set())


def test_messages_of_two_ranks_are_sent_and_used_in_different_orders():
    costs = CostModel.uniform(3, link_latency=0.1)
    program = Planner(made(ONE_HOME, 6, flush=True, admitted=4), costs).program(3)
    verify(program)
    errors = [breach(broken) for broken in _swapped_messages(program)]
    assert errors
    assert {error.law for error in errors} == {3}
    assert any("the next that rank" in str(error) for error in errors)


@pytest.mark.parametrize("placement", [BIDIRECTIONAL, shifted_pairs(8)])
def test_a_rank_enters_a_meeting_before_it_sends_what_another_needs_to_enter(placement):
    """The guest's gradients, behind its own update: its home cannot enter, so nobody goes on."""
    program = Planner(made(placement, placement.directions, together=True)).program(2)
    verify(program)
    guest = placement.holders[0][-1]
    own = next(stage for stage in range(placement.num_stages) if placement.home(stage) == guest)
    row = [action for action in program.rows[guest] if action != Action(0, "R", 0)]
    row.insert(row.index(Action(own, "U", 0)) + 1, Action(0, "R", 0))
    error = breach(with_row(program, guest, row))
    assert error.law == 3
    circle = str(error).splitlines()[0]
    assert f"{own}U0" in circle
    assert f"0R0 of rank {guest}" in circle or f"0R0, which rank {guest} owes" in circle


def test_three_ranks_wait_in_a_circle_that_is_named():
    """Each waits for the gradients that another sends behind its own; no two wait for each other."""
    forwards = [(0, 0, 0), (1, 1, 0), (2, 2, 0), (1, 0, 1), (2, 1, 1), (0, 2, 1)]
    schedule = made(ROUND, 2, flush=True, admitted=1)
    rows: list[list[Action]] = [[], [], []]
    for rank, stage, micro_batch in forwards:
        rows[rank].append(Action(stage, "F", micro_batch))
    for rank, stage, micro_batch in reversed(forwards):
        rows[rank].append(Action(stage, "B", micro_batch))
    for rank, guest in enumerate([2, 0, 1]):
        rows[rank] += [Action(rank, "R", 0), Action(guest, "R", 0), Action(rank, "U", 0), Action(guest, "U", 0)]
    error = breach(Program(schedule, 1, tuple(map(tuple, rows))))
    assert error.law == 3
    assert "it needs 0R0, which rank 1 owes only at step 5" in str(error)
    assert all(f"rank {a} itself waits at {a}R0 for {a}R0 of rank {b}" in str(error) for a, b in ((1, 2), (2, 0)))
    rows[0][-4:-2] = reversed(rows[0][-4:-2])
    verify(Program(schedule, 1, tuple(map(tuple, rows))))


def test_gradients_are_reduced_before_those_of_the_window_before_were_applied():
    """There is one buffer for parked gradients."""
    program = Planner(made(BIDIRECTIONAL, 2, update_delay=1, together=True)).program(3)
    verify(program)
    row = [action for action in program.rows[3] if action != Action(0, "U", 0)]
    row.insert(row.index(Action(0, "R", 1)) + 1, Action(0, "U", 0))
    error = breach(with_row(program, 3, row))
    assert error.law == 4
    assert "the next one due on rank 3 is 0R0" in str(error)


@settings(deadline=None, max_examples=150)
@given(cases(), st.data())
def test_no_action_of_a_complete_window_can_be_dropped(case, data):
    schedule, costs = case
    program = Planner(schedule, costs).program(2)
    rank = data.draw(st.integers(0, schedule.num_ranks - 1))
    row = program.rows[rank]
    due = [
        at
        for at, action in enumerate(row)
        if action.window(schedule.micro_batches) < 2 and (action.kind in "FB" or not any(schedule.update_delay))
    ]
    at = data.draw(st.sampled_from(due))
    error = breach(with_row(program, rank, (*row[:at], *row[at + 1 :])))
    assert error.law == (1 if row[at].kind in "FB" else 4 if row[at].kind == "U" else 2)


@settings(deadline=None, max_examples=150)
@given(cases(), st.data())
def test_dependent_neighbours_cannot_change_places(case, data):
    schedule, costs = case
    program = Planner(schedule, costs).program(2)
    pairs = [
        (rank, at)
        for rank, row in enumerate(program.rows)
        for at in range(len(row) - 1)
        if (rank, row[at]) in schedule.dependencies(rank, row[at + 1])
    ]
    if not pairs:
        return
    rank, at = data.draw(st.sampled_from(pairs))
    row = program.rows[rank]
    error = breach(with_row(program, rank, (*row[:at], row[at + 1], row[at], *row[at + 2 :])))
    assert error.law in (2, 4, 6)


def test_the_grid_of_a_large_program_stays_readable():
    program = without(paci(64, 64, windows=1), 30, "30B20")
    lines = str(breach(program)).splitlines()
    assert len(lines) < 15
    assert max(map(len, lines[1:])) < 140
