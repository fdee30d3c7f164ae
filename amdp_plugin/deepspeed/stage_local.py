"""Optimizer steps that do not make the stages of a pipeline wait for one another."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from torch.distributed.distributed_c10d import _set_pg_timeout


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
    if hasattr(optimizer, "mpu"):
        optimizer.mpu = grid
    if hasattr(optimizer, "model_parallel_group"):
        optimizer.model_parallel_group = grid.get_model_parallel_group()
        optimizer.model_parallel_world_size = grid.get_model_parallel_world_size()
        optimizer.model_parallel_rank = grid.get_model_parallel_rank()


def bound_collectives(grid: Any, timeout_seconds: float) -> None:
    """Let the groups that a stage's step uses fail, not hang, when a peer is gone."""
    for group in (grid.get_data_parallel_group(), grid.get_slice_parallel_group()):
        _set_pg_timeout(timedelta(seconds=timeout_seconds), group)
