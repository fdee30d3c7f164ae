"""How far weights are extrapolated: the papers' figures where the plan is the papers', and the plan's elsewhere."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from amdp_plugin.plan.costs import CostModel
from amdp_plugin.plan.extrapolation import Extrapolation, planned_extrapolation
from amdp_plugin.plan.planner import Planner
from amdp_plugin.plan.report import report
from amdp_plugin.plan.schedules import make
from amdp_plugin.plan.versions import versions


def planned(name: str, stages: int, size: int, backward_ratio: float = 1.0, **options: object) -> Extrapolation:
    costs = CostModel.relative(stages, backward_ratio=backward_ratio)
    found = planned_extrapolation(Planner(make(name, stages, size, **options), costs))
    assert found is not None
    return found


@pytest.mark.parametrize("stages", range(1, 10))
@pytest.mark.parametrize("name", ["spectrain", "xpipe"])
def test_with_windows_of_one_the_version_differences_are_spectrains(name: str, stages: int) -> None:
    """N - s - 1 + floor(s / 2) and floor(s / 2), under backwards as long as forwards, as the authors count time."""
    found = planned(name, stages, 1)
    assert found.most_ahead == tuple(stages - stage - 1 + stage // 2 for stage in range(stages))
    assert found.lead == tuple(stage // 2 for stage in range(stages))


@pytest.mark.parametrize(("stages", "size"), [(4, 2), (4, 4), (8, 3), (8, 8), (8, 16), (9, 2)])
def test_with_longer_windows_backwards_are_xpipes(stages: int, size: int) -> None:
    """floor((T - 1 + floor(s / 2)) / T)."""
    assert planned("xpipe", stages, size).lead == tuple((size - 1 + stage // 2) // size for stage in range(stages))


def test_longer_backwards_leave_time_for_fewer_updates() -> None:
    """Stage 7 of 8: seven backwards of 2, in which it does as many micro-batches of 3 as begin less than 12 after."""
    assert planned("spectrain", 8, 1, backward_ratio=2.0).lead == (0, 0, 1, 2, 2, 3, 4, 4)


@pytest.mark.parametrize("name", ["spectrain", "xpipe"])
@pytest.mark.parametrize(("stages", "size"), [(4, 1), (5, 2), (8, 8)])
def test_every_pass_of_a_stage_looks_to_one_version(name: str, stages: int, size: int) -> None:
    found = planned(name, stages, size)
    program = Planner(make(name, stages, size)).program(9)
    for (stage, number), version in versions(program).items():
        window = number // size
        forward = version.forward + found.forward_steps(stage, window, version.forward)
        backward = version.backward + found.backward_steps(stage, window, version.forward, version.backward)
        assert forward == backward == window + found.lead[stage]


def test_pipemare_goes_back_by_the_gap_of_each_micro_batch() -> None:
    found = planned("pipemare", 4, 2, correction_decay=0.25)
    for (stage, number), version in versions(Planner(make("pipemare", 4, 2)).program(9)).items():
        assert found.forward_steps(stage, number // 2, version.forward) == 0
        assert found.backward_steps(stage, number // 2, version.forward, version.backward) == -version.gap
    assert found.max_gap == (2, 1, 1, 0)
    assert [found.decay(stage) for stage in range(4)] == [0.5, 0.25, 0.25, None]


def test_pipemare_rescales_what_is_late_by_more_than_an_update() -> None:
    found = planned("pipemare", 8, 2, rescale_steps=4)
    assert found.divisors == (3.5, 3.0, 2.5, 2.0, 1.5, 1.0, 1.0, 1.0)
    assert [found.divisor(3, update) for update in range(6)] == pytest.approx([2, 2**0.75, 2**0.5, 2**0.25, 1, 1])
    assert found.divisor(7, 0) == 1.0


@pytest.mark.parametrize("name", ["paci", "pipedream"])
def test_any_schedule_may_rescale_its_rates(name: str) -> None:
    found = planned_extrapolation(Planner(replace(make(name, 3, 1), rescale_steps=2)))
    assert found is not None and found.divisors == (2.0, 1.0, 1.0)
    assert found.backward_steps(0, 4, 2, 4) == found.forward_steps(0, 4, 2) == found.copies(0) == 0
    assert str(found) == "learning rates are divided at first by 2 1 1, by 1 after 2 updates"


def test_rates_are_rescaled_from_where_the_pipeline_runs_freely() -> None:
    found = planned("pipemare", 3, 1, rescale_steps=2, flush_first=3)
    assert [found.divisor(0, update) for update in range(6)] == pytest.approx([1, 1, 1, 2, 2**0.5, 1])


def test_without_rescaling_rates_are_whole() -> None:
    found = planned("pipemare", 3, 1, rescale_steps=0)
    assert found.divisor(0, 0) == 1.0 and "learning rates are whole" in str(found)


@pytest.mark.parametrize(
    ("name", "size", "copies"),
    [
        ("pipemare", 4, (3, 3, 3, 1)),
        ("spectrain", 1, (2, 2, 2, 2)),
        ("xpipe", 4, (3, 3, 3, 3)),
        ("paci", 4, (1, 1, 1, 1)),
    ],
)
def test_weight_copies(name: str, size: int, copies: tuple[int, ...]) -> None:
    found = report(Planner(make(name, 4, size), CostModel.relative(4, backward_ratio=1.0)), 1)
    assert (found.extrapolation is None) == (name == "paci")
    assert ("\nweights  " in found.to_text()) == (name != "paci")
    assert json.loads(found.to_json())["weight_copies_by_rank"] == list(found.weight_copies_by_rank)
    assert found.weight_copies_by_rank == copies


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"correction_decay": 0.0}, "correction_decay is of corrected weights, above 0 and below 1.*got 0.0 for corr"),
        ({"correction_decay": 1.0}, "got 1.0 for corrected weights"),
        ({"weights": "latest"}, "and 0 of others; got 0.135 for latest weights"),
        ({"rescale_steps": -1}, "rescale_steps counts updates, at least 0.*got -1"),
        ({"compensation": "error_feedback"}, "its corrected weights are a compensation already"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(make("pipemare", 4, 4), **changes)


def test_the_opening_extrapolates_nothing() -> None:
    for name in ("pipemare", "spectrain", "xpipe"):
        opening = make(name, 4, 4, flush_first=2).opening()
        assert opening is not None and not opening.extrapolates
        assert planned_extrapolation(Planner(opening)) is None
