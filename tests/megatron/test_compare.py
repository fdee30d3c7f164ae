"""``amdp compare --host megatron``: what Megatron tells the records, and what is made of them."""

from __future__ import annotations

import json
from itertools import groupby, pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch

from amdp_plugin.cli import main
from amdp_plugin.compare.measured import Run
from amdp_plugin.compare.recording import OURS, STOCK, RankRecord, read_records
from amdp_plugin.megatron import __main__ as launcher
from amdp_plugin.megatron.record import record_to
from amdp_plugin.megatron.recorder import mean_loss
from amdp_plugin.plan.action import REDUCE, UPDATE, Action
from amdp_plugin.plan.planner import Planner
from amdp_plugin.runtime.timeline import RUN, WAIT
from tests.processes import outcomes, run_ranks

from .jobs import DISTRIBUTED, ROWS, SEQUENCE, Job
from .test_oracle import FEEDBACK
from .training import Trainer, assert_same, run

ROOT = Path(__file__).parents[2]
STEPS, EVALUATED_AFTER = 7, 4
CASES = {
    "stock": Job(None, pipeline=3, clip=0.5),
    "stock, one stage": Job(None, pipeline=1),
    "stock, tied, masked, replicas": Job(None, data=2, tied=True, masked=True),
    "1f1b, tied": Job("1f1b", clip=0.5, tied=True),
    "paci, bf16, replicas": Job("paci", clip=0.5, bf16=True, data=2, **DISTRIBUTED),
    "amdp": Job({"name": "amdp", "decisions": "meeting"}, pipeline=4, clip=0.5),
}
MODEL = ["--layers", "2", "--hidden", "32", "--heads", "2", "--sequence-length", "16"]
MICRO_BATCHES, MICRO_BATCH_SIZE = 3, 2


def recorded(rank: int, job: Job, directory: Path) -> dict[str, Any]:
    """A rank's whole run, which knows nothing of being recorded, with an evaluation of two calls in it."""
    output = record_to(directory)
    trainer = Trainer(rank, job)
    trainer.train(EVALUATED_AFTER)
    evaluated = [trainer.evaluate(first) for first in (100, 200)]
    trainer.train(STEPS - EVALUATED_AFTER)
    output.write()
    return {**trainer.result(), "evaluated": evaluated}


@pytest.mark.parametrize("name", CASES)
def test_records(name: str, tmp_path: Path) -> None:
    job = CASES[name]
    found = run_ranks(job.world, recorded, job, tmp_path)
    assert_same(found, run(job, STEPS))  # to be recorded changes nothing
    records = read_records(tmp_path)
    measured = Run(name, records)
    assert [record.rank for record in records] == list(range(job.world))
    for record, result in zip(records, found, strict=True):
        name = job.schedule["name"] if isinstance(job.schedule, dict) else job.schedule
        assert (record.engine, record.schedule) == ((OURS, name) if name else (STOCK, "1f1b"))
        assert (record.stage, record.stages, record.micro_batches) == (result["stage"], job.pipeline, job.micro_batches)
        assert record.largest_gap == result["gap"]
        check_steps(record, result, job)
        check_events(record, measured, job)
    last = [result for result in found if result["stage"] == job.pipeline - 1]
    for step, loss in enumerate(measured.losses):
        assert loss == pytest.approx(mean(mean_of(result["losses"][step]) for result in last), rel=1e-6)
    check_messages(measured)


def check_steps(record: RankRecord, result: dict[str, Any], job: Job) -> None:
    samples = job.micro_batches * ROWS * job.data
    assert [step.step for step in record.steps] == list(range(1, STEPS + 1))
    assert {(step.samples, step.tokens) for step in record.steps} == {(samples, samples * SEQUENCE)}
    assert all(before.end <= after.start < after.end for before, after in pairwise(record.steps))
    interruptions = [step.interruptions for step in record.steps]
    assert interruptions == [["evaluation"] if step == EVALUATED_AFTER else [] for step in range(STEPS)]
    (evaluation,) = record.evaluations
    assert evaluation.step == EVALUATED_AFTER
    if record.stage == job.pipeline - 1:
        assert evaluation.loss == pytest.approx(mean(map(mean_of, result["evaluated"])), rel=1e-6)
    else:
        assert {evaluation.loss, *(step.loss for step in record.steps)} == {None}


def mean_of(losses: list[Any]) -> float:
    """Of a window, from the numbers of its micro-batches, or sums and counts."""
    if isinstance(losses[0], list):
        return sum(total for total, _ in losses) / sum(count for _, count in losses)
    return mean(losses)


def check_events(record: RankRecord, measured: Run, job: Job) -> None:
    """Each rank ran what the plan says, in its order, and waited where somebody was to be waited for."""
    events, planner = record.events, Planner(measured.schedule(), record.planned_costs)
    assert all(before.end <= after.start for before, after in pairwise(events))
    ran = [Action.parse(event.name) for event in events if event.phase == RUN]
    planned = [action for window in range(STEPS) for action in planner.window(window)[record.stage]]
    # A guest reduces and updates nothing: it sends gradients, and receives weights.
    at_home = [each for each in planned if each.kind not in (REDUCE, UPDATE) or each.stage == record.stage]
    assert [action for action, _ in groupby(ran)] == at_home
    waits = [event for event in events if event.phase == WAIT]
    assert record.wait_seconds == pytest.approx(sum(event.end - event.start for event in waits))
    runs = sum(event.end - event.start for event in events if event.phase == RUN)
    assert record.run_seconds == pytest.approx(runs)
    inside = sum(step.end - step.start for step in record.steps)
    assert 0 < runs < inside
    # Where stages take a norm together, or tie their weights, they meet in the middle of every update, once for each.
    meetings = [
        (before, wait, after)
        for before, wait, after in zip(events, events[1:], events[2:], strict=False)
        if (before.phase, wait.phase, after.phase) == (RUN, WAIT, RUN) and before.name == wait.name == after.name
    ]
    assert all(before.end == wait.start and wait.end == after.start for before, wait, after in meetings)
    assert all(Action.parse(wait.name).kind == UPDATE for _, wait, _ in meetings)
    alone = job.pipeline == 1 or job.schedule == "paci"
    at_ends = record.stage in (0, job.pipeline - 1)
    assert len(meetings) == (0 if alone else STEPS * (2 if job.tied and at_ends else 1))
    if job.schedule is None:
        assert record.peak_in_flight == min(job.pipeline - record.stage, job.micro_batches)
    assert record.memory is not None and record.memory.peak > record.memory.kept
    assert min(record.memory.weights, record.memory.gradients, record.memory.optimizer_state) > 0


STOCK_EVENTS = {
    0: "0F0 (1F0) 0F1 (0B0) 0B0 0F2 (0B1) 0B1 (0B2) 0B2 0U0 (0U0) 0U0 "
    "0F3 (1F3) 0F4 (0B3) 0B3 0F5 (0B4) 0B4 (0B5) 0B5 0U1 (0U1) 0U1",
    1: "(1F0) 1F0 1B0 (1F1) 1F1 1B1 (1F2) 1F2 1B2 (0B2) 1U0 (1U0) 1U0 "
    "(1F3) 1F3 1B3 (1F4) 1F4 1B4 (1F5) 1F5 1B5 (0B5) 1U1 (1U1) 1U1",
}
"""Of two steps of three micro-batches, by stage; waits in brackets: for what comes in, or else until what was sent has
left."""


def test_events_of_stock(tmp_path: Path) -> None:
    run_ranks(2, recorded, Job(None, micro_batches=3), tmp_path)
    for record in read_records(tmp_path):
        names = [event.name if event.phase == RUN else f"({event.name})" for event in record.events]
        expected = STOCK_EVENTS[record.stage].split()
        assert names[: len(expected)] == expected


def check_messages(measured: Run) -> None:
    """A wait ends after what it waits for has been done, on one clock."""
    messages = list(measured.messages())
    assert bool(messages) == (measured.first.stages > 1)
    for message in messages:
        assert message.wait.end > message.sent.end


def test_memory_is_stocks(tmp_path: Path) -> None:
    """A rank keeps for training what it keeps under stock, but for the guests that it has."""
    kept = {}
    for schedule in (None, "paci", "amdp"):
        # So wide that a guest's parameters, each of which begins at a multiple of 512 bytes, leave no gaps.
        job, directory = Job(schedule, pipeline=4, bf16=True, model={"hidden_size": 256}), tmp_path / str(schedule)
        run_ranks(job.world, recorded, job, directory)
        kept[schedule] = [record.memory for record in read_records(directory)]
    for stock, paci, amdp in zip(kept[None], kept["paci"], kept["amdp"], strict=True):
        assert stock and paci and amdp
        assert (stock.weights, stock.gradients, stock.optimizer_state, stock.exchange) == (
            paci.weights, paci.gradients, paci.optimizer_state, paci.exchange
        )  # fmt: skip
        assert amdp.optimizer_state == stock.optimizer_state
        assert amdp.exchange > 0 == stock.exchange
    for what in ("weights", "gradients"):
        stock_sizes, amdp_sizes = ([getattr(memory, what) for memory in kept[name]] for name in (None, "amdp"))
        assert amdp_sizes == [each + guest for each, guest in zip(stock_sizes, reversed(stock_sizes), strict=True)]


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("more", [{}, {"data": 2, **DISTRIBUTED}], ids=["", "distributed optimizer"])
def test_error_feedback_keeps_a_copy_where_there_are_no_masters(
    more: dict[str, Any], bf16: bool, tmp_path: Path
) -> None:
    """Of what a rank's optimizer steps: with the distributed optimizer the replicas of a stage have a part each."""
    kept, extra = [], {}
    for schedule in ("paci", {"name": "paci", **FEEDBACK}):
        job, directory = Job(schedule, bf16=bf16, **more), tmp_path / str(len(kept))
        found = run_ranks(job.world, recorded, job, directory)
        kept.append([record.memory for record in read_records(directory)])
    for result, plain, ahead in zip(found, *kept, strict=True):
        assert plain and ahead
        assert (ahead.gradients, ahead.optimizer_state) == (plain.gradients, plain.optimizer_state)
        extra.setdefault(result["stage"], []).append(ahead.weights - plain.weights)
    for result in found:
        stage = result["stage"]
        assert sum(extra[stage]) == (0 if bf16 else sum(weight.nbytes for weight in result["weights"][stage]))
        assert bf16 or min(extra[stage]) > 0


def interleaved(rank: int) -> None:
    from megatron.core.pipeline_parallel import get_forward_backward_func

    record_to(Path("nowhere"))
    get_forward_backward_func(pp_size=2, vp_size=2)(model=[], num_microbatches=1)


def test_interleaved_stages_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ((ok, text),) = outcomes(1, interleaved)
    assert not ok and "interleaved virtual stages cannot be recorded" in text


def test_mean_loss() -> None:
    """Of what is named first; sums and counts are weighed."""
    assert mean_loss([]) is None
    assert mean_loss([object()]) is None  # collect_non_loss_data returns anything
    values = [{"lm loss": torch.tensor(value), "other": torch.tensor(9.0)} for value in (1.0, 2.0, 6.0)]
    assert float(mean_loss(values) or 0) == 3.0
    counted = [{"lm loss": torch.tensor([total, count])} for total, count in ((2.0, 1.0), (9.0, 3.0))]
    assert float(mean_loss(counted) or 0) == 11 / 4


def compare(*arguments: object) -> int:
    return main(["compare", "--host", "megatron", *map(str, arguments)])


def test_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same table, picture and trace as for DeepSpeed."""
    text, options, output = tmp_path / "text", tmp_path / "wide.json", tmp_path / "output"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 50)
    options.write_text('{"extra_in_flight": 1}')
    job = [*MODEL, "--micro-batches", str(MICRO_BATCHES), "--micro-batch-size", str(MICRO_BATCH_SIZE)]
    data = ["--data", text, "--data-cache", tmp_path / "cache", "--validate-every", "4", "--validation-batches", "2"]
    schedules = ["--schedules", "stock", f"paci:{options}"]
    assert compare(*schedules, "--steps", str(STEPS), "--output", output, "--", *job, *data) == 0

    printed = capsys.readouterr().out
    assert (output / "table.md").read_text() in printed
    assert "All began alike" in printed
    assert (output / "comparison.png").read_bytes().startswith(b"\x89PNG")
    slices = json.loads((output / "comparison.trace.json").read_text())["traceEvents"]
    drawn = {(each["pid"], each["tid"]) for each in slices if each["ph"] == "X"}
    assert drawn == {(number, rank) for number in range(2) for rank in range(2)}
    assert "update" in {each.get("cat") for each in slices}

    stock, paci = json.loads((output / "result.json").read_text())["runs"]
    assert [(each["name"], each["engine"], each["schedule"]) for each in (stock, paci)] == [
        ("stock", STOCK, "1f1b"), ("paci-wide", OURS, "paci")
    ]  # fmt: skip
    assert stock["ratio"] == stock["predicted_ratio"] == 1.0
    assert stock["peak_in_flight_by_rank"] == [2, 1] and paci["peak_in_flight_by_rank"] == [3, 1]
    assert [each["largest_gap"] for each in (stock, paci)] == [0, 1]
    # The same weights and the same data: what is computed before the first update is equal, and differs later.
    assert stock["losses"][0] == paci["losses"][0] and stock["losses"][1:] != paci["losses"][1:]
    for each in (stock, paci):
        assert (each["baseline"], each["steps"], len(each["losses"])) == ("stock", STEPS, STEPS)
        assert each["tokens_per_second"] == pytest.approx(16 * each["samples_per_second"])
        assert each["samples_per_second"] == pytest.approx(MICRO_BATCHES * MICRO_BATCH_SIZE / each["seconds_per_step"])
        assert [evaluation["step"] for evaluation in each["evaluations"]] == [4, STEPS]
        assert 0 < each["final_validation_loss"] == each["evaluations"][-1]["loss"]
        assert all(memory["weights"] > 0 for memory in each["memory_by_rank"])


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A mistake is told before anything runs."""
    list_, wrong = tmp_path / "list.json", tmp_path / "wrong.json"
    list_.write_text("[]")
    wrong.write_text('{"extra": 1}')
    output = ("--output", tmp_path / "output")
    for arguments, message in (
        ([], "--host megatron needs --schedules"),
        (["--configs", "a.json"], "--host megatron does not take --configs"),
        (["--schedules", "stock", "pacy"], "unknown schedule 'pacy'"),
        (["--schedules", "stock:a.json"], "there is no file a.json"),
        (["--schedules", f"paci:{list_}"], "must hold an object, the options of paci"),
        (["--schedules", f"paci:{wrong}"], "schedule 'paci' has no option 'extra'"),
        (["--schedules", "paci", "paci"], "two configurations are called paci"),
        (["--schedules", "paci", "--script", "nowhere.py"], "there is no file nowhere.py"),
    ):
        assert compare(*arguments, *output) == 2
        assert message in capsys.readouterr().err
    assert main(["compare", "--schedules", "paci"]) == 2
    assert "--host deepspeed needs --configs" in capsys.readouterr().err
    assert not (tmp_path / "output").exists()


def test_steps_are_told_as_the_script_calls_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "script.py"
    script.write_text("import sys; sys.exit(' '.join(sys.argv[1:]))")
    arguments = ["--schedules", "stock", "--script", script, "--steps-flag", "train-iters", "--steps", "5"]
    assert compare(*arguments, "--nproc", "1", "--output", tmp_path / "output", "--", "--lr", "1") == 1
    assert "--pipeline-schedule stock --train-iters 5 --lr 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "which script?"),
        (["--record"], "--record needs a directory"),
        (["--recorder", "x"], "unknown option --recorder"),
        (["--record=x", "nowhere.py"], "there is no file nowhere.py"),
    ],
)
def test_launcher_refuses(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        launcher.main(arguments)
    assert caught.value.code == launcher.EXIT_USAGE
    assert message in capsys.readouterr().err
