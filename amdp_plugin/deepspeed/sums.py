"""Where DeepSpeed's optimizers sum up the gradients of a stage, and what those sums are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.utils import get_global_norm_of_tensors, is_model_parallel_parameter
from torch import Tensor, nn

from ..runtime.parking import AttributeSums, BufferSums, Sums


def sums_of(engine: Any) -> Sums[Any]:
    """Those of the engine's own stage."""
    parameters = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
    if isinstance(engine.optimizer, BF16_Optimizer):
        return HighPrecisionSums(engine.optimizer)
    if hasattr(engine.optimizer, "averaged_gradients"):
        return PartitionedSums(engine.optimizer, parameters)
    return AttributeSums(parameters)


class HighPrecisionSums(BufferSums):
    """Of the bf16 optimizer: flat buffers, and a note of which parameters have a gradient in them."""

    def __init__(self, optimizer: BF16_Optimizer) -> None:
        super().__init__(optimizer.fp32_groups_gradients_flat)
        self._has = optimizer.fp32_groups_has_gradients

    def swap(self, parked: list[Tensor]) -> None:
        super().swap(parked)
        self._note()

    def restore(self, parked: list[Tensor]) -> None:
        super().restore(parked)
        self._note()

    def _note(self) -> None:
        """What has none has zeros."""
        for group, has in enumerate(self._has):
            self._has[group] = [True] * len(has)


class PartitionedSums:
    """Of ZeRO-1: at parameters while they are summed up, and the part of this replica once they are reduced.

    Args:
        optimizer: DeepSpeed's.
        parameters: of the stage, those that are trained.
    """

    def __init__(self, optimizer: Any, parameters: Iterable[nn.Parameter]) -> None:
        self._optimizer, self._attributes = optimizer, AttributeSums(parameters, ("grad", "grad_accum"))

    def park(self) -> tuple[list[Tensor | None], dict[int, Any]]:
        # Reduced, they are no longer needed where they were summed up.
        self._attributes.park()
        reduced, self._optimizer.averaged_gradients = self._optimizer.averaged_gradients, {}
        return self._attributes.park(), reduced

    def swap(self, parked: tuple[list[Tensor | None], dict[int, Any]]) -> None:
        early, reduced = parked
        self._attributes.swap(early)
        self._optimizer.averaged_gradients = dict(reduced)
        reduced.clear()

    def restore(self, parked: tuple[list[Tensor | None], dict[int, Any]]) -> None:
        self._attributes.swap(parked[0])

    def tensors(self, parked: tuple[list[Tensor | None], dict[int, Any]]) -> Iterator[Tensor]:
        early, reduced = parked
        yield from self._attributes.tensors(early)
        for parts in reduced.values():
            yield from parts or ()


def stage_squares(engine: Any, grid: Any) -> Tensor:
    """The sum of the squares of the gradients of the engine's stage, once they are reduced, over its tensor-parallel
    ranks.

    Args:
        grid: whose model-parallel group is that of the stage.
    """
    optimizer = engine.optimizer
    if hasattr(optimizer, "scaled_global_norm"):
        return optimizer.scaled_global_norm().square()
    if isinstance(optimizer, BF16_Optimizer):
        return get_global_norm_of_tensors(optimizer.get_grads_for_norm()[0], mpu=grid).square()
    squares = squares_of(engine.module.parameters(), grid, engine.device)
    dist.all_reduce(squares, group=grid.get_model_parallel_group())
    return squares


@torch.no_grad()
def squares_of(parameters: Iterable[nn.Parameter], grid: Any, device: Any) -> Tensor:
    """The sum of the squares of this rank's gradients, every parameter counted on one of the ranks that hold it."""
    counted = []
    for parameter in parameters:
        once = grid.get_slice_parallel_rank() == 0 or is_model_parallel_parameter(parameter)
        if parameter.grad is not None and once and not getattr(parameter, "ds_pipe_replicated", False):
            counted.append(parameter.grad.float().norm())
    return torch.stack(counted).square().sum() if counted else torch.zeros((), device=device)
