"""A training loop's checkpoints: Megatron's distributed format, and what ``torch.save`` makes of the same.

The latter without the distributed optimizer, whose state Megatron reads from such files with Apex's Adam alone.
"""

from __future__ import annotations

import multiprocessing
import queue
from pathlib import Path
from typing import Any

import megatron.core.dist_checkpointing.strategies.torch  # noqa: F401 - what every rank would import with a checkpoint
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing import ShardedObject
from megatron.core.dist_checkpointing.strategies import filesystem_async

from amdp_plugin.megatron.optimizer import members

from .training import Beside, Trainer

LAYOUT = {"distrib_optim_sharding_type": "dp_reshardable"}
"""Of the distributed optimizer's state: as it is in memory."""


def save(trainer: Trainer, directory: Path, kind: str) -> None:
    """All that ``trainer`` needs to go on, mid-stream."""
    if trainer.is_scheduled:
        trainer.hook.quiesce()
    (_save_plain if kind == "torch" else _save_distributed)(trainer, directory)
    dist.barrier()


def load(trainer: Trainer, directory: Path, kind: str) -> None:
    """Let ``trainer`` go on where the one that saved was."""
    trainer.go_on_from(*(_load_plain if kind == "torch" else _load_distributed)(trainer, directory))


def _save_plain(trainer: Trainer, directory: Path) -> None:
    state = {
        "model": trainer.bare.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "iteration": trainer.iteration,
        "beside": trainer.beside(),
    }
    torch.save(state, directory / f"{dist.get_rank()}.pt")


def _load_plain(trainer: Trainer, directory: Path) -> Beside:
    state = torch.load(directory / f"{dist.get_rank()}.pt", weights_only=False)
    trainer.bare.load_state_dict(state["model"])
    trainer.optimizer.load_state_dict(state["optimizer"])
    trainer.iteration = state["iteration"]
    beside: Beside = state["beside"]
    return beside


def _save_distributed(trainer: Trainer, directory: Path) -> None:
    multiprocessing.current_process().daemon = False  # the writers are processes, and a daemon may have none
    filesystem_async._results_queue = queue.Queue()  # Megatron would start one more process for it, from nothing
    dist_checkpointing.save(_sharded(trainer, trainer.beside()), str(directory))


def _load_distributed(trainer: Trainer, directory: Path) -> Beside:
    if trainer.job.distributed_optimizer:
        trainer.train(1)  # it cannot tell what it would load before it has made a step
        if trainer.is_scheduled:
            trainer.hook.quiesce()  # which makes those that wait for a decision
    state = dist_checkpointing.load(_sharded(trainer), str(directory))
    trainer.bare.load_state_dict(state["model"])
    with torch.no_grad():  # of the distributed optimizer, parts in fp32 are views of the weights
        trainer.optimizer.load_state_dict(state["optimizer"])
    if trainer.job.distributed_optimizer:
        _restore_steps(trainer.optimizer)
    trainer.iteration = state["iteration"]
    beside: Beside = state["beside"]
    return beside


def _restore_steps(optimizer: Any) -> None:
    """Megatron's distributed optimizer, under stock as well, reads the number of steps into the groups, which is where
    Apex's Adam has it; torch's has one beside each parameter."""
    for member in members(optimizer):
        for group in member.optimizer.param_groups:
            for parameter in group["params"]:
                member.optimizer.state[parameter]["step"] = torch.tensor(group["step"])


def _sharded(trainer: Trainer, beside: Beside | None = None) -> dict[str, Any]:
    """Without ``beside`` where it is to be loaded."""
    model = trainer.bare.sharded_state_dict(metadata=LAYOUT)
    ranks = trainer.job.pipeline, trainer.job.tensor, trainer.job.data
    position = trainer.stage, parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_data_parallel_rank()
    return {
        "model": model,
        "optimizer": trainer.optimizer.sharded_state_dict(model, is_loading=beside is None, metadata=LAYOUT),
        "iteration": trainer.iteration,
        "beside": ShardedObject("beside", beside, ranks, position),
    }
