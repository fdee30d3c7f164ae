"""The registry, the options, and schedules of other packages."""

import subprocess
import sys

import pytest

from amdp_plugin.plan import schedules
from amdp_plugin.plan.placement import Placement
from amdp_plugin.plan.schedule import Schedule

from .strategies import BIDIRECTIONAL, made, shifted_pairs

THIRD_PARTY = '''
from amdp_plugin.plan.placement import Placement
from amdp_plugin.plan.schedule import Schedule

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
