"""Which weights the schedules use that keep more than the latest, and that no more are in use than they state."""

from __future__ import annotations

from dataclasses import replace

import pytest

from amdp_plugin.plan.entry_versions import EntryVersions
from amdp_plugin.plan.laws import ProgramError
from amdp_plugin.plan.planner import Planner
from amdp_plugin.plan.report import report
from amdp_plugin.plan.schedules import make
from amdp_plugin.plan.verify import verify
from amdp_plugin.plan.versions import versions

SHAPES = [(1, 1), (2, 1), (2, 4), (4, 1), (4, 2), (4, 4), (4, 7), (8, 8)]


@pytest.mark.parametrize(("stages", "size"), SHAPES)
def test_pipedream_is_late_as_paci_is_and_uses_one_version(stages: int, size: int) -> None:
    stashed, latest = (
        versions(Planner(make(name, stages, size)).program(9)) for name in ("pipedream", "paci")
    )
    assert stashed.keys() == latest.keys()
    for place, version in stashed.items():
        assert (version.forward, version.applied) == (latest[place].forward, latest[place].applied)
        assert version.backward == version.forward


@pytest.mark.parametrize(("stages", "size"), SHAPES)
def test_with_vertical_sync_a_micro_batch_meets_one_version_on_all_stages(stages: int, size: int) -> None:
    planner = Planner(make("pipedream", stages, size, vertical_sync=True))
    entries, latest = EntryVersions(planner), versions(Planner(make("paci", stages, size)).program(9))
    found = versions(planner.program(9))
    for number in range(9 * size):
        met = latest[0, number].forward
        assert entries.enter(number) == met <= entries.oldest
        assert {found[stage, number] for stage in range(stages)} == {(met, met, number // size)}
    planned = report(planner, windows=1)
    assert planned.max_staleness == -(-(stages - 1) // size) and planned.max_version_gap == 0
    assert planned.weight_copies_by_rank == ((2 + -(-(stages - 1) // size)) if stages > 1 else 1,) * stages


@pytest.mark.parametrize(("stages", "size"), SHAPES)
def test_2bw_is_late_by_one_update(stages: int, size: int) -> None:
    for (_, index), version in versions(Planner(make("pipedream-2bw", stages, size)).program(9)).items():
        window = index // size
        assert version == (max(0, window - 1), max(0, window - 1), window)


@pytest.mark.parametrize(("stages", "size"), SHAPES)
def test_with_windows_as_long_as_the_pipeline_2bw_never_waits(stages: int, size: int) -> None:
    found = report(Planner(make("pipedream-2bw", stages, size)), windows=1)
    assert (found.utilization == 1.0) == (size >= stages - 1)
    assert found.max_version_gap == 0 and found.max_staleness == 1


@pytest.mark.parametrize(
    ("name", "size", "stated", "said"),
    [
        ("pipedream", 1, (3, 3, 2, 1), r"versions \[0, 1, 2, 3\] of its weights are in use, at most 3 are stated"),
        ("pipedream-2bw", 4, (1, 2, 2, 2), r"versions \[0, 1\] of its weights are in use, at most 1 are stated"),
    ],
)
def test_more_versions_than_stated_are_a_breach(name: str, size: int, stated: tuple[int, ...], said: str) -> None:
    liar = replace(make(name, 4, size), weight_versions=stated)
    with pytest.raises(ProgramError, match=said):
        verify(Planner(liar).program(6))


def test_what_is_forwarded_before_a_meeting_keeps_its_version_after_it() -> None:
    """On the last stage, too, whose forward is followed by its backward where nobody meets."""
    schedule = make("pipedream", 4, 4, decisions="meeting")
    assert schedule.weight_versions == (2, 2, 2, 2) and schedule.max_gap == (0, 0, 0, 0)
    verify(Planner(schedule).program(6))
    liar = replace(schedule, weight_versions=make("pipedream", 4, 4).weight_versions)
    with pytest.raises(ProgramError, match=r"versions \[0, 1\] of its weights are in use, at most 1 are stated"):
        verify(Planner(liar).program(6))
