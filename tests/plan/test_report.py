"""The figures, against the formulas of the papers."""

import json
from dataclasses import replace
from math import ceil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amdp_plugin.plan import schedules
from amdp_plugin.plan.costs import CostModel
from amdp_plugin.plan.laws import ProgramError
from amdp_plugin.plan.placement import Placement
from amdp_plugin.plan.planner import Planner
from amdp_plugin.plan.report import report
from amdp_plugin.plan.simulate import simulate, steady_state

from .strategies import BIDIRECTIONAL, cases, made

KEYS = {
    "schedule",
    "stages",
    "ranks",
    "directions",
    "micro_batches",
    "windows",
    "utilization",
    "bubble",
    "max_version_gap",
    "version_gap_by_stage",
    "mismatched_by_stage",
    "peak_in_flight_by_rank",
    "weight_copies_by_rank",
    "deadlock_free",
}
SIZES = st.tuples(st.integers(1, 12), st.integers(1, 16))
QUICK = settings(deadline=None, max_examples=40)


def figures(name, stages, micro_batches, costs=None, **options):
    return report(Planner(schedules.make(name, stages, micro_batches, **options), costs), windows=4)


@QUICK
@given(SIZES, st.sampled_from([1.0, 1.5, 2.0, 3.0]))
def test_paci(size, backward_ratio):
    stages, micro_batches = size
    found = figures("paci", stages, micro_batches, CostModel.uniform(stages, backward_ratio=backward_ratio))
    assert found.max_version_gap == found.max_version_gap_stated == ceil((stages - 1) / micro_batches)
    assert found.version_gap_by_stage == tuple(ceil((stages - 1 - s) / micro_batches) for s in range(stages))
    assert found.mismatched_by_stage == tuple(min(stages - 1 - s, micro_batches) for s in range(stages))
    assert found.peak_in_flight_by_rank == tuple(stages - s for s in range(stages))
    assert found.weight_copies_by_rank == (1,) * stages
    assert found.utilization > 0.995
    assert found.deadlock_free
    assert found.forwards_per_window == pytest.approx(micro_batches * (1 + backward_ratio))


@QUICK
@given(SIZES)
def test_1f1b(size):
    stages, micro_batches = size
    found = figures("1f1b", stages, micro_batches)
    assert found.utilization == pytest.approx(micro_batches / (micro_batches + stages - 1))
    assert found.bubble == pytest.approx((stages - 1) / (micro_batches + stages - 1))
    assert (found.max_version_gap, found.max_staleness) == (0, 0)
    assert found.mismatched_by_stage == (0,) * stages
    assert found.peak_in_flight_by_rank == tuple(min(stages - s, micro_batches) for s in range(stages))


@QUICK
@given(SIZES)
def test_gpipe(size):
    stages, micro_batches = size
    found = figures("gpipe", stages, micro_batches)
    assert found.utilization == pytest.approx(micro_batches / (micro_batches + stages - 1))
    assert found.peak_in_flight_by_rank == (micro_batches,) * stages
    assert found.max_version_gap == 0


def test_a_free_running_pipeline_against_a_flush_over_twenty_windows():
    """The figures of a published comparison at depth 8, windows of 8: 0.958 with the fill, and 0.533."""
    planner = Planner(schedules.make("paci", 8, 8))
    assert simulate(planner.program(20), planner.costs).utilization(0, 20) == pytest.approx(0.958, abs=0.0005)
    assert figures("1f1b", 8, 8).utilization == pytest.approx(0.533, abs=0.0005)


@pytest.mark.parametrize("link", [0.1, 0.25, 0.5])
def test_links_slow_a_strict_alternation_and_more_in_flight_hides_them(link):
    costs = CostModel.uniform(8, link_latency=link)
    strict, ample = figures("paci", 8, 8, costs), figures("paci", 8, 8, costs, extra_in_flight=8)
    round_trip = 8 * 3 + 2 * 7 * link
    assert strict.forwards_per_window == pytest.approx(round_trip), "8 in flight on the first stage"
    assert ample.utilization > 0.995
    assert ample.max_version_gap == 2


def test_the_slowest_stage_sets_the_pace():
    costs = CostModel((1.0, 2.0, 1.0), (2.0, 4.0, 2.0), (0.0,) * 3)
    found = figures("paci", 3, 4, costs, extra_in_flight=1)
    assert found.seconds_per_window == pytest.approx(4 * 6.0)
    assert found.utilization == pytest.approx((3 + 6 + 3) / (3 * 6))
    assert found.forwards_per_window == pytest.approx(4 * 6.0 / (4 / 3))


def test_updates_that_take_time_count_as_work():
    costs = CostModel.uniform(2, update=1.0)
    found = figures("paci", 2, 2, costs)
    assert found.seconds_per_window == pytest.approx(2 * 3 + 1)
    assert found.utilization == pytest.approx(1.0)


@pytest.mark.parametrize("windows", [1, 4, 9])
def test_the_figures_do_not_depend_on_the_windows_shown(windows):
    planner = Planner(schedules.make("paci", 8, 2))
    first = report(planner, 1)
    found = report(planner, windows)
    assert found.windows == windows
    assert found.max_version_gap == first.max_version_gap == 4
    assert found.utilization == first.utilization


@settings(deadline=None, max_examples=60)
@given(cases())
def test_json_holds_every_figure(case):
    schedule, costs = case
    found = json.loads(report(Planner(schedule, costs), 3).to_json())
    assert found.keys() >= KEYS
    assert found["utilization"] + found["bubble"] == pytest.approx(1)
    assert 0 < found["utilization"] <= 1
    assert found["deadlock_free"] is True
    assert len(found["version_gap_by_stage"]) == len(found["mismatched_by_stage"]) == schedule.num_stages
    assert len(found["peak_in_flight_by_rank"]) == len(found["weight_copies_by_rank"]) == schedule.num_ranks
    assert found["max_version_gap"] == max(found["version_gap_by_stage"]) <= found["max_version_gap_stated"]
    for gap, mismatched in zip(found["version_gap_by_stage"], found["mismatched_by_stage"], strict=True):
        assert gap > 0 or mismatched == 0


def test_weight_copies_count_the_stages_that_a_rank_holds():
    assert report(Planner(made(BIDIRECTIONAL, 4)), 2).weight_copies_by_rank == (2, 2, 2, 2)


def test_what_is_in_flight_counts_the_windows_that_end_with_a_flush():
    schedule = schedules.make("amdp", 4, 8, decisions="meeting", flush_first=1)
    opening = report(Planner(schedule.opening()), windows=1)
    found = report(Planner(schedule), windows=1)
    later = report(Planner(replace(schedule, flush_first=0)), windows=1)
    assert opening.peak_in_flight_by_rank > later.peak_in_flight_by_rank
    assert found.peak_in_flight_by_rank == opening.peak_in_flight_by_rank


def test_versions_in_use_cost_a_copy_each_beside_what_is_stepped():
    assert figures("pipedream", 4, 1).weight_copies_by_rank == (5, 4, 3, 1)
    assert figures("pipedream-2bw", 4, 4).weight_copies_by_rank == (3, 3, 3, 3)


def test_a_schedule_that_lies_about_its_gap_is_refused():
    liar = made(Placement.one_direction(4), 2, admitted=4, max_gap=0)
    with pytest.raises(ProgramError, match="breaks law 5"):
        report(Planner(liar), 1)


def test_a_gap_that_shows_only_after_the_windows_asked_for_is_found():
    """The first window is always free of it."""
    assert figures("paci", 6, 3).max_version_gap == 2


def test_ranks_that_wait_for_each_other_are_reported(monkeypatch):
    planner = Planner(schedules.make("paci", 2, 2))

    def stuck(program):
        raise ProgramError("paci breaks law 3 at 0R0: rank 0 waits\ngrid", 3)

    monkeypatch.setattr("amdp_plugin.plan.report.verify", stuck)
    found = report(planner, 1)
    assert found.deadlock_free is False
    assert "deadlock-free  NO: paci breaks law 3 at 0R0: rank 0 waits" in found.to_text()


def test_what_gpus_need_is_said_where_it_is_asked_for():
    planner = Planner(schedules.make("amdp", 6, 12))
    assert report(planner, 1).provision is None and "on GPUs" not in report(planner, 1).to_text()
    found = report(planner, 1, on_devices=True)
    assert found.provision == (2, True)
    said = " ".join(found.to_text().split())
    assert "a home receives the gradients of 2 guests at once, and guests new weights beside those in use" in said
    assert json.loads(found.to_json())["provision"] == [2, True]
    alone = report(Planner(schedules.make("paci", 4, 4)), 1, on_devices=True)
    assert alone.provision == (1, False) and "guest" not in alone.to_text()


def test_what_repeats_is_the_same_whatever_windows_were_looked_at():
    schedule = schedules.make("amdp", 10, 20)
    fresh, used = Planner(schedule), Planner(schedule)
    used.window(fresh.steady_windows()[1] + 2)
    assert fresh.period == used.period and used.steady_windows() == fresh.steady_windows()


def test_text():
    text = figures("paci", 8, 8).to_text()
    assert text.splitlines()[0] == (
        "paci: 8 stages on 8 ranks, 1 direction, windows of 8 micro-batches, extra_in_flight = 0"
    )
    assert "1.000 in the steady state (bubble 0.000)" in text
    assert "1 update between a forward and its backward (1 stated)" in text
    assert "yes: every law holds on" in text
    assert "by stage: 7 6 5 4 3 2 1 0" in text
    assert "recomputation re-runs the forward at backward time" in text.splitlines()[-1]
    assert all(len(line) <= 60 for line in figures("paci", 40, 8).to_text(width=60).splitlines()[1:-1])


@pytest.mark.parametrize("name", ["paci", "1f1b"])
def test_steady_state_agrees_with_the_report(name):
    planner = Planner(schedules.make(name, 6, 4), CostModel.uniform(6, link_latency=0.1))
    found = report(planner, 1)
    assert steady_state(planner) == pytest.approx((found.utilization, found.seconds_per_window))


def test_a_program_made_for_one_cost_can_be_timed_under_another():
    planner = Planner(schedules.make("paci", 4, 4))
    utilization, seconds = steady_state(planner, CostModel.uniform(4, link_latency=0.5))
    assert seconds == pytest.approx(4 * 3 + 2 * 3 * 0.5)
    assert utilization == pytest.approx(12 / 15)
