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


def test_replicas_that_are_alike_in_bf16() -> None:
    job = Job("paci", 2, 2, optimizer="adamw", config=BF16, dtype=torch.bfloat16, replicas=2, alike=True)
    assert_equals_oracle(run(job), *oracle(job, master_dtype=torch.float32))


def both_replicas(job: Job) -> Iterator[tuple[Tensor, Tensor]]:
    """The micro-batches that the two replicas have at one time, as one."""
    batches = data(job.dtype)
    while pair := list(islice(batches, job.replicas)):
        inputs, labels = zip(*pair, strict=True)
        yield torch.cat(inputs), torch.cat(labels)


@pytest.mark.parametrize("config", [{}, ZERO, {"gradient_clipping": 0.05}, {**ZERO, "gradient_clipping": 0.05}])
def test_replicas_average_their_gradients(config: dict[str, Any]) -> None:
    """Two replicas are one pipeline with micro-batches of twice the size; other schedules are far from it."""
    job = Job("paci", 2, 2, kind="exact", config=config, replicas=2)
    found = run(job)
    clipping = config.get("gradient_clipping", 0.0)
    for name in ("paci", "1f1b"):
        pipeline = make_oracle(replace(job, schedule=name), before_step=clip(clipping))
        losses = pipeline.train(both_replicas(job), job.windows)
        errors = [
            float((found[job.replicas * s]["weights"][s][key] - value).abs().max())
            for s, stage in enumerate(pipeline.stages)
            for key, value in zip(found[job.replicas * s]["weights"][s], stage.state_dict().values(), strict=True)
        ]
        if name == "paci":
            assert max(errors) < 1e-6
            assert found[0]["losses"] == pytest.approx(losses, rel=1e-5)
        else:
            assert max(errors) > 1e-5
    for rank in range(0, job.world, job.replicas):
        for key, value in found[rank]["weights"][rank // 2].items():
            assert torch.equal(value, found[rank + 1]["weights"][rank // 2][key]), f"replicas of stage {rank // 2}: {key}"


def clip(norm: float) -> Any:
    """Clip the gradients of one stage by their own norm."""

    def before_step(parameters: list[nn.Parameter]) -> None:
        if norm:
            total = nn.utils.clip_grad_norm_(parameters, norm)
            assert total > norm, "the case must clip"

    return before_step


@pytest.mark.parametrize("clipping", [0.0, 0.05])
def test_tensor_parallel_equals_the_whole(clipping: float) -> None:
    """Two stages of two ranks train what two whole stages train, but for rounding."""
    job = Job("paci", 2, 2, config={"gradient_clipping": clipping})
    found = run_ranks(4, tensor_parallel.train, job)
    schedules = {name: make(name, job.stages, job.size) for name in ("paci", "1f1b")}
    for name, schedule in schedules.items():
        whole = tensor_parallel.whole_layers()
        pipeline = SerialPipeline(whole, OPTIMIZERS["sgd"], loss, schedule, before_step=clip(clipping))
        losses = pipeline.train(data(), job.windows)
        error = max(
            float((value - expected).abs().max())
            for stage in range(job.stages)
            for value, expected in zip(
                tensor_parallel.join([result["weights"][stage] for result in found[2 * stage : 2 * stage + 2]]),
                whole[stage].state_dict().values(),
                strict=True,
            )
        )
        if name == "paci":
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
