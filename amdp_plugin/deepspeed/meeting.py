"""Whether an update is a stage's own affair or a meeting of all, and what either changes in DeepSpeed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import deepspeed
import torch
from deepspeed.pipe import PipelineModule, TiedLayerSpec
from torch import nn

from ..runtime.decisions import Answers, answering
from ..settings import Needs
from .sums import squared, squares_of


def needs(model: PipelineModule, clipping: float, fp16: bool) -> Needs:
    """What the job wants all stages to decide at every update."""
    return Needs(norm=clipping > 0, exact=bool(fp16), tied=tuple(each.stages for each in tied_across_stages(model)))


class TiedAttribute(NamedTuple):
    """A weight of the tied layers with ``key`` that several ``stages`` hold; ``name`` is that within the layer."""

    key: str
    name: str
    stages: tuple[int, ...]


def tied_across_stages(model: PipelineModule) -> list[TiedAttribute]:
    """The weights that several stages hold; the same answer on every rank."""
    stages: dict[str, set[int]] = {}
    names: dict[str, Sequence[str]] = {}
    for index, spec in enumerate(model._layer_specs):
        if isinstance(spec, TiedLayerSpec):
            stages.setdefault(spec.key, set()).add(model.stage_owner(index))
            names.setdefault(spec.key, spec.tied_weight_attr)
    return [
        TiedAttribute(key, name, tuple(sorted(owners)))
        for key, owners in sorted(stages.items())
        if len(owners) > 1
        for name in names[key]
    ]


def tied_parameters(model: PipelineModule) -> list[nn.Parameter | None]:
    """Of the stage here, the parameter of every weight that several stages hold; ``None`` where it has no part."""
    return [
        model._recursive_getattr(model.tied_modules[each.key], each.name) if model.stage_id in each.stages else None
        for each in tied_across_stages(model)
    ]


class StageGrid:
    """A grid whose model-parallel group is the tensor-parallel group of one stage.

    DeepSpeed's optimizers reduce norms and overflow over the model-parallel group, which contains the
    pipeline. Over this grid they reduce within the stage.
    """

    def __init__(self, grid: Any) -> None:
        self._grid = grid

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grid, name)

    def get_model_parallel_rank(self) -> int:
        return self._grid.get_slice_parallel_rank()

    def get_model_parallel_world_size(self) -> int:
        return self._grid.get_slice_parallel_world_size()

    def get_model_parallel_group(self) -> Any:
        return self._grid.get_slice_parallel_group()


def make_stage_local(optimizer: Any, grid: StageGrid) -> None:
    """Let ``optimizer`` (plain, bf16 or ZeRO-1) take norms and overflow within the stage."""
    owners: list[Any] = [optimizer, getattr(optimizer, "overflow_checker", None)]
    for owner in owners:
        if hasattr(owner, "mpu"):
            owner.mpu = grid
    if hasattr(optimizer, "model_parallel_group"):
        optimizer.model_parallel_group = grid.get_model_parallel_group()
        optimizer.model_parallel_world_size = grid.get_model_parallel_world_size()
        optimizer.model_parallel_rank = grid.get_model_parallel_rank()


@contextmanager
def decided_by(answers: Answers, optimizer: Any, grid: StageGrid) -> Iterator[None]:
    """Within it ``optimizer``, or DeepSpeed in its place, takes for the norm of this stage's gradients, and for their
    overflow, what ``answers`` say."""
    own_norm = getattr(optimizer, "scaled_global_norm", None)
    if own_norm is None:
        operations = deepspeed.comm.ReduceOp.SUM, deepspeed.comm.ReduceOp.MAX
        group = grid.get_model_parallel_group()
        with answering(deepspeed.comm, group, operations, answers.whole, answers.broken):
            yield
        return
    own_reduction = optimizer._model_parallel_all_reduce

    def norm(*args: Any, **kwargs: Any) -> torch.Tensor:
        squares = squared(own_norm(*args, **kwargs))
        answers.whole(squares)
        return squares.sqrt()

    def reduction(tensor: torch.Tensor, op: Any) -> None:
        own_reduction(tensor, op)
        if op == deepspeed.comm.ReduceOp.MAX:
            answers.broken(tensor)

    optimizer.scaled_global_norm, optimizer._model_parallel_all_reduce = norm, reduction
    try:
        yield
    finally:
        del optimizer.scaled_global_norm, optimizer._model_parallel_all_reduce


@torch.no_grad()
def clip_by_whole_norm(parameters: Iterable[nn.Parameter], limit: float, grid: Any, device: Any) -> None:
    """Scale the gradients of this stage so that those of the whole model have a norm of at most ``limit``.

    Counts every parameter once, where DeepSpeed's ``clip_grad_norm_`` counts those of stage 0 alone: it takes the rank
    in the model-parallel group, which contains the pipeline, for that in the tensor-parallel group.
    """
    parameters = list(parameters)
    squares = squares_of(parameters, grid, device)
    coefficient = torch.clamp(limit / (squares.sqrt() + 1e-6), max=1.0)
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.mul_(coefficient)


def groups_of(grid: Any) -> list[Any]:
    """The process groups that an engine uses."""
    groups = [grid.get_data_parallel_group(), grid.get_slice_parallel_group()]
    return [*groups, grid.get_model_parallel_group(), grid.get_pipe_parallel_group()]
