"""The registry, the options, and schedules of other packages."""

import subprocess
import sys
from dataclasses import replace
from functools import partial
from importlib.metadata import EntryPoint
from typing import Any, Literal, Optional

import pytest

from amdp_plugin.plan import schedules
from amdp_plugin.plan.action import Action
from amdp_plugin.plan.placement import Placement
from amdp_plugin.plan.planner import Planner
from amdp_plugin.plan.schedule import Schedule
from amdp_plugin.settings import read_schedule

from .strategies import BIDIRECTIONAL, made, shifted_pairs

THIRD_PARTY = '''
from amdp_plugin.plan.placement import Placement
from amdp_plugin.plan.schedule import Schedule
from amdp_plugin.settings import read_schedule

def patient(num_stages, micro_batches, *, admitted: int = 1, eager: bool = False, share: float = 0.5):
    return Schedule("patient", Placement.one_direction(num_stages), micro_batches, False,
                    (admitted,) * num_stages, (admitted,) * num_stages, options={"admitted": admitted})
'''


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Another package that brings a schedule, as pip would have installed it; its folder."""
    (tmp_path / "patient.py").write_text(THIRD_PARTY)
    info = tmp_path / "patient-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: patient\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[amdp_plugin.schedules]\npatient = patient:patient\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    schedules._third_party.cache_clear()
    yield tmp_path
    schedules._third_party.cache_clear()
    sys.modules.pop("patient", None)


def test_built_in_names():
    assert set(schedules.names()) >= {"gpipe", "1f1b", "paci"}
    assert schedules.make("paci", 4, 2).max_gap == (2, 1, 1, 0)
    assert schedules.make("paci", 4, 2, extra_in_flight=1).in_flight == (5, 4, 3, 2)
    assert schedules.make("1f1b", 4, 2).in_flight == (2, 2, 2, 1)
    assert schedules.make("gpipe", 3, 5).in_flight == (5, 5, 5)


def test_a_schedule_of_another_package(installed):
    assert "patient" in schedules.names()
    assert schedules.make("patient", 3, 2, admitted=2).in_flight == (2, 2, 2)
    assert schedules.read_option("patient", "eager", "true") is True
    assert schedules.read_option("patient", "eager", "False") is False
    assert schedules.read_option("patient", "share", "0.25") == 0.25
    with pytest.raises(ValueError, match="option eager of schedule 'patient' is true or false, got 'yes'"):
        schedules.read_option("patient", "eager", "yes")
    with pytest.raises(ValueError, match="option share of schedule 'patient' is a number, got 'half'"):
        schedules.read_option("patient", "share", "half")


def test_a_schedule_of_another_package_in_the_command(installed):
    code = (
        f"import sys; sys.path.insert(0, {str(installed)!r}); from amdp_plugin.cli import main; "
        "sys.exit(main(['plan', '--schedule', 'patient', '--stages', '3', '--micro-batches', '2']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("patient: 3 stages on 3 ranks")


def test_another_package_cannot_replace_a_built_in_one(installed):
    (installed / "patient-1.0.dist-info" / "entry_points.txt").write_text(
        "[amdp_plugin.schedules]\npaci = patient:patient\n"
    )
    schedules._third_party.cache_clear()
    with pytest.raises(ValueError, match=r"cannot replace the built-in schedules \['paci'\]"):
        schedules.names()


@pytest.mark.parametrize(
    "arguments,options,message",
    [
        (("nope", 4, 4), {}, "unknown schedule 'nope'; the known ones are 1f1b, .*paci"),
        (("paci", 0, 4), {}, "at least one stage, got 0"),
        (("paci", 4, 0), {}, "at least one micro-batch, got 0"),
        (("paci", 4, 4), {"depth": 3}, "schedule 'paci' has no option depth; it has extra_in_flight"),
        (("1f1b", 4, 4), {"depth": 3}, "schedule '1f1b' has no option depth; it has none"),
        (("paci", 4, 4), {"extra_in_flight": -1}, "extra_in_flight cannot be negative, got -1"),
    ],
)
def test_mistakes_are_named(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        schedules.make(*arguments, **options)


def test_options_are_read_from_text():
    assert schedules.read_option("paci", "extra_in_flight", "3") == 3
    with pytest.raises(ValueError, match="option extra_in_flight of schedule 'paci' is a whole number"):
        schedules.read_option("paci", "extra_in_flight", "3.5")
    with pytest.raises(ValueError, match="schedule 'paci' has no option depth; it has extra_in_flight"):
        schedules.read_option("paci", "depth", "3")


def patient(num_stages: int, micro_batches: int, **changes: Any) -> Schedule:
    fields = {"flush_every": 0, "in_flight": (1,) * num_stages, "max_gap": (0,) * num_stages, **changes}
    return Schedule("patient", Placement.one_direction(num_stages), micro_batches, **fields)


class Entry(EntryPoint):
    """An entry point whose object is at hand."""

    def load(self):
        return FOUND[self.name]


FOUND: dict[str, Any] = {}


@pytest.fixture
def bring(monkeypatch):
    """Let a function be the schedule of another package."""

    def bring(function: Any) -> None:
        monkeypatch.setitem(FOUND, "other", function)
        entry = Entry("other", "other_package:other", schedules.ENTRY_POINT_GROUP)
        monkeypatch.setattr(schedules, "_third_party", lambda: {"other": entry})

    return bring


def many_types(
    num_stages: int,
    micro_batches: int,
    *,
    depth: Optional[int] = None,  # noqa: UP045
    width: int | None = 2,
    eager: bool = False,
    mode: Literal["fast", "slow"] = "fast",
    label: str = "",
    costs: float = 0.0,
    copy: int = 0,
) -> Schedule:
    chosen = {key: value for key, value in locals().items() if key not in ("num_stages", "micro_batches")}
    return patient(num_stages, micro_batches, options=chosen)


@pytest.mark.parametrize(
    ("option", "text", "value"),
    [
        ("depth", "3", 3),
        ("depth", "null", None),
        ("width", "3", 3),
        ("eager", "true", True),
        ("eager", "False", False),
        ("mode", "slow", "slow"),
        ("label", "3", "3"),
        ("label", "True", "True"),
        ("label", "null", "null"),
        ("costs", "3", 3.0),
        ("copy", "3", 3),
    ],
)
def test_every_type_is_read_from_text_and_from_json(bring, option, text, value):
    bring(many_types)
    assert schedules.read_option("other", option, text) == value
    assert type(schedules.read_option("other", option, text)) is type(value)
    settings = read_schedule({"name": "other", option: value}, "")
    assert settings.make(2, 2).options == {**many_types(2, 2).options, option: value}
    assert settings.costs(2).num_stages == 2


@pytest.mark.parametrize(
    ("option", "text", "message"),
    [
        ("depth", "x", "option depth of schedule 'other' is a whole number, got 'x'"),
        ("width", "2.5", "option width of schedule 'other' is a whole number, got '2.5'"),
        ("eager", "1", "option eager of schedule 'other' is true or false, got '1'"),
        ("mode", "medium", "option mode of schedule 'other' is 'fast' or 'slow', got 'medium'"),
    ],
)
def test_a_wrong_text_is_told_what_it_should_be(bring, option, text, message):
    bring(many_types)
    with pytest.raises(ValueError) as caught:
        schedules.read_option("other", option, text)
    assert str(caught.value) == message


def swallowed(num_stages, micro_batches, *, timeout_seconds: float = 1.0):
    return patient(num_stages, micro_batches)


def without_default(num_stages, micro_batches, *, depth: int):
    return patient(num_stages, micro_batches)


def without_annotation(num_stages, micro_batches, *, depth=1):
    return patient(num_stages, micro_batches)


def of_no_type(num_stages, micro_batches, *, depth: Entry | None = None):
    return patient(num_stages, micro_batches)


def misspelled(num_stages, micro_batches, *, depth: "Interger" = 1):  # noqa: F821
    return patient(num_stages, micro_batches)


def positional(num_stages, micro_batches, depth: int = 1):
    return patient(num_stages, micro_batches)


def open_ended(num_stages, micro_batches, **rest):
    return patient(num_stages, micro_batches)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (swallowed, "every schedule has an option 'timeout_seconds' already"),
        (without_default, "its option 'depth' has no default; write depth: type = default"),
        (without_annotation, "its option 'depth' has no annotation"),
        (of_no_type, "no value can be read for its option 'depth'"),
        (misspelled, "its signature cannot be read: name 'Interger' is not defined"),
        (positional, "must be a function (num_stages, micro_batches, *, option"),
        (open_ended, "must be a function (num_stages, micro_batches, *, option"),
        (3, "must be a function (num_stages, micro_batches, *, option"),
    ],
)
def test_a_signature_is_checked_when_the_schedule_is_found(bring, function, message):
    bring(function)
    for use in (schedules.factory, schedules.options, partial(schedules.make, num_stages=2, micro_batches=2)):
        with pytest.raises(ValueError) as caught:
            use("other")
        assert message in str(caught.value)
        assert str(caught.value).startswith("schedule 'other' (entry point other_package:other)")


def test_an_entry_point_that_cannot_be_loaded_is_named(installed):
    (installed / "patient.py").write_text("import nothing_of_this_name")
    with pytest.raises(ValueError, match=r"'patient' \(entry point patient:patient\) cannot be loaded: ModuleNotFound"):
        schedules.make("patient", 2, 2)


@pytest.mark.parametrize(
    ("made_instead", "message"),
    [
        (lambda stages, size: None, "must return a Schedule, it returned a NoneType"),
        (lambda stages, size: patient(3, size), "asked for 2 stages and windows of 4 micro-batches, it made 3 s"),
        (lambda stages, size: patient(stages, 8), "it made 2 stages and windows of 8"),
    ],
)
def test_what_a_function_makes_is_checked(bring, made_instead, message):
    bring(made_instead)
    with pytest.raises(ValueError) as caught:
        schedules.make("other", 2, 4)
    assert "schedule 'other' (entry point other_package:other)" in str(caught.value)
    assert message in str(caught.value)


def test_placements():
    assert shifted_pairs(4).ranks == ((0, 1, 2, 3), (3, 2, 1, 0))
    assert shifted_pairs(8).ranks[2:] == ((4, 5, 6, 7, 0, 1, 2, 3), (3, 2, 1, 0, 7, 6, 5, 4))
    assert BIDIRECTIONAL.holders == ((0, 3), (1, 2), (2, 1), (3, 0))
    assert BIDIRECTIONAL.stages == ((0, 3), (1, 2), (1, 2), (0, 3))
    assert [BIDIRECTIONAL.rank_of(0, micro_batch) for micro_batch in range(4)] == [0, 3, 0, 3]
    assert all(len(stages) == 4 for stages in shifted_pairs(8).stages)
    with pytest.raises(ValueError, match="every direction places all 2 stages"):
        Placement(((0, 1), (1,)))
    with pytest.raises(ValueError, match="at least one direction"):
        Placement(())
    with pytest.raises(ValueError, match=r"ranks are numbered 0 to 1, every one with a stage; got \(\(0, 2\),\)"):
        Placement(((0, 2),))
    with pytest.raises(ValueError, match="ranks are numbered 0 to 1"):
        Placement(((-1, 0),))


def test_schedules_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="5 micro-batches do not divide over 2 directions; use 4 or 6"):
        made(BIDIRECTIONAL, 5)
    with pytest.raises(ValueError, match="1 micro-batches do not divide over 2 directions; use 2"):
        made(BIDIRECTIONAL, 1)
    line = Placement.one_direction(2)
    with pytest.raises(ValueError, match="cannot stand later than a flush"):
        made(line, 2, flush=True, update_delay=1)
    with pytest.raises(ValueError, match="one entry for each of 2 stages"):
        Schedule("made", line, 2, False, (1,), (0, 0))
    with pytest.raises(ValueError, match="must admit at least one micro-batch"):
        Schedule("made", line, 2, False, (1, 0), (0, 0))
    with pytest.raises(ValueError, match="flush_every counts windows, 0 for never; got -1"):
        schedules.make("paci", 2, 2, flush_every=-1)
    with pytest.raises(ValueError, match="update_delay counts backwards, at least 0; got \\(-1, -1"):
        made(line, 2, update_delay=-1)
    with pytest.raises(ValueError, match="weights are latest, stashed, previous, "):
        replace(made(line, 2), weights="stahsed")
    with pytest.raises(ValueError, match=r"weight_versions need one entry, at least 1, for each of 2 stages; got \(\)"):
        replace(made(line, 2), weights="stashed", weight_versions=())
    with pytest.raises(ValueError, match="stages that several ranks hold have their latest weights alone"):
        replace(schedules.make("amdp", 4, 4), weights="previous", weight_versions=(2,) * 4)
    with pytest.raises(ValueError, match="priorities are empty"):
        replace(made(line, 2), priorities=())


def by_table(action: Action, since: float) -> int:
    return {0: 1}[action.stage]


def incomparable(action: Action, since: float) -> object:
    return object()


def of_one_argument(action: Action) -> int:
    return 0


@pytest.mark.parametrize(
    ("priority", "failed"),
    [(by_table, "KeyError: 1"), (incomparable, "TypeError: '<' not"), (of_one_argument, "TypeError: of_one_arg")],
)
def test_a_priority_that_fails_is_refused_at_once(priority, failed):
    """In one direction of one stage a rank rarely has a choice."""
    with pytest.raises(ValueError) as caught:
        made(Placement.one_direction(2), 1, admitted=1, priority=priority)
    assert f"made: the priority {priority.__qualname__} failed with {failed}" in str(caught.value)


def late(action: Action, since: float) -> int:
    return {0: 0}[action.index // 6]


def test_a_priority_that_fails_later_is_named_too():
    schedule = made(BIDIRECTIONAL, 4, priority=late)
    with pytest.raises(ValueError, match="made: the priority late failed with KeyError: 1"):
        Planner(schedule).program(3)
    several = replace(schedule, priorities=(late, late))
    with pytest.raises(ValueError, match="made: the priority late failed with KeyError: 1"):
        Planner(several)
