"""Programs as text grids, pictures and traces."""

import io
import json

import pytest
from hypothesis import given, settings

from amdp_plugin.plan import schedules
from amdp_plugin.plan.costs import CostModel
from amdp_plugin.plan.picture import _rank_labels, png
from amdp_plugin.plan.placement import Placement
from amdp_plugin.plan.planner import Planner
from amdp_plugin.plan.program import Program
from amdp_plugin.plan.render import text_grid
from amdp_plugin.plan.report import report
from amdp_plugin.plan.simulate import simulate
from amdp_plugin.plan.trace import chrome_trace

from .strategies import BIDIRECTIONAL, cases, made

STEPS = """\
step    0   1   2   3   4   5
rank 0  0F0 0F1 0B0 0F2 0B1 0U0
rank 1  1F0 1B0 1F1 1B1 1U0"""

SLOTS = """\
time    0   1   2   3   4   5   6   7   8
rank 0  0F0 0F1 .   .   0B0 -   0F2 0B1 -*
rank 1  .   1F0 1B0 -   1F1 1B1 -*
. idle   - still at work   * update   + reduce"""

PICTURED = [schedules.make("paci", 4, 4), schedules.make("1f1b", 1, 1), made(BIDIRECTIONAL, 4)]

BLOCKS = """\
time    0   1   2   3   4
rank 0  0F0 0F1 .   .   0B0
rank 1  .   1F0 1B0 -   1F1

time    5   6   7   8
rank 0  -   0F2 0B1 -*
rank 1  1B1 -*
. idle   - still at work   * update   + reduce"""


def small() -> Planner:
    return Planner(schedules.make("paci", 2, 2))


def test_steps():
    assert text_grid(small().program(1)) == STEPS


def test_slots_of_time_show_bubbles():
    program = small().program(1)
    timing = simulate(program, CostModel.uniform(2))
    assert text_grid(program, timing=timing) == SLOTS
    assert text_grid(program, timing=timing, width=28) == BLOCKS


def test_updates_that_take_time_have_columns():
    program = small().program(1)
    grid = text_grid(program, timing=simulate(program, CostModel.uniform(2, update=1.0)))
    assert "0B1 -   0U0" in grid
    assert "*" not in grid.splitlines()[1]


def test_a_reduction_is_marked():
    program = Planner(made(BIDIRECTIONAL, 2, flush=True)).program(1)
    grid = text_grid(program, timing=simulate(program, CostModel.uniform(4)))
    assert "-+*" in grid


@pytest.mark.parametrize("ratio", [1.0, 1.3, 1.999, 2.5, 0.3])
def test_no_column_of_time_is_lost(ratio):
    """Whatever the durations, every forward and backward is named once, in its row's order."""
    program = small().program(3)
    grid = text_grid(program, timing=simulate(program, CostModel.uniform(2, backward_ratio=ratio, link_latency=0.07)))
    for rank, row in enumerate(program.rows):
        named = [cell.rstrip("*+") for cell in grid.splitlines()[1 + rank].split()[2:]]
        work = [str(action) for action in row if action.kind in "FB"]
        assert [cell for cell in named if cell not in (".", "-", "")] == work


def test_a_mark_shows_its_neighbourhood():
    program = Planner(schedules.make("paci", 16, 16)).program(2)
    lines = text_grid(program, mark=(8, 20)).splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [["rank", str(rank)] for rank in range(4, 13)]
    assert lines[0].split() == ["step", *map(str, range(14, 27))]
    marked = lines[5]
    assert f"[{program.rows[8][20]}]" in marked
    assert marked.startswith("rank 8   ... ") and marked.endswith(" ...")
    assert sum("[" in line for line in lines) == 1


def test_a_mark_at_the_end_and_at_the_corner():
    program = small().program(1)
    assert text_grid(program, mark=(1, 5)).splitlines()[2].split()[-1] == "[end]"
    assert text_grid(program, mark=(0, 0)).splitlines()[1].startswith("rank 0  [0F0]")
    empty = Program(program.schedule, 1, ((), ()))
    assert "[end]" in text_grid(empty, mark=(0, 0))


def test_the_trace_has_a_track_a_rank_and_an_arrow_a_message():
    planner = small()
    program = planner.program(2)
    timing = simulate(program, CostModel.uniform(2, link_latency=0.5))
    events = json.loads(chrome_trace(timing))["traceEvents"]
    assert {event["ph"] for event in events} == {"M", "X", "s", "f", "C"}
    slices = [event for event in events if event["ph"] == "X"]
    assert [event["name"] for event in slices if event["tid"] == 1] == [str(action) for action in program.rows[1]]
    first = slices[0]
    assert (first["name"], first["ts"], first["dur"], first["cat"]) == ("0F0", 0.0, 1e6, "forward")
    arrows = {event["id"]: event for event in events if event["ph"] == "s"}
    heads = {event["id"]: event for event in events if event["ph"] == "f"}
    assert arrows.keys() == heads.keys() and "0F0>1F0" in arrows and "1B0>0B0" in arrows
    for name, tail in arrows.items():
        assert heads[name]["ts"] >= tail["ts"] + 0.5e6
        assert (tail["tid"], heads[name]["tid"]) in ((0, 1), (1, 0))


def test_arrows_start_and_end_inside_their_slices():
    """A viewer hangs an arrow on the slice that contains its timestamp."""
    timing = simulate(small().program(2), CostModel.uniform(2))
    events = json.loads(chrome_trace(timing))["traceEvents"]
    slices = {(event["tid"], event["name"]): event for event in events if event["ph"] == "X"}
    for event in events:
        if event["ph"] in "sf":
            source, target = event["id"].split(">")
            holder = slices[event["tid"], source if event["ph"] == "s" else target]
            assert holder["ts"] <= event["ts"] < holder["ts"] + holder["dur"]


def test_counters_follow_what_is_in_flight_and_the_versions():
    timing = simulate(small().program(1), CostModel.uniform(2))
    counters = [event for event in json.loads(chrome_trace(timing))["traceEvents"] if event["ph"] == "C"]
    flying = [event["args"]["micro-batches"] for event in counters if event["name"] == "in flight, rank 0"]
    assert flying == [1, 2, 1, 2, 1]
    assert [event["args"] for event in counters if event["name"] == "version, rank 1"] == [{"stage 1": 1}]


@settings(deadline=None, max_examples=30)
@given(cases())
def test_everything_can_be_drawn(case):
    schedule, costs = case
    program = Planner(schedule, costs).program(2)
    timing = simulate(program, costs)
    assert len(text_grid(program).splitlines()) == schedule.num_ranks + 1
    assert len(text_grid(program, timing=timing).splitlines()) == schedule.num_ranks + 2
    slices = [event for event in json.loads(chrome_trace(timing))["traceEvents"] if event["ph"] == "X"]
    assert len(slices) == sum(map(len, program.rows))


@pytest.mark.parametrize("schedule", PICTURED)
def test_picture(schedule):
    """It decodes, and holds forwards and backwards of both windows."""
    matplotlib_image = pytest.importorskip("matplotlib.image")
    planner = Planner(schedule)
    content = png(simulate(planner.program(2), planner.costs), report(planner, 2))
    pixels = matplotlib_image.imread(io.BytesIO(content), format="png")
    colours = {tuple(colour) for colour in (pixels[::3, ::3, :3] * 255).round().astype(int).reshape(-1, 3).tolist()}
    assert {(0x2F, 0x6D, 0xB5), (0xD1, 0x63, 0x1B), (0x5F, 0x95, 0xD0), (0xE7, 0x8A, 0x47)} <= colours


def test_ranks_with_several_stages_say_which():
    """The home first; one stage a rank needs no words."""
    assert _rank_labels(Placement.complementary(8, 4))[3] == "3:  3 0 4 7"
    assert _rank_labels(Placement.one_direction(3)) == ["0", "1", "2"]
