"""Where DeepSpeed's optimizers sum up the gradients of a stage, and what those sums are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
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

    def park(self) -> PartitionedPark:
        # Reduced, they are no longer needed where they were summed up.
        self._attributes.park()
        parked = PartitionedPark(self._attributes.park(), {})
        self._swap_reduced(parked)
        return parked

    def swap(self, parked: PartitionedPark) -> None:
        self._attributes.swap(parked.summed)
        self._swap_reduced(parked)

    def restore(self, parked: PartitionedPark) -> None:
        self.swap(parked)

    def multiply(self, factor: float) -> None:
        self._attributes.multiply(factor)

    def tensors(self, parked: PartitionedPark) -> Iterator[Tensor]:
        yield from self._attributes.tensors(parked.summed)
        for parts in parked.reduced.values():
            yield from parts or ()

    def _swap_reduced(self, parked: PartitionedPark) -> None:
        parked.reduced, self._optimizer.averaged_gradients = self._optimizer.averaged_gradients, parked.reduced


@dataclass
class PartitionedPark:
    """What is at the parameters, and what is reduced."""

    summed: list[Tensor | None]
    reduced: dict[int, Any]


def stage_squares(engine: Any, grid: Any) -> Tensor:
    """The sum of the squares of the gradients of the engine's stage, once they are reduced, over its tensor-parallel
    ranks.

    Args:
        grid: whose model-parallel group is that of the stage.
    """
    optimizer = engine.optimizer
    if hasattr(optimizer, "scaled_global_norm"):
        return squared(optimizer.scaled_global_norm())
    if isinstance(optimizer, BF16_Optimizer):
        return squared(get_global_norm_of_tensors(optimizer.get_grads_for_norm()[0], mpu=grid))
    return squares_of(engine.module.parameters(), grid, engine.device)


def squared(norm: Tensor) -> Tensor:
    """The square of a norm of DeepSpeed's, which says -1 where gradients are not finite: then infinity."""
    return torch.where(norm >= 0, norm.square(), torch.inf)


@torch.no_grad()
def squares_of(parameters: Iterable[nn.Parameter], grid: Any, device: Any) -> Tensor:
    """The sum of the squares of gradients over the model-parallel group of ``grid``, every parameter counted on one of
    the ranks that hold it."""
    counted = []
    for parameter in parameters:
        once = grid.get_slice_parallel_rank() == 0 or is_model_parallel_parameter(parameter)
        if parameter.grad is not None and once and not getattr(parameter, "ds_pipe_replicated", False):
            counted.append(parameter.grad.float().norm())
    squares = torch.stack(counted).square().sum() if counted else torch.zeros((), device=device)
    dist.all_reduce(squares, group=grid.get_model_parallel_group())
    return squares
