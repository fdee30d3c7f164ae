"""How late gradients are in the mean, and what error feedback makes of it, against counts by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amdp_plugin.plan import schedules
from amdp_plugin.plan.placement import Placement
from amdp_plugin.plan.planner import Planner
from amdp_plugin.plan.report import report
from amdp_plugin.plan.staleness import planned_coefficient
from amdp_plugin.settings import read_schedule

from .strategies import made

FEEDBACK = {"compensation": "error_feedback"}


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 9), st.integers(1, 12), st.sampled_from([0.5, 1.0, 1.25]))
def test_paci(stages: int, micro_batches: int, strength: float) -> None:
    """A micro-batch of stage s is forwarded N - 1 - s backwards before its own: so many of M, in the mean."""
    schedule = schedules.make("paci", stages, micro_batches, **FEEDBACK, strength=strength)
    found = report(Planner(schedule), 1)
    by_stage = [(stages - 1 - stage) / micro_batches for stage in range(stages)]
    assert found.mean_staleness_by_stage == pytest.approx(by_stage)
    assert found.coefficient == pytest.approx(strength * (stages - 1) / micro_batches)
    assert planned_coefficient(Planner(schedule)) == found.coefficient


def test_flushes_in_between_by_hand() -> None:
    """Two stages, windows of two, a flush every other window. Of stage 0 one micro-batch in four is late: the third,
    forwarded before the first update; the next window begins anew."""
    schedule = schedules.make("paci", 2, 2, flush_every=2, **FEEDBACK)
    assert report(Planner(schedule), 1).mean_staleness_by_stage == (0.25, 0.0)
    assert planned_coefficient(Planner(schedule)) == 0.25


@pytest.mark.parametrize("decisions", ["local", "meeting"])
@pytest.mark.parametrize(("stages", "micro_batches"), [(4, 8), (8, 32), (6, 12)])
def test_amdp_counts_the_micro_batches_that_see_an_update(stages: int, micro_batches: int, decisions: str) -> None:
    """No gradient is late by more than one: in the mean by the share of the micro-batches that see the update."""
    planner = Planner(schedules.make("amdp", stages, micro_batches, decisions=decisions, **FEEDBACK))
    found = report(planner, 1)
    assert found.mean_staleness_by_stage == tuple(count / micro_batches for count in found.mismatched_by_stage)
    assert planned_coefficient(planner) == found.coefficient == max(found.mean_staleness_by_stage) > 0


def test_without_it_nothing_is_multiplied() -> None:
    found = report(Planner(schedules.make("paci", 8, 8)), 1)
    assert (found.compensation, found.coefficient) == ("none", None)
    assert "compensation   none; the largest mean staleness of a stage is r = 0.875" in found.to_text()
    assert found.weight_copies_by_rank == (1,) * 8


def test_report() -> None:
    """It shows r and what is multiplied, and counts the plain iterate at every home."""
    found = report(Planner(schedules.make("paci", 8, 8, **FEEDBACK, strength=0.5)), 1)
    text = " ".join(found.to_text().split())
    assert "error feedback, x = z + 0.4375 (z - z_before); the largest mean staleness of a stage is r = 0.875" in text
    assert "compensation = error_feedback, strength = 0.5" in text
    assert found.weight_copies_by_rank == (2,) * 8
    assert report(Planner(schedules.make("amdp", 4, 8, **FEEDBACK)), 1).weight_copies_by_rank == (3,) * 4


def test_report_where_there_are_masters() -> None:
    found = report(Planner(schedules.make("paci", 8, 8, **FEEDBACK)), 1, master_weights=True)
    assert found.weight_copies_by_rank == (1,) * 8
    assert "z is the master weights" in " ".join(found.to_text().split())


def test_alternatives_are_compensated_too() -> None:
    """Of them a planner chooses."""
    schedule = schedules.make("amdp", 8, 32, **FEEDBACK)
    assert schedule.alternatives
    assert {each.compensation for each in schedule.alternatives} == {"error_feedback"}
    assert Planner(schedule).schedule.compensation == "error_feedback"


def test_a_schedule_of_anybody_takes_it() -> None:
    free = made(Placement.one_direction(3), 2, admitted=3, max_gap=2)
    assert replace(free, compensation="error_feedback", strength=2.0).strength == 2.0


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "chimera"])
def test_schedules_that_flush_refuse_it(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}: compensation 'error_feedback' means nothing under a flush"):
        read_schedule({"name": name, **FEEDBACK}, "here").make(4, 4)
    with pytest.raises(ValueError, match="staleness 0"):
        schedules.make("paci", 4, 4, flush_every=1, **FEEDBACK)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compensation": "feedback"}, "'compensation' of schedule 'paci' is 'feedback'"),
        ({**FEEDBACK, "strength": 0.0}, "'strength' of schedule 'paci' is 0.0: Input should be greater than 0"),
        ({**FEEDBACK, "strength": float("inf")}, "'strength' of schedule 'paci' is inf"),
    ],
)
def test_mistakes_in_a_configuration_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_schedule({"name": "paci", **options}, "here")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compensation": "feedback"}, "paci: compensation is none or error_feedback, got 'feedback'"),
        ({**FEEDBACK, "strength": -1.0}, "paci: strength is a number above 0, got -1.0"),
    ],
)
def test_mistakes_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        schedules.make("paci", 4, 4, **options)  # type: ignore[arg-type]
