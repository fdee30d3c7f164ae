"""What all stages decide together at an update: tied weights, and fp16's loss scale."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import LayerSpec, PipelineModule
from torch import Tensor, nn

import amdp_plugin
from amdp_plugin.deepspeed import engine as engine_module
from amdp_plugin.plan.schedules import make
from amdp_plugin.runtime.serial import SerialPipeline
from tests import devices
from tests.processes import run_ranks
from tests.runtime.models import OPTIMIZERS, ROWS, Plain, data, loss

from .jobs import Job, assert_equals_oracle, assert_same, configuration, finish, make_engine, make_oracle, stream
from .test_oracle import clip, squares
from .tied_layers import Last, Words, head, middles, train_tied

# Tied layers


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(("stages", "size"), [(4, 4), (4, 8), (2, 2)])
def test_tied_layers_in_several_directions(stages: int, size: int, optimizer: str) -> None:
    """The replicas of both ends are reduced into one update, which the two homes take alike."""
    job = Job({"name": "amdp", "decisions": "meeting"}, stages, size, optimizer=optimizer)
    found = run_ranks(stages, train_tied, job)
    inner = middles(stages)
    parts = [nn.Sequential(Words(), inner[0]), *inner[1:-1], Last(inner[-1])]
    schedule = make("amdp", stages, size, decisions="meeting")
    ends: list[nn.Parameter] = []

    def make_optimizer(masters: list[nn.Parameter]) -> torch.optim.Optimizer:
        ends.extend(master for master in masters if torch.equal(master, Words().weight))
        return OPTIMIZERS[optimizer](masters)

    def before_step(_: list[nn.Parameter]) -> None:
        first, last = ends
        total = first.grad + last.grad
        first.grad, last.grad = total, total.clone()

    pipeline = SerialPipeline(
        parts, make_optimizer, loss, schedule, seeds=[100 + rank for rank in range(stages)], before_step=before_step
    )
    losses = pipeline.train(data(), job.windows)
    for rank, result in enumerate(found):
        assert result["losses"] == losses
        for stage, weights in result["weights"].items():
            named = dict(weights)
            words = named.pop("tied_modules.words.weight", None)
            expected = pipeline.replica(stage, rank)
            if words is not None:
                matrix = (expected[0] if stage == 0 else expected.words).weight
                assert torch.equal(words, matrix), f"rank {rank}, stage {stage}"
                rest = expected[1] if stage == 0 else expected.middle
            else:
                rest = expected
            assert all(torch.equal(a, b) for a, b in zip(named.values(), rest.state_dict().values(), strict=True))


def norm_at_clipping(rank: int, job: Job) -> float:
    """The norm by which this rank clips in the first window, from what it does to one gradient."""
    found: list[float] = []
    clip = engine_module.clip_by_whole_norm

    def watched(parameters: list[nn.Parameter], limit: float, *others: Any) -> None:
        before = parameters[0].grad.clone()
        clip(parameters, limit, *others)
        found.append(limit * float(before.norm() / parameters[0].grad.norm()))

    engine_module.clip_by_whole_norm = watched
    train_tied(rank, job, dropout=False)
    return found[0]


def test_tied_weights_count_once_in_the_norm() -> None:
    job = Job("amdp", 4, 4, config={"gradient_clipping": 0.01}, windows=1)
    found = run_ranks(4, norm_at_clipping, job)
    inner, words = [layer.eval() for layer in middles(4)], Words()
    model = nn.Sequential(words, *inner)
    batches = data()
    for _ in range(4):
        x, label = next(batches)
        (loss(head(words, model(x)), label) / 4).backward()
    norm = float(torch.stack([parameter.grad.norm() for parameter in model.parameters()]).norm())
    assert found == pytest.approx([norm] * 4, rel=1e-4)


def test_tied_layers_under_1f1b_are_stock() -> None:
    job = Job("1f1b", 3, 4, optimizer="adamw", config={"gradient_clipping": 0.05})
    assert_same(run_ranks(3, train_tied, job), run_ranks(3, train_tied, job.stock))


# fp16


def train_fp16(rank: int, job: Job) -> dict[str, Any]:
    get_accelerator().is_fp16_supported = lambda: True  # slow on this CPU, and right
    deepspeed.init_distributed(devices.backend())
    torch.manual_seed(5)
    layers = [LayerSpec(Plain) for _ in range(job.stages)]
    module = PipelineModule(
        layers, num_stages=job.stages, loss_fn=loss, partition_method="uniform", seed_layers=True, base_seed=3
    )
    optimizer = OPTIMIZERS[str(job.optimizer)](list(module.parameters()))
    engine, *_ = amdp_plugin.initialize(model=module, config=configuration(job), optimizer=optimizer)
    batches, scales, losses = stream(engine, job), [], []
    for _ in range(job.windows):
        losses.append(float(engine.train_batch(batches)))
        scales.append(engine.optimizer.loss_scale)
    return {**finish(engine, losses), "scales": scales, "skipped": engine.skipped_steps}


FP16 = {
    "fp16": {"enabled": True, "initial_scale_power": 20, "hysteresis": 1, "loss_scale_window": 3},
    "zero_optimization": {"stage": 1},
    "gradient_clipping": 1.0,
    "train_micro_batch_size_per_gpu": ROWS,
}


def test_fp16_under_1f1b_is_stock() -> None:
    job = Job("1f1b", 2, 4, config=FP16, dtype=torch.float16, windows=12)
    found, expected = run_ranks(2, train_fp16, job), run_ranks(2, train_fp16, job.stock)
    assert_same(found, expected)
    assert found[0]["scales"] == expected[0]["scales"]


def test_gradients_of_guests_have_the_loss_scale_too() -> None:
    """The first update is that of 1F1B, but for the rounding of sums in fp16."""
    config = {**FP16, "fp16": {"enabled": True, "loss_scale": 128.0}, "gradient_clipping": 0.0}
    job = Job({"name": "amdp", "decisions": "meeting"}, 4, 4, config=config, dtype=torch.float16, windows=1)
    found = run_ranks(4, train_fp16, job)
    flushed = run_ranks(4, train_fp16, replace(job, schedule="1f1b"))
    before = run_ranks(4, train_fp16, replace(job, schedule="1f1b", windows=0))
    for stage in range(4):
        for key, first in before[stage]["weights"][stage].items():
            step = (flushed[stage]["weights"][stage][key] - first).float().norm()
            error = (flushed[stage]["weights"][stage][key] - found[stage]["weights"][stage][key]).float().norm()
            assert step > 0 and error < 0.1 * step, f"stage {stage}: {key}"


@pytest.mark.parametrize("config", [{}, {"zero_optimization": None}], ids=["ZeRO-1", "plain"])
def test_error_feedback_in_fp16(config: dict[str, Any]) -> None:
    """After one update a stage is as far ahead of it as the plan says, and the masters are those without."""
    config = {**FP16, **config, "fp16": {"enabled": True, "loss_scale": 128.0}, "gradient_clipping": 0.0}
    job = Job("amdp", 4, 8, optimizer="adamw", config=config, dtype=torch.float16, windows=1)
    without, before = run_ranks(4, train_fp16, job), run_ranks(4, train_fp16, replace(job, windows=0))
    found = run_ranks(4, train_fp16, replace(job, schedule={"name": "amdp", "compensation": "error_feedback"}))
    for stage in range(4):
        start, plain = before[stage]["weights"][stage], without[stage]["weights"][stage]
        computing = found[stage]["weights"][stage].values()
        for key, value, weight in zip(plain, found[stage]["plain"], computing, strict=True):
            assert torch.equal(value, plain[key])
            ahead = plain[key].float() + AHEAD * (plain[key].float() - start[key].float())
            torch.testing.assert_close(weight.float(), ahead, rtol=1e-3, atol=1e-3)
            assert (weight - value).float().norm() > 0.4 * (plain[key] - start[key]).float().norm()
        for replica in found:
            for key, value in replica["weights"].get(stage, {}).items():
                assert torch.equal(value, found[stage]["weights"][stage][key])


AHEAD = 0.5
"""The largest mean staleness of ``amdp`` with 4 stages, windows of 8 and updates that meet."""


def test_all_stages_skip_a_step_together() -> None:
    """The scale falls, and rises again, on all ranks at the same window; nothing but rounding differs from 1F1B
    before the first update."""
    job = Job("amdp", 4, 4, config=FP16, dtype=torch.float16, windows=12)
    found = run_ranks(4, train_fp16, job)
    flushed = run_ranks(4, train_fp16, replace(job, schedule="1f1b"))
    scales = found[0]["scales"]
    assert all(result["scales"] == scales and result["skipped"] == found[0]["skipped"] for result in found)
    assert 0 < found[0]["skipped"] < 8
    assert any(after > before for before, after in pairwise(scales))
    skipped = next(window for window in range(12) if scales[window] == scales[window + 1])
    for one in (found, flushed):
        assert one[0]["scales"][: skipped + 2] == scales[: skipped + 2]
    assert found[0]["losses"][: skipped + 1] == pytest.approx(flushed[0]["losses"][: skipped + 1], rel=2e-3)
    for result in found:  # every replica is its home
        for stage, weights in result["weights"].items():
            for key, value in weights.items():
                assert torch.equal(value, found[stage]["weights"][stage][key])
                assert torch.isfinite(value).all()


@pytest.mark.parametrize(("stages", "size"), [(2, 2), (3, 4)])
def test_all_stages_skip_a_step_without_a_meeting(stages: int, size: int) -> None:
    """Decisions are relayed: the scale goes the same way on all ranks, on all but the first one call later. Nothing but
    rounding differs from 1F1B before the first update."""
    job = Job("paci", stages, size, config=FP16, dtype=torch.float16, windows=12)
    found = run_ranks(stages, train_fp16, job)
    flushed = run_ranks(stages, train_fp16, replace(job, schedule="1f1b"))
    scales = found[0]["scales"]
    assert 0 < found[0]["skipped"] < 9
    assert any(after > before for before, after in pairwise(scales))
    for result in found[1:]:
        assert result["scales"][1:] == scales[:-1]
        assert result["skipped"] == found[0]["skipped"], "at rest all have made the same updates"
    skipped = next(window for window in range(12) if scales[window] == scales[window + 1])
    assert found[0]["losses"][: skipped + 1] == pytest.approx(flushed[0]["losses"][: skipped + 1], rel=2e-3)
    for stage, result in enumerate(found):
        assert all(torch.isfinite(value).all() for value in result["weights"][stage].values())


def resize_fp16(rank: int, job: Job, size: int) -> str:
    """How windows of ``size`` decide after those of ``job``, or why there are none."""
    get_accelerator().is_fp16_supported = lambda: True
    engine = make_engine(rank, job)
    try:
        engine.set_train_batch_size(engine.train_batch_size() // job.size * size)
    except ValueError as error:
        return str(error)
    return engine.pipeline.schedule.decisions


def test_windows_of_another_size_decide_as_those_before() -> None:
    """DeepSpeed's optimizer reduces overflow over a stage or over all, as it was told at the start."""
    short, long = (Job("paci", 3, size, config=FP16, dtype=torch.float16) for size in (1, 4))
    assert run_ranks(3, resize_fp16, short, 4) == ["meeting"] * 3
    assert run_ranks(3, resize_fp16, long, 5) == ["relayed"] * 3
    for message in run_ranks(3, resize_fp16, long, 1):
        assert "windows of at least 3 micro-batches" in message and '"decisions": "relayed" or "meeting"' not in message


def train_with_a_broken_window(rank: int, job: Job, stage: int, window: int) -> dict[str, Any]:
    """A gradient of one parameter of ``stage`` is infinite in one micro-batch of ``window``."""
    engine, calls = make_engine(rank, job), 0

    def broken(gradient: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return gradient * (torch.inf if calls == window * job.size + 1 else 1.0)

    if rank == stage:
        next(engine.module.parameters()).register_hook(broken)
    batches, skipped = stream(engine, job), []
    losses = []
    for _ in range(job.windows):
        losses.append(float(engine.train_batch(batches)))
        skipped.append(engine.skipped_steps)
    return {**finish(engine, losses), "skipped": [*skipped, engine.skipped_steps]}


BFLOAT16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}, "zero_optimization": {"stage": 1}}


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("decisions", ["latest", "relayed"])
def test_a_window_that_is_broken_on_one_stage_is_skipped_by_all(decisions: str, stage: int) -> None:
    """Relayed: that window. Else those above, which do not know in time, skip the next: as many updates in all, so that
    learning rates stay together."""
    job = Job(
        {"name": "paci", "decisions": decisions}, 3, 4, config={**BFLOAT16, "gradient_clipping": 1.0},
        dtype=torch.bfloat16, windows=6,
    )  # fmt: skip
    found = run_ranks(3, train_with_a_broken_window, job, stage, 2)
    for result in found:
        assert result["skipped"][-1] == 1 and result["learning_rate"] == found[0]["learning_rate"]
        own = result["stage"]
        late = int(own > 0) if decisions == "relayed" else int(own > stage)
        assert result["skipped"][:-1] == [int(window >= 2 + late) for window in range(6)]
        assert all(torch.isfinite(value).all() for value in result["weights"][own].values())


def train_fp16_with_a_broken_window(rank: int, job: Job, stage: int, window: int) -> dict[str, Any]:
    get_accelerator().is_fp16_supported = lambda: True  # slow on this CPU, and right
    return train_with_a_broken_window(rank, job, stage, window)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_an_overflow_on_one_stage_is_one_of_all(stage: int) -> None:
    """fp16, decisions relayed: all skip that window, and no other, and halve the scale at it."""
    config = {**FP16, "fp16": {**FP16["fp16"], "initial_scale_power": 6, "loss_scale_window": 100}}
    job = Job("paci", 3, 4, config=config, dtype=torch.float16, windows=6)
    found = run_ranks(3, train_fp16_with_a_broken_window, job, stage, 2)
    for result in found:
        late = int(result["stage"] > 0)
        assert result["skipped"] == [*(int(window >= 2 + late) for window in range(6)), 1]
        assert all(torch.isfinite(value).all() for value in result["weights"][result["stage"]].values())


def count_steps(rank: int, job: Job) -> list[tuple[int, int]]:
    engine = make_engine(rank, job)
    batches, counted = stream(engine, job), []
    for _ in range(job.windows):
        engine.train_batch(batches)
        counted.append((engine.global_steps, engine.global_samples))
    engine.executor.quiesce()
    return [*counted, (engine.global_steps, engine.global_samples)]


@pytest.mark.parametrize("size", [1, 4])
def test_steps_are_counted_alike_on_all_stages(size: int) -> None:
    """Relayed decisions let updates come in later calls; scripts evaluate and save by the count."""
    job = Job({"name": "paci", "decisions": "relayed"}, 3, size, config={"gradient_clipping": 0.05}, windows=5)
    steps = [*range(1, 6), 5]
    for counted in run_ranks(3, count_steps, job):
        assert counted == [(step, step * size * ROWS) for step in steps]


def train_and_evaluate(rank: int, job: Job, windows: int) -> dict[str, Any]:
    """Two parts, with an evaluation between."""
    engine = make_engine(rank, job)
    batches, losses = stream(engine, job), []
    for _ in range(windows):
        losses.append(float(engine.train_batch(batches)))
    evaluated = float(engine.eval_batch(iter(data(job.dtype, job.size))))
    for _ in range(windows):
        losses.append(float(engine.train_batch(batches)))
    return {**finish(engine, losses), "evaluated": evaluated}


@pytest.mark.parametrize("size", [1, 4])
def test_an_evaluation_under_relayed_decisions_is_of_one_version(size: int) -> None:
    """What is in flight is cancelled for it, as for a checkpoint."""
    schedule = {"name": "paci", "decisions": "relayed", "compensation": "error_feedback"}
    job = Job(schedule, 3, size, optimizer="adamw", config={"gradient_clipping": 0.05})
    found = run_ranks(3, train_and_evaluate, job, 3)
    oracle, micro_batches = make_oracle(job, measure=squares, decide=clip), data(job.dtype)
    losses = oracle.train(micro_batches, 3)
    model = nn.Sequential(*oracle.stages)
    plain = [value for stage in range(3) for value in oracle.plain(stage)]
    ahead = [parameter.detach().clone() for parameter in model.parameters()]
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), plain, strict=True):
            parameter.copy_(value)
        expected = sum(float(loss(model.eval()(x), y)) for x, y in data(job.dtype, size)) / size
        for parameter, value in zip(model.train().parameters(), ahead, strict=True):
            parameter.copy_(value)
    assert [result["evaluated"] for result in found] == pytest.approx([expected] * 3, rel=1e-6)
    assert_equals_oracle(found, oracle, [*losses, *oracle.train(micro_batches, 3)])
