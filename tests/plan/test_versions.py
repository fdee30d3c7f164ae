"""The versions that every forward and backward meets, against a count from first principles."""

from hypothesis import given, settings
from hypothesis import strategies as st

from amdp_plugin.plan import schedules
from amdp_plugin.plan.planner import Planner
from amdp_plugin.plan.versions import versions

from .strategies import cases


@settings(deadline=None, max_examples=100)
@given(cases(), st.integers(1, 4))
def test_versions_equal_a_count_over_the_rows(case, windows):
    schedule, costs = case
    program = Planner(schedule, costs).program(windows)
    found = dict(versions(program))
    entered = {
        action.index: sum(1 for stage, kind, _ in row[:at] if (stage, kind) == (0, "U"))
        for row in program.rows
        for at, action in enumerate(row)
        if action[:2] == (0, "F")
    }
    for row in program.rows:
        for at, (stage, kind, index) in enumerate(row):
            if kind != "B":
                continue
            start = next(i for i, action in enumerate(row) if action[:] == (stage, "F", index))

            def updates(end, row=row, stage=stage):
                return sum(1 for other, kind, _ in row[:end] if kind == "U" and other == stage)

            version = found.pop((stage, index))
            expected = {
                "latest": (updates(start), updates(at)),
                "stashed": (updates(start), updates(start)),
                "previous": (max(0, version.applied - 1),) * 2,
                "synchronized": (entered[index],) * 2,
            }
            assert (version.forward, version.backward) == expected.get(schedule.weights, expected["latest"])
            assert version.forward <= updates(start)
            applied = next((i for i, action in enumerate(row) if action[:] == (stage, "U", version.applied)), None)
            assert applied is None or (at < applied and updates(applied) == version.applied)
            assert version.applied == index // schedule.micro_batches
            assert version.gap == version.backward - version.forward
            assert version.staleness == version.applied - version.forward >= version.gap
    assert not found


def test_paci_versions_by_hand():
    """Three stages, windows of two, equal stages: written out from the definition."""
    found = versions(Planner(schedules.make("paci", 3, 2)).program(3))
    gaps = {stage: [found[stage, micro_batch].gap for micro_batch in range(6)] for stage in range(3)}
    assert gaps == {0: [0, 0, 1, 1, 1, 1], 1: [0, 0, 1, 0, 1, 0], 2: [0] * 6}
