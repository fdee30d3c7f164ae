"""``amdp compare`` on a tiny job: what it writes, and that it compares what it says it compares."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from amdp_plugin.cli import main
from amdp_plugin.compare.measured import Run
from amdp_plugin.compare.picture import picture
from amdp_plugin.compare.recording import OURS, STOCK, Evaluation, Memory, RankRecord, Step, read_records
from amdp_plugin.compare.table import rows, table
from amdp_plugin.compare.trace import trace
from amdp_plugin.curves import reached
from amdp_plugin.deepspeed.config import read_settings
from amdp_plugin.plan.action import FORWARD, UPDATE, Action
from amdp_plugin.plan.costs import TICKS_PER_SECOND, CostModel
from amdp_plugin.plan.planner import Planner
from amdp_plugin.plan.schedule import Schedule
from amdp_plugin.plan.schedules import make
from amdp_plugin.plan.simulate import simulate, steady_state
from amdp_plugin.runtime.device import HOST_CLOCK
from amdp_plugin.runtime.timeline import RUN, WAIT, Event

ROOT = Path(__file__).parents[2]
STEPS, MICRO_BATCHES, MICRO_BATCH_SIZE, SEQUENCE_LENGTH = 7, 3, 2, 16
MODEL = ["--layers", "2", "--hidden", "32", "--heads", "2", "--sequence-length", str(SEQUENCE_LENGTH)]
RESULT_KEYS = {
    "name", "engine", "schedule", "baseline", "steps", "warm_steps", "stages", "ranks", "micro_batches",
    "seconds_per_step", "tokens_per_second", "samples_per_second", "ratio", "predicted_ratio",
    "predicted_seconds_per_step", "waiting_share_by_rank", "running_share_by_rank", "peak_in_flight_by_rank",
    "memory_by_rank", "largest_gap", "first_train_loss", "final_train_loss", "final_validation_loss", "others_cores",
    "time_to_loss", "clock", "turns", "ratio_by_turn", "measured_options", "costs", "losses", "evaluations",
}  # fmt: skip
COSTS = CostModel((0.2, 0.3, 0.4, 0.5), (0.9, 0.8, 0.7, 0.6), (0.05, 0.06, 0.07, 0.08), link_latency=0.01)
WINDOWS = 30


def write_configs(folder: Path) -> list[Path]:
    stock = {
        "train_micro_batch_size_per_gpu": MICRO_BATCH_SIZE,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True, "lr": 1e-3}},
    }
    paths = [folder / "stock.json", folder / "paci.json"]
    paths[0].write_text(json.dumps(stock))
    paths[1].write_text(json.dumps({**stock, "pipeline": {"schedule": "paci"}}))
    return paths


def compare(configs: list[Path], output: Path, *arguments: str) -> int:
    options = ["--nproc", "2", "--steps", str(STEPS), "--output", str(output)]
    script = ["--script", str(ROOT / "scripts" / "train_gpt.py")]
    return main(["compare", "--configs", *map(str, configs), *options, *script, "--", *arguments])


def test_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 50)
    output = tmp_path / "output"
    validation = ["--validate-every", "4", "--validation-batches", "2"]
    assert compare(write_configs(tmp_path), output, *MODEL, "--data", str(text), *validation) == 0

    printed = capsys.readouterr().out
    assert (output / "table.md").read_text() in printed
    assert str(output / "comparison.png") in printed
    assert (output / "comparison.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((output / "result.json").read_text())
    check_result(result)
    assert f"as options of a schedule: {json.dumps(result['runs'][0]['measured_options'])}" in printed
    check_trace(json.loads((output / "comparison.trace.json").read_text()))
    for name in ("stock", "paci"):
        records = read_records(output / "runs" / name)
        assert [(record.rank, record.stage) for record in records] == [(0, 0), (1, 1)]
        for record in records:
            check_record(record, Run(name, records))


def check_result(result: dict[str, Any]) -> None:
    stock, paci = result["runs"]
    assert stock.keys() == paci.keys() == RESULT_KEYS
    options = stock["measured_options"]
    settings = read_settings({"schedule": {"name": "paci", **options}})  # they can be pasted into a configuration
    assert settings is not None and settings.costs(2).num_stages == 2
    assert sum(options["stage_costs"]) == pytest.approx(2.0, abs=0.02)
    assert (stock["engine"], stock["schedule"], stock["largest_gap"]) == (STOCK, "1f1b", 0)
    assert (paci["engine"], paci["schedule"], paci["largest_gap"]) == (OURS, "paci", 1)
    assert stock["ratio"] == stock["predicted_ratio"] == 1.0
    assert stock["clock"] == paci["clock"] == HOST_CLOCK
    assert paci["predicted_ratio"] > 0.0
    assert stock["peak_in_flight_by_rank"] == paci["peak_in_flight_by_rank"] == [2, 1]
    # Training keeps the same, whatever is in flight.
    (memory,) = {tuple(kept(of_rank) for of_rank in run["memory_by_rank"]) for run in (stock, paci)}
    assert all(weights == gradients > 0 == exchange for weights, gradients, _, exchange in memory)
    # The same weights and the same data: what is computed before the first update is equal, and differs later.
    assert stock["losses"][0] == paci["losses"][0]
    assert stock["losses"][1:] != paci["losses"][1:]
    for run in (stock, paci):
        assert run["steps"] == len(run["losses"]) == STEPS
        assert [evaluation["step"] for evaluation in run["evaluations"]] == [4, STEPS]
        assert run["final_validation_loss"] == run["evaluations"][-1]["loss"] > 0
    assert stock["time_to_loss"] == 1.0


def kept(memory: dict[str, int]) -> tuple[int, ...]:
    return tuple(memory[name] for name in ("weights", "gradients", "optimizer_state", "exchange"))


def check_trace(trace: dict[str, Any]) -> None:
    slices = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert {(event["pid"], event["tid"]) for event in slices} == {(0, 0), (0, 1), (1, 0), (1, 1)}
    starts = [event["id"] for event in trace["traceEvents"] if event["ph"] == "s"]
    assert starts and sorted(starts) == sorted(event["id"] for event in trace["traceEvents"] if event["ph"] == "f")


def check_record(record: RankRecord, run: Run) -> None:
    assert [step.step for step in record.steps] == list(range(1, STEPS + 1))
    samples = MICRO_BATCHES * MICRO_BATCH_SIZE
    tokens = samples * SEQUENCE_LENGTH if record.stage == 0 else None
    assert {(step.samples, step.tokens) for step in record.steps} == {(samples, tokens)}
    assert [step.interruptions for step in record.steps if step.interruptions] == [["eval_batch"]]

    ran = [Action.parse(event.name) for event in record.events if event.phase == RUN]
    planner = Planner(run.schedule())
    planned = [action for window in range(STEPS) for action in planner.window(window)[record.stage]]
    assert [action for action, _ in groupby(ran)] == planned, "an update that waits for a sum is in pieces"
    assert all(before.end <= after.start for before, after in zip(record.events, record.events[1:], strict=False))
    assert record.wait_seconds == pytest.approx(sum(e.end - e.start for e in record.events if e.phase == WAIT))

    spans = {event.name: event for other in run.records for event in other.events if event.phase == RUN}
    for action in ran:
        if action.kind == FORWARD and record.stage == 1:
            assert spans[str(action)].start > spans[f"0F{action.index}"].end


def as_if_recorded(schedule: Schedule, costs: CostModel = COSTS) -> Run:
    """What the ranks would have recorded, if actions had taken what they cost."""
    planner = Planner(schedule)
    timing = simulate(planner.program(WINDOWS), costs)
    ends = {
        (rank, action): end
        for rank, (row, spans) in enumerate(zip(timing.program.rows, timing.spans, strict=True))
        for action, (_, end) in zip(row, spans, strict=True)
    }
    arrivals = {
        schedule.message(rank, action): end + costs.link_ticks()
        for (rank, action), end in ends.items()
        if schedule.message(rank, action)
    }
    records = []
    for rank in range(schedule.num_ranks):
        events, steps, now = list[Event](), list[Step](), 0
        for window in range(WINDOWS):
            start = now
            for action in planner.row(window, rank):
                arrival = arrivals.get((rank, action), 0)
                if arrival > now:
                    events.append(Event(str(action), WAIT, now / TICKS_PER_SECOND, arrival / TICKS_PER_SECOND))
                end = ends[rank, action]
                # A guest only receives what its home updates.
                begin = end - (costs.action_ticks(action) if action.kind != UPDATE or action.stage == rank else 0)
                events.append(Event(str(action), RUN, begin / TICKS_PER_SECOND, end / TICKS_PER_SECOND))
                sent, now = schedule.message(rank, action), end
                if sent:  # its own message has to leave
                    events.append(Event(str(sent[1]), WAIT, now / TICKS_PER_SECOND, now / TICKS_PER_SECOND))
            steps.append(Step(window + 1, start / TICKS_PER_SECOND, now / TICKS_PER_SECOND, 1.0, samples=8))
        memory = Memory(weights=2000 * (rank + 1), gradients=4000, optimizer_state=24000, exchange=500, peak=3 << 30)
        numbers = (schedule.num_stages, schedule.micro_batches)
        named = (rank, rank, OURS, schedule.name, dict(schedule.options))
        records.append(RankRecord(*named, *numbers, steps, [], events, 0, 0, 0, 0, memory))
    return Run("synthetic", records)


@pytest.mark.parametrize(
    "schedule",
    [make("paci", 4, 4), make("1f1b", 4, 8), make("chimera", 4, 4), make("amdp", 4, 4), make("amdp", 4, 8, preload=0)],
    ids=lambda schedule: f"{schedule.name} {schedule.micro_batches}",
)
def test_figures_of_ranks_with_several_stages(schedule: Schedule) -> None:
    """What was put in comes out, whichever rank ran it, and the plan predicts it."""
    run = as_if_recorded(schedule)
    found = run.costs()
    for name in ("forward", "backward", "update", "link_latency"):
        assert getattr(found, name) == pytest.approx(getattr(COSTS, name)), name
    assert run.predicted_seconds(found) == pytest.approx(run.seconds_per_step)
    utilization = steady_state(Planner(schedule), COSTS)[0]
    assert mean(run.running_share_by_rank) == pytest.approx(utilization, rel=0.02)
    shares = zip(run.running_share_by_rank, run.waiting_share_by_rank, strict=True)
    assert all(0 <= waiting <= 1.001 - running for running, waiting in shares)

    messages = list(run.messages())
    for sender, sent, receiver, wait in messages:
        assert schedule.message(sender, Action.parse(sent.name)) == (receiver, Action.parse(wait.name))
    waits = [event for record in run.records for event in record.events if event.phase == WAIT]
    assert len(messages) == sum(wait.end > wait.start for wait in waits) > 0


def test_what_is_shown_of_ranks_with_several_stages() -> None:
    """The table fits into 120 columns, with the memory of the fullest rank; the trace names all stages of a rank."""
    run = as_if_recorded(make("amdp", 4, 4))
    without = Run("old", [replace(record, memory=None) for record in run.records])
    text = table(rows([[run, without]]))
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert max(map(len, lines)) <= 120
    assert [cell.strip() for cell in lines[-1].strip("|").split("|")] == [
        "synthetic (amdp_plugin amdp)", "7.81 KiB", "3.91 KiB", "23.44 KiB", "500 B", "35.64 KiB", "3.00 GiB",
    ]  # fmt: skip
    assert "memory" not in table(rows([[without]]))
    assert picture([run, without]).startswith(b"\x89PNG") and picture([without]).startswith(b"\x89PNG")
    tracks = [event for event in json.loads(trace([run]))["traceEvents"] if event["name"] == "thread_name"]
    names = [event["args"]["name"] for event in tracks]
    assert names == ["rank 0, stage 0 3", "rank 1, stage 1 2", "rank 2, stage 1 2", "rank 3, stage 0 3"]


def slowed(run: Run, name: str, factor: float) -> Run:
    """The same, but that everything took ``factor`` times as long."""

    def steps(record: RankRecord) -> list[Step]:
        return [replace(step, start=step.start * factor, end=step.end * factor) for step in record.steps]

    def events(record: RankRecord) -> list[Event]:
        return [event._replace(start=event.start * factor, end=event.end * factor) for event in record.events]

    records = [replace(record, steps=steps(record), events=events(record)) for record in run.records]
    return Run(name, records)


def test_several_turns_show_their_medians() -> None:
    """Ratios are taken within a turn: a pace of the machine that changes from turn to turn does not change them."""
    run = as_if_recorded(make("paci", 4, 4))
    paces, speeds = (1, 5, 2), (1.5, 1.25, 1.0)
    turns = [
        [slowed(run, "slow", pace), slowed(run, "fast", pace / speed)]
        for pace, speed in zip(paces, speeds, strict=True)
    ]
    slow, fast = rows(turns)
    assert slow.seconds_per_step == pytest.approx(2 * run.seconds_per_step)
    assert fast.ratio_by_turn == pytest.approx(speeds) and fast.ratio == pytest.approx(1.25)
    assert slow.turns == 3 and slow.predicted_ratio == pytest.approx(1)
    assert slow.predicted_seconds_per_step == pytest.approx(slow.seconds_per_step)
    assert slow.waiting_share_by_rank == pytest.approx(run.waiting_share_by_rank)
    text = table([slow, fast])
    assert "medians of 3 turns" in text and "fast 1.000 to 1.500" in text and "turns" not in table(rows(turns[:1]))


def test_time_to_the_loss_of_the_baseline() -> None:
    schedule = make("1f1b", 2, 2)
    run = as_if_recorded(schedule, CostModel.relative(2))

    def evaluated(name: str, *losses: float) -> Run:
        found = [Evaluation(step, 0.0, 0.0, loss) for step, loss in zip((10, 20, 30), losses, strict=True)]
        return Run(name, [replace(record, evaluations=found) for record in run.records])

    baseline, faster = evaluated("baseline", 4.0, 3.0, 2.0), slowed(evaluated("faster", 4.0, 2.5, 1.5), "faster", 0.5)
    worse = evaluated("worse", 4.0, 3.0, 2.1)
    # 2.5 falls to 1.5 from step 20 to 30: 2.0 is reached at step 25 of 30, each of which takes half as long.
    assert [row.time_to_loss for row in rows([[baseline, faster, worse]])] == pytest.approx([1.0, 25 / 30 / 2, None])
    shown = table(rows([[baseline, faster, worse]]))
    assert "as good as the last of baseline, over its own: faster 0.42, worse never" in shown
    assert "as good as" not in table(rows([[run, slowed(run, "slow", 2.0)]]))


@pytest.mark.parametrize(
    ("curve", "found"),
    [
        ([], None),
        ([(1, 3.0), (2, 2.5)], None),
        ([(1, 2.0)], 1),
        ([(1, 3.0), (3, 1.0)], 2),
        ([(1, 3.0), (2, 4.0), (3, 2.0), (4, 5.0)], 3),
    ],
)
def test_where_a_curve_is_as_low_as(curve: list[tuple[float, float]], found: float | None) -> None:
    assert reached(curve, 2.0) == found


def test_a_job_that_fails_shows_the_end_of_its_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(write_configs(tmp_path)[1:], tmp_path / "output", *MODEL, "--stages", "7") == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "--stages must divide the number of processes: got 7 stages, 2 processes" in captured.err
    assert "log.txt" in captured.err


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stock, paci = write_configs(tmp_path)
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "elsewhere").mkdir()
    again = tmp_path / "elsewhere" / "paci.json"
    again.write_text(paci.read_text())
    for configs, message in (
        ([tmp_path / "missing.json"], "there is no file"),
        ([tmp_path / "broken.json"], "is not JSON"),
        ([paci, again], "two configurations are called paci"),
    ):
        assert compare(configs, tmp_path / "output") == 2
        assert message in capsys.readouterr().err
    assert main(["compare", "--configs", str(stock), "--nproc", "0"]) == 2
    assert "--nproc is at least 1" in capsys.readouterr().err
    assert main(["compare"]) == 2
    assert "--configs" in capsys.readouterr().err
