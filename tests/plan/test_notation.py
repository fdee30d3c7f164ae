"""Actions and programs as text and as CSV, and what torch makes of the latter."""

import csv
import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amdp_plugin.plan import schedules
from amdp_plugin.plan.action import Action
from amdp_plugin.plan.planner import Planner
from amdp_plugin.plan.program import Program

from .strategies import cases

ACTIONS = st.builds(Action, st.integers(0, 99), st.sampled_from("FBRU"), st.integers(0, 9999))


@given(ACTIONS)
def test_text_round_trip(action):
    assert Action.parse(str(action)) == action
    assert str(Action.parse(f" {action} ")) == str(action)


def test_notation_is_that_of_torch():
    assert str(Action(2, "F", 5)) == "2F5"
    assert Action.parse("12U3") == (12, "U", 3)


@pytest.mark.parametrize("text", ["", "2X5", "F5", "2F", "2F5 3B1", "-1F2", "2f5", "2F5.0"])
def test_anything_else_is_refused(text):
    with pytest.raises(ValueError, match="is not an action: write STAGE, then F"):
        Action.parse(text)


@given(ACTIONS, st.integers(0, 9), st.integers(1, 9))
def test_shifting_moves_the_window(action, windows, micro_batches):
    moved = action.shifted(windows, micro_batches)
    assert moved.window(micro_batches) == action.window(micro_batches) + windows
    assert moved.shifted(-windows, micro_batches) == action


@settings(deadline=None, max_examples=100)
@given(cases(), st.integers(1, 4))
def test_csv_round_trip(case, windows):
    schedule, costs = case
    program = Planner(schedule, costs).program(windows)
    text = program.to_csv()
    assert len(text.splitlines()) == schedule.num_ranks
    assert Program.from_csv(text, schedule) == program


def test_csv_by_hand():
    program = Planner(schedules.make("1f1b", 2, 2)).program(1)
    assert program.to_csv() == "0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n"
    assert [str(action) for action in program.rows[1]] == ["1F0", "1B0", "1F1", "1B1", "1U0"]
    free = Planner(schedules.make("paci", 2, 1)).program(1)
    assert free.to_csv() == "0F0,0F1,0B0,0U0\n1F0,1B0,1U0\n"


def test_csv_counts_the_windows_that_every_rank_completes():
    schedule = schedules.make("paci", 2, 2)
    text = Planner(schedule).program(2).to_csv()
    assert Program.from_csv(text, schedule).windows == 2
    assert Program.from_csv(text.replace("1B3,", ""), schedule).windows == 1


def test_csv_of_another_schedule_is_refused():
    with pytest.raises(ValueError, match="1f1b has 2 ranks, the text has 1 rows"):
        Program.from_csv("0F0,0B0\n", schedules.make("1f1b", 2, 1))
    with pytest.raises(ValueError, match="'0Q0' is not an action"):
        Program.from_csv("0Q0\n", schedules.make("1f1b", 1, 1))


@pytest.mark.parametrize("name", ["1f1b", "gpipe"])
@pytest.mark.parametrize("stages,micro_batches,windows", [(2, 2, 1), (4, 8, 1), (4, 3, 2), (8, 8, 2)])
def test_torch_lowers_a_flushing_program_to_its_own_sends_and_receives(name, stages, micro_batches, windows):
    """Read, validated and lowered with communication as torch does with a compute-only CSV."""
    pipelining = pytest.importorskip("torch.distributed.pipelining.schedules")
    text = Planner(schedules.make(name, stages, micro_batches)).program(windows).to_csv()
    rows = list(csv.reader(io.StringIO(text)))
    actions = {rank: [pipelining._Action.from_str(cell) for cell in row] for rank, row in enumerate(rows)}
    assert pipelining._validate_schedule(actions, stages, stages, micro_batches * windows) == {
        stage: stage for stage in range(stages)
    }
    lowered = pipelining._add_send_recv(actions, stage_to_rank=lambda stage: stage, num_stages=stages)
    for rank, row in lowered.items():
        compute = [str(action) for action in row if action.is_compute_op]
        assert compute == rows[rank]
        sends = sum("SEND" in str(action) for action in row)
        ends = (rank == 0) + (rank == stages - 1)
        assert sends == (2 - ends) * micro_batches * windows
