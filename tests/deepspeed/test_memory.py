"""What a record says about memory: counted from sizes, the same for stock and ours, and measured without a trace."""

from __future__ import annotations

import io
import json
import resource
from contextlib import redirect_stdout
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from torch import nn

from amdp_plugin.compare.measured import Run
from amdp_plugin.compare.memory import peak_bytes
from amdp_plugin.compare.recording import Memory, RankRecord
from amdp_plugin.deepspeed.memory import gauge, measure
from amdp_plugin.deepspeed.record import Recorder
from amdp_plugin.plan.action import BACKWARD, FORWARD, Action
from amdp_plugin.plan.planner import Planner
from amdp_plugin.plan.report import report
from amdp_plugin.runtime.packing import allocate
from amdp_plugin.runtime.timeline import RUN
from tests.processes import run_ranks
from tests.runtime.models import Plain

from .jobs import Job, assert_same, finish, make_engine, run, stream
from .test_oracle import BF16, FEEDBACK

LAYERS, SHORT, WHOLE, STEP_TENSOR = 2, 2, 4, 4
"""Layers of a stage; bytes of a bf16 and of an fp32 number, and of the counter that AdamW keeps for each tensor."""
TENSORS = LAYERS * len(list(Plain().parameters()))
NUMBERS = LAYERS * sum(parameter.numel() for parameter in Plain().parameters())
ADAMW = {"optimizer": {"type": "AdamW", "params": {"lr": 0.02, "torch_adam": True}}}
ZERO = {"zero_optimization": {"stage": 1}}
MASTER, MOMENTS = WHOLE * NUMBERS, 2 * WHOLE * NUMBERS
CASES: dict[str, tuple[dict[str, Any], tuple[int, int, int]]] = {
    "fp32": ({}, (WHOLE * NUMBERS, WHOLE * NUMBERS, MOMENTS + TENSORS * STEP_TENSOR)),
    "ZeRO-1": ({"config": ZERO}, (WHOLE * NUMBERS, WHOLE * NUMBERS, MASTER + MOMENTS + STEP_TENSOR)),
    "bf16, sums in fp32": (
        {"config": BF16, "dtype": torch.bfloat16},
        (SHORT * NUMBERS, (SHORT + WHOLE) * NUMBERS, MASTER + MOMENTS + STEP_TENSOR),
    ),
    "bf16, ZeRO-1": (
        {"config": {"bf16": {"enabled": True}, **ZERO}, "dtype": torch.bfloat16},
        (SHORT * NUMBERS, WHOLE * NUMBERS, MASTER + MOMENTS + STEP_TENSOR),
    ),
    "two replicas, ZeRO-1": (
        {"config": ZERO, "replicas": 2},
        (WHOLE * NUMBERS, WHOLE * NUMBERS, (MASTER + MOMENTS) // 2 + STEP_TENSOR),
    ),
}
"""For every job: bytes of weights, gradients and optimizer state on every rank."""


def packed(dtype: torch.dtype) -> int:
    """Bytes of a stage's weights, or of their gradients, in ``dtype``, as a guest has them and as they travel."""
    shapes = [tuple(parameter.shape) for _ in range(LAYERS) for parameter in Plain().parameters()]
    return allocate([(shape, dtype) for shape in shapes], torch.device("cpu")).nbytes


def job_of(changes: dict[str, Any], schedule: Any) -> Job:
    config = {**ADAMW, **changes.get("config", {})}
    return Job(schedule, layers_per_stage=LAYERS, optimizer=None, **{**changes, "config": config})


def recorded(rank: int, job: Job) -> tuple[dict[str, Any], RankRecord]:
    """:func:`.jobs.train`, recorded."""
    engine = make_engine(rank, job)
    recorder, batches = Recorder(engine), stream(engine, job)
    losses = [float(recorder.call("train_batch", lambda: engine.train_batch(batches))) for _ in range(job.windows)]
    return finish(engine, losses), recorder.record()


def kept(record: RankRecord) -> Memory:
    assert record.memory is not None
    assert record.memory.peak > record.memory.kept
    return replace(record.memory, peak=0)


@pytest.mark.parametrize("schedule", [None, "1f1b", "paci"])
@pytest.mark.parametrize("case", CASES)
def test_bytes_by_class(case: str, schedule: str | None) -> None:
    """And a job that is recorded computes what it would have computed."""
    changes, (weights, gradients, optimizer_state) = CASES[case]
    job = job_of(changes, schedule)
    results = run_ranks(job.world, recorded, job)
    assert {kept(record) for _, record in results} == {Memory(weights, gradients, optimizer_state, exchange=0)}
    assert_same([result for result, _ in results], run(job))


@pytest.mark.parametrize("case", CASES)
def test_error_feedback_keeps_a_copy_where_there_are_no_masters(case: str) -> None:
    changes, (weights, gradients, optimizer_state) = CASES[case]
    job = job_of(changes, {"name": "paci", **FEEDBACK})
    results = run_ranks(job.world, recorded, job)
    copies = 2 if case == "fp32" else 1
    assert {kept(record) for _, record in results} == {Memory(copies * weights, gradients, optimizer_state, exchange=0)}
    if case == "fp32":
        planned = report(Planner(Run("paci", [record for _, record in results]).schedule()), 1)
        assert planned.weight_copies_by_rank == (copies,) * job.stages


@pytest.mark.parametrize(("schedule", "size"), [("pipedream", 1), ("pipedream-2bw", 2), ("pipedream-2bw", 4)])
def test_versions_in_use_take_what_the_report_says(schedule: str, size: int) -> None:
    """Memory is measured before an update, when under PipeDream the version of the backward just done is gone again."""
    job = replace(job_of({}, schedule), stages=3, size=size)
    weights, gradients, optimizer_state = CASES["fp32"][1]
    records = [record for _, record in run_ranks(job.world, recorded, job)]
    copies = report(Planner(Run(schedule, records).schedule()), 1).weight_copies_by_rank
    gone = [1 if schedule == "pipedream" and number > 1 else 0 for number in copies]
    assert [kept(record) for record in records] == [
        Memory((number - less) * weights, gradients, optimizer_state, exchange=0)
        for number, less in zip(copies, gone, strict=True)
    ]


@pytest.mark.parametrize(("case", "size"), [("fp32", 2), ("fp32", 1), ("bf16, sums in fp32", 2)])
def test_parked_gradients_take_what_the_report_says(case: str, size: int) -> None:
    """One more sum for every window that has closed and waits for its decision, and none on the first stage."""
    changes, (weights, gradients, optimizer_state) = CASES[case]
    job = replace(job_of(changes, {"name": "paci", "decisions": "relayed"}), stages=3, size=size, windows=8)
    records = [record for _, record in run_ranks(job.world, recorded, job)]
    copies = report(Planner(Run("paci", records).schedule()), 1).gradient_copies_by_rank
    assert copies == ((1, 2, 2) if size == 2 else (1, 2, 3))
    sums = WHOLE * NUMBERS
    assert [kept(record) for record in records] == [
        Memory(weights, gradients + (number - 1) * sums, optimizer_state, exchange=0) for number in copies
    ]


@pytest.mark.parametrize(("schedule", "size"), [("pipemare", 1), ("spectrain", 1), ("xpipe", 2), ("xpipe", 4)])
def test_extrapolated_weights_take_what_the_report_says(schedule: str, size: int) -> None:
    job = replace(job_of({}, schedule), stages=3, size=size)
    weights, gradients, optimizer_state = CASES["fp32"][1]
    records = [record for _, record in run_ranks(job.world, recorded, job)]
    copies = report(Planner(Run(schedule, records).schedule()), 1).weight_copies_by_rank
    assert max(copies) > 1
    assert [kept(record) for record in records] == [
        Memory(number * weights, gradients, optimizer_state, exchange=0) for number in copies
    ]


def test_error_feedback_of_ranks_with_guests() -> None:
    """Home, guest and plain iterate, as the plan says."""
    changes, (weights, gradients, optimizer_state) = CASES["fp32"]
    job = job_of({**changes, "stages": 4, "size": 4}, {"name": "amdp", **FEEDBACK})
    records = [record for _, record in run_ranks(job.world, recorded, job)]
    planned = report(Planner(Run("amdp", records).schedule()), 1)
    assert planned.weight_copies_by_rank == (3,) * 4
    guest = packed(torch.float32)
    expected = Memory(2 * weights + guest, gradients + guest, optimizer_state, exchange=2 * guest)
    assert {kept(record) for record in records} == {expected}


def announced(rank: int, job: Job) -> str:
    """What rank 0 prints at the start."""
    output = io.StringIO()
    with redirect_stdout(output):
        make_engine(rank, job)
    return output.getvalue()


@pytest.mark.parametrize("case", ["fp32", "ZeRO-1"])
def test_error_feedback_is_announced_with_what_it_takes(case: str) -> None:
    """Stages that are large enough to be seen in MiB."""
    changes, _ = CASES[case]
    job = replace(job_of(changes, {"name": "paci", **FEEDBACK}), layers_per_stage=700)
    text = run_ranks(job.world, announced, job)[0]
    size = f"{700 * NUMBERS / LAYERS * WHOLE / 2**20:.1f}"
    assert f"weights        {size} ({size})  {size} ({size})" in text
    assert (f"plain iterate  {size}  {size}" in text) is (case == "fp32")
    assert "x = z + 0.5 (z - z_before)" in text
    assert ("weight copies  by rank: 2 2" if case == "fp32" else "weight copies  by rank: 1 1") in text


@pytest.mark.parametrize("precision", ["fp32", "bf16, sums in fp32"])
def test_ranks_with_guests(precision: str) -> None:
    """Everything twice but for the optimizer's state, and buffers to receive gradients and to send weights."""
    changes, (weights, gradients, optimizer_state) = CASES[precision]
    job = job_of({**changes, "stages": 4, "size": 4}, "amdp")
    results = run_ranks(job.world, recorded, job)
    guest, sums = packed(job.dtype), packed(torch.float32)
    expected = Memory(weights + guest, gradients + sums, optimizer_state, exchange=sums + guest)
    assert {kept(record) for _, record in results} == {expected}
    assert_same([result for result, _ in results], run(job))

    planner = Planner(Run("amdp", [record for _, record in results]).schedule())
    for rank, (_, record) in enumerate(results):
        assert all(before.end <= after.start for before, after in pairwise(record.events))
        ran = [Action.parse(event.name) for event in record.events if event.phase == RUN]
        planned = [action for window in range(job.windows) for action in planner.row(window, rank)]
        assert [action for action in ran if action.kind in (FORWARD, BACKWARD)] == [
            action for action in planned if action.kind in (FORWARD, BACKWARD)
        ]


def stepped_in_fp16(rank: int) -> Memory:
    """DeepSpeed has no fp16 engines on the CPU, but an optimizer."""
    deepspeed.init_distributed("gloo")
    module = nn.Sequential(*(Plain().half() for _ in range(LAYERS)))
    optimizer = FP16_Optimizer(torch.optim.AdamW(module.parameters()))
    engine = SimpleNamespace(module=module, optimizer=optimizer, _INSTRUCTION_MAP={})
    samples: list[Memory] = []
    with gauge(engine, samples):
        module(torch.ones(3, 6, dtype=torch.float16)).sum().backward()
        optimizer.step()
    return Memory.largest(samples)


def test_fp16() -> None:
    """Its gradients are whole only within the optimizer's step."""
    [found] = run_ranks(1, stepped_in_fp16)
    assert found == Memory(SHORT * NUMBERS, WHOLE * NUMBERS, MASTER + MOMENTS + STEP_TENSOR, exchange=0)


def test_guests_and_exchange_buffers() -> None:
    """A replica's flat weights and gradients count once, and what is a gradient is no exchange buffer."""
    home, guest = nn.Linear(4, 4), nn.Linear(4, 4)
    weights, gradients = torch.zeros(20), torch.zeros(20)
    for parameter, weight, gradient in zip(
        guest.parameters(), weights.split([16, 4]), gradients.split([16, 4]), strict=True
    ):
        parameter.data, parameter.grad = weight.view(parameter.shape), gradient.view(parameter.shape)
    optimizer = torch.optim.SGD(home.parameters(), momentum=0.9)
    engine = SimpleNamespace(module=home, guests={3: guest}, optimizer=optimizer)
    assert measure(engine) == Memory(weights=160, gradients=80, optimizer_state=0, exchange=0)

    home(torch.ones(4)).sum().backward()
    optimizer.step()
    sums = torch.zeros(20, dtype=torch.float64)
    engine.other_gradients = lambda: [sums, gradients]
    engine.exchange_buffers = lambda: iter([gradients, torch.zeros(5)])
    assert measure(engine) == Memory(weights=160, gradients=320, optimizer_state=80, exchange=20)


def test_peak_is_what_was_resident() -> None:
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    assert 0.9 * resident < peak_bytes("cpu") < 10 * resident


def test_records_without_memory_still_load(tmp_path: Path) -> None:
    record = RankRecord(0, 0, "stock", "1f1b", {}, 1, 1, [], [], [], 0.0, 0.0, 0, 0, Memory(1, 2, 3, 4, 5))
    record.write(tmp_path)
    path = tmp_path / "rank0.json"
    assert RankRecord.read(path) == record
    values = json.loads(path.read_text())
    del values["memory"]
    path.write_text(json.dumps(values))
    assert RankRecord.read(path).memory is None
