"""Pipelines beside data parallelism and tensor parallelism."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import deepspeed
import pytest
import torch
from torch import Tensor, nn

from amdp_plugin.plan.schedules import make
from amdp_plugin.runtime.serial import SerialPipeline
from tests.processes import run_ranks
from tests.runtime.models import OPTIMIZERS, data, loss

from . import tensor_parallel
from .jobs import Job, assert_equals_oracle, assert_same, make_oracle, oracle, run
from .test_oracle import squares

ZERO = {"zero_optimization": {"stage": 1}}
BF16 = {
    **ZERO,
    "bf16": {"enabled": True},
    "data_types": {"grad_accum_dtype": "fp32"},
    "communication_data_type": "fp32",
}


@pytest.mark.parametrize(("optimizer", "config"), [("sgd", {}), ("adamw", {}), ("sgd", ZERO), ("adamw", ZERO)])
@pytest.mark.parametrize("name", ["paci", "1f1b"])
def test_replicas_that_are_alike(name: str, optimizer: str, config: dict[str, Any]) -> None:
    """Their mean is each of them: the oracle of one, bit for bit, with dropout."""
    job = Job(name, 2, 2, optimizer=optimizer, config=config, replicas=2, alike=True)
    assert_equals_oracle(run(job), *oracle(job))


@pytest.mark.parametrize("config", [{}, ZERO])
def test_replicas_of_pipelines_with_guests(config: dict[str, Any]) -> None:
    """The home averages over data-parallel replicas what it has of its guests."""
    job = Job("amdp", 4, 4, optimizer="adamw", config=config, replicas=2, alike=True)
    assert_equals_oracle(run(job), *oracle(job))


def test_replicas_that_are_alike_in_bf16() -> None:
    job = Job("paci", 2, 2, optimizer="adamw", config=BF16, dtype=torch.bfloat16, replicas=2, alike=True)
    assert_equals_oracle(run(job), *oracle(job, master_dtype=torch.float32))


def both_replicas(job: Job) -> Iterator[tuple[Tensor, Tensor]]:
    """The micro-batches that the two replicas have at one time, as one."""
    batches = data(job.dtype)
    while pair := list(islice(batches, job.replicas)):
        inputs, labels = zip(*pair, strict=True)
        yield torch.cat(inputs), torch.cat(labels)


CLIPPED = {"gradient_clipping": 0.05}
TOGETHER = {"name": "amdp", "decisions": "meeting"}
KNOWN, RELAYED = ({"name": "paci", "decisions": decisions} for decisions in ("latest", "relayed"))


@pytest.mark.parametrize(
    ("schedule", "stages", "config"),
    [
        ("paci", 2, {}),
        ("paci", 2, ZERO),
        (KNOWN, 2, CLIPPED),
        (KNOWN, 2, {**ZERO, **CLIPPED}),
        (RELAYED, 2, CLIPPED),
        (RELAYED, 2, {**ZERO, **CLIPPED}),
        ("amdp", 4, {}),
        (TOGETHER, 4, CLIPPED),
        (TOGETHER, 4, {**ZERO, **CLIPPED}),
    ],
)
def test_replicas_average_their_gradients(schedule: Any, stages: int, config: dict[str, Any]) -> None:
    """Two replicas are one pipeline with micro-batches of twice the size; other schedules are far from it."""
    job = Job(schedule, stages, stages, kind="exact", config=config, replicas=2)
    found = run(job)
    clipping = config.get("gradient_clipping", 0.0)
    for name in (schedule, "1f1b"):
        clipped = known(clipping) if name in (KNOWN, RELAYED) else {"before_step": clip(clipping)}
        pipeline = make_oracle(replace(job, schedule=name), **clipped)
        losses = pipeline.train(both_replicas(job), job.windows)
        errors = [
            float((found[job.replicas * s]["weights"][s][key] - value).abs().max())
            for s, stage in enumerate(pipeline.stages)
            for key, value in zip(found[job.replicas * s]["weights"][s], stage.state_dict().values(), strict=True)
        ]
        if name == schedule:
            assert max(errors) < 1e-6
            assert found[0]["losses"] == pytest.approx(losses, rel=1e-5)
        else:
            assert max(errors) > 1e-5
    for rank in range(0, job.world, job.replicas):
        for stage, weights in found[rank]["weights"].items():
            for key, value in weights.items():
                assert torch.equal(value, found[rank + 1]["weights"][stage][key]), f"replicas of stage {stage}: {key}"


def known(norm: float) -> dict[str, Any]:
    """Clip by what is known of all stages."""

    def decide(parameters: list[nn.Parameter], total: float) -> None:
        assert total**0.5 > norm, "the case must clip"
        for parameter in parameters:
            parameter.grad.mul_(norm / (total**0.5 + 1e-6))

    return {"measure": squares, "decide": decide}


def clip(norm: float) -> Any:
    """Clip by their own norm the gradients of what updates at once: one stage, or all where updates meet."""

    def before_step(parameters: list[nn.Parameter]) -> None:
        if norm:
            total = nn.utils.clip_grad_norm_(parameters, norm)
            assert total > norm, "the case must clip"

    return before_step


@pytest.mark.parametrize(
    ("name", "stages", "replicas", "config"),
    [
        ("paci", 2, 1, {}),
        ("paci", 2, 1, CLIPPED),
        ("amdp", 4, 1, {}),
        ("amdp", 4, 1, CLIPPED),
        ("paci", 2, 2, {}),
        ("paci", 2, 2, {**ZERO, **CLIPPED}),
    ],
)
def test_tensor_parallel_equals_the_whole(name: str, stages: int, replicas: int, config: dict[str, Any]) -> None:
    """Stages of two ranks, and two replicas of each, train what as many whole stages train, but for rounding."""
    job = Job(name, stages, stages, config=config, replicas=replicas)
    clipping = config.get("gradient_clipping", 0.0)
    ranks = 2 * replicas
    found = run_ranks(ranks * stages, tensor_parallel.train, job)
    options = {"decisions": "latest"} if clipping else {}
    schedules = {name: make(name, stages, job.size, **options), "1f1b": make("1f1b", stages, job.size)}
    for other, schedule in schedules.items():
        whole = tensor_parallel.whole_layers(stages)
        clipped = known(clipping) if clipping and not schedule.flush else {"before_step": clip(clipping)}
        pipeline = SerialPipeline(whole, OPTIMIZERS["sgd"], loss, schedule, **clipped)
        losses = pipeline.train(both_replicas(job), job.windows)
        error = max(
            float((value - expected).abs().max())
            for stage in range(job.stages)
            for pair in range(ranks * stage, ranks * (stage + 1), 2)
            for value, expected in zip(
                tensor_parallel.join([result["weights"][stage] for result in found[pair : pair + 2]]),
                whole[stage].state_dict().values(),
                strict=True,
            )
        )
        if other == name:
            assert error < 1e-6
            assert found[0]["losses"] == pytest.approx(losses, rel=1e-5)
        else:
            assert error > 1e-5


@pytest.mark.parametrize("config", [{}, {"gradient_clipping": 0.05}, ZERO], ids=str)
def test_tensor_parallel_1f1b_is_stock(config: dict[str, Any]) -> None:
    """Stock cuts the activations over the ranks of a stage, ours does not: the numbers are the same."""
    job = Job("1f1b", 2, 3, config=config)
    found, expected = (run_ranks(4, tensor_parallel.train, one) for one in (job, job.stock))
    assert expected[0]["engine"] == deepspeed.PipelineEngine.__name__
    assert_same(found, expected)
