"""The options of a schedule, as every host reads them."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from amdp_plugin.plan.costs import CostModel
from amdp_plugin.plan.schedules import make
from amdp_plugin.settings import NOTHING, Needs, ScheduleSettings, read_schedule

WHERE = "--pipeline-schedule"


def test_a_name_alone_takes_every_default() -> None:
    settings = read_schedule("paci", WHERE)
    assert settings == ScheduleSettings("paci", 600.0, 2.0, 0.0, None, "none", 1.0, 0, "auto", {})
    assert settings.make(4, 8) == make("paci", 4, 8)
    assert settings.costs(4) == CostModel.uniform(4)


def test_options_reach_the_schedule_and_the_costs() -> None:
    section = {
        "name": "paci",
        "extra_in_flight": 2,
        "timeout_seconds": 5,
        "backward_ratio": 1.5,
        "link_cost": 0.25,
        "stage_costs": [1.0, 2.0],
        "compensation": "error_feedback",
        "strength": 0.5,
    }
    settings = read_schedule(section, WHERE)
    assert settings.timeout_seconds == 5
    made = settings.make(2, 4)
    assert made.in_flight == (4, 3)
    assert (made.compensation, made.strength) == ("error_feedback", 0.5)
    assert settings.costs(2) == CostModel((1.0, 2.0), (1.5, 3.0), (0.0, 0.0), link_latency=0.25)


@pytest.mark.parametrize("written", [{}, {"decisions": "auto"}])
def test_what_is_left_open_is_decided_as_the_job_needs_it(written: dict[str, str]) -> None:
    """Nobody waits for a norm; what was said stays; under a flush there is nothing to say."""

    def decisions(name: str, needs: Needs, **said: str) -> str:
        return read_schedule({"name": name, **written, **said}, WHERE).make(4, 8, needs).decisions

    norm, scale = Needs(norm=True), Needs(norm=True, exact=True)
    assert [decisions("paci", needs) for needs in (NOTHING, norm, scale)] == ["local", "latest", "relayed"]
    assert [decisions("pipedream-2bw", needs) for needs in (NOTHING, norm, scale)] == ["local", "latest", "latest"]
    assert [decisions("amdp", needs) for needs in (NOTHING, norm, scale)] == ["local", "latest", "meeting"]
    assert decisions("amdp", scale, decisions="local") == decisions("paci", norm, decisions="local") == "local"
    assert decisions("paci", Needs(exact=True, tied=((0, 3),))) == "relayed"
    assert decisions("paci", Needs(exact=True, tied=((1, 3),))) == "meeting"
    assert read_schedule({"name": "1f1b", **written}, WHERE).make(4, 8, scale).updates_meet
    assert decisions("chimera", scale) == "meeting"


@pytest.mark.parametrize(
    ("section", "parts"),
    [
        (3, [f"{WHERE} must be a name, or an object", "the names are 1f1b, amdp"]),
        ({"extra_in_flight": 1}, [f"{WHERE} must be a name"]),
        ("pacy", ["unknown schedule 'pacy'"]),
        ({"name": "paci", "options": {}}, ["schedule 'paci' has no option 'options'; its options are timeout_seconds"]),
        ({"name": "paci", "stage_costs": [1.0, "x"]}, ["option 'stage_costs.1' of schedule 'paci' is 'x'"]),
        ({"name": "paci", "link_cost": -1.0}, ["option 'link_cost' of schedule 'paci' is -1.0: ", "greater than or"]),
        (
            {"name": "paci", "timeout_seconds": 0, "extra_in_flight": "2", "depth": 1},
            ["'timeout_seconds'", "'extra_in_flight' of schedule 'paci' is '2'", "no option 'depth'"],
        ),
    ],
)
def test_mistakes_are_named(section: Any, parts: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        read_schedule(section, WHERE)
    for part in parts:
        assert part in str(caught.value)


def test_no_torch_is_imported() -> None:
    code = (
        "import sys; from amdp_plugin.settings import read_schedule; read_schedule('amdp', '').make(4, 8); "
        "print(sorted({'torch', 'deepspeed', 'megatron', 'numpy'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
