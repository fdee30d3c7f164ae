"""One model and one order of the data in both hosts: Megatron's GPT stages as its own chunks, and as the layers of a
DeepSpeed ``PipelineModule``."""

from __future__ import annotations

from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.comm.torch import build_shm_op
from deepspeed.pipe import PipelineModule
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor

import amdp_plugin
from tests.devices import drawn_from
from tests.processes import run_ranks

from .jobs import DROPOUT, ROWS, Job
from .oracle import OracleStage, make_adam
from .training import assert_same_weights, copies, initialize, run

build_shm_op()  # what every rank would do anew

ITERATIONS = 4


class Layer(OracleStage):
    """A stage as DeepSpeed calls it: with what the stage before returned; the last one returns logits, which Megatron
    hands out as [rows, length, vocabulary]."""

    def forward(self, value: Tensor) -> Tensor:
        return self.run(value, None)


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Megatron's own, of what it computes as [length, rows, vocabulary]."""
    turned = (each.transpose(0, 1).contiguous() for each in (logits, labels))
    return vocab_parallel_cross_entropy(*turned).transpose(0, 1).contiguous().mean()


def train_in_deepspeed(rank: int, job: Job) -> dict[str, Any]:
    initialize(job)
    deepspeed.init_distributed("gloo")
    layers = [Layer(job, stage) for stage in range(job.pipeline)]
    module = PipelineModule(layers, num_stages=job.pipeline, loss_fn=loss, partition_method="uniform")
    config = {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_accumulation_steps": job.micro_batches,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "pipeline": {"schedule": job.schedule},
    }
    optimizer = make_adam(job, list(module.parameters()))
    engine, *_ = amdp_plugin.initialize(model=module, config=config, optimizer=optimizer)
    torch.manual_seed(100 + rank)
    data = job.batches()
    losses = [float(engine.train_batch(data)) for _ in range(ITERATIONS)]
    engine.executor.quiesce()
    held = {rank: engine.module, **engine.guests}
    return {
        "weights": {stage: copies(each) for stage, each in held.items()},
        "losses": losses,
        "random": engine.pipeline.random_streams.states(),
        "gap": engine.executor.largest_gap,
    }


@pytest.mark.parametrize(
    "job",
    [Job("paci", 2, 2, model=DROPOUT), Job("paci", 3, 1, model=DROPOUT), Job("amdp", 4, 4, model=DROPOUT)],
    ids=lambda job: f"{job.schedule}, {job.pipeline} stages",
)
def test_the_same_updates(job: Job) -> None:
    """Bit for bit: the same stages, the same AdamW, gradients summed in the same order."""
    found = run_ranks(job.pipeline, train_in_deepspeed, job)
    expected = run(job, ITERATIONS)
    for rank, (left, right) in enumerate(zip(found, expected, strict=True)):
        held = {**right["weights"], **right["guests"]}
        assert left["weights"].keys() == held.keys()
        for stage, weights in left["weights"].items():
            assert_same_weights(weights, held[stage], f"rank {rank}, stage {stage}")
        assert left["gap"] == right["gap"]
        for state, other in zip(left["random"], right["random"], strict=True):
            assert all(map(torch.equal, drawn_from(state), drawn_from(other)))
    means = [sum(window) / len(window) for window in expected[-1]["losses"]]
    assert found[0]["losses"] == pytest.approx(means, rel=1e-6)
    assert max(result["gap"] for result in found) > 0, "a schedule in which weights change in between"
