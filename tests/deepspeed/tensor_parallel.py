"""A small column/row-parallel pair of layers with its own autograd functions, on stages of two ranks."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

import amdp_plugin
from tests.runtime.models import OPTIMIZERS, WIDTH, loss

from .jobs import Job, configuration, finish, stream

TENSOR_PARALLEL, HIDDEN = 2, 8


class Whole(nn.Module):
    """What the shards compute together."""

    def __init__(self) -> None:
        super().__init__()
        self.column, self.row = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.row(torch.tanh(self.column(x)))


class Copy(torch.autograd.Function):
    """Identity; the gradients of the ranks are summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class Sum(torch.autograd.Function):
    """Sum over the ranks; the gradient goes to all of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class Shard(nn.Module):
    """This rank's columns of the first matrix and rows of the second."""

    def __init__(self, whole: Whole, rank: int, group: Any) -> None:
        super().__init__()
        self.group = group
        self.weight_in, self.bias_in, self.weight_out = (
            nn.Parameter(part.detach().clone())
            for part in (
                whole.column.weight.chunk(TENSOR_PARALLEL)[rank],
                whole.column.bias.chunk(TENSOR_PARALLEL)[rank],
                whole.row.weight.chunk(TENSOR_PARALLEL, dim=1)[rank],
            )
        )
        for sharded in (self.weight_in, self.bias_in, self.weight_out):
            sharded.tensor_model_parallel = True
        self.bias_out = nn.Parameter(whole.row.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(nn.functional.linear(Copy.apply(x, self.group), self.weight_in, self.bias_in))
        return x + Sum.apply(nn.functional.linear(hidden, self.weight_out), self.group) + self.bias_out


def whole_layers(stages: int) -> list[Whole]:
    """The same stages wherever they are built."""
    torch.manual_seed(7)
    return [Whole() for _ in range(stages)]


def join(shards: list[dict[str, Tensor]]) -> list[Tensor]:
    """The weights of a :class:`Whole`, in its order, from those of its shards."""
    parts = [list(shard.values()) for shard in shards]
    assert all(torch.equal(part[3], parts[0][3]) for part in parts), "the ranks disagree on what they share"
    inner, bias, outer = (torch.cat([part[i] for part in parts], dim=i // 2) for i in range(3))
    return [inner, bias, outer, parts[0][3]]


def train(rank: int, job: Job) -> dict[str, Any]:
    """Train on two ranks a stage and replica: neighbours, those of the stages' replicas one after the other."""
    deepspeed.init_distributed("gloo")
    pairs = job.stages * job.replicas
    groups = [dist.new_group([TENSOR_PARALLEL * pair + r for r in range(TENSOR_PARALLEL)]) for pair in range(pairs)]
    pair, shard = divmod(rank, TENSOR_PARALLEL)
    topology = PipeModelDataParallelTopology(num_pp=job.stages, num_mp=TENSOR_PARALLEL, num_dp=job.replicas)
    layers = [Shard(whole, shard, groups[pair]) for whole in whole_layers(job.stages)]
    module = PipelineModule(layers, topology=topology, loss_fn=loss, partition_method="uniform")
    optimizer = OPTIMIZERS[str(job.optimizer)](list(module.parameters()))
    engine, *_ = amdp_plugin.initialize(model=module, config=configuration(job), optimizer=optimizer)
    batches = stream(engine, job)
    return finish(engine, [float(engine.train_batch(batches)) for _ in range(job.windows)])
