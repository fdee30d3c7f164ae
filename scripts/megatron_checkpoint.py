"""Checkpoints of a training loop on megatron-core, in Megatron's distributed format."""

import queue
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing import ShardedObject
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer import MegatronOptimizer
from megatron_model import Trained
from torch import Tensor

LATEST = "latest"
METADATA = {"distrib_optim_sharding_type": "dp_reshardable"}
"""How the distributed optimizer lays out its state: as it is in memory, so that a load changes no bit."""


Beside = tuple[list[Any], list[Tensor] | None, list[Tensor] | None]
"""What a rank needs beside model and optimizer: what its streams of random numbers would draw next, what its stage
computes with under error feedback, and running means of its updates where a schedule keeps them."""


def save(directory: Path, step: int, trained: Trained, beside: Beside) -> None:
    """Write the checkpoint of ``step``, the latest in ``directory`` from then on. All ranks must call it."""
    folder = directory / f"step_{step:07d}"
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    dist.barrier()
    # What is written is reported within this process; Megatron's own queue is a process more, which imports all anew.
    filesystem_async._results_queue = queue.Queue()
    dist_checkpointing.save(state_of(trained, step, beside), str(folder))
    dist.barrier()
    if dist.get_rank() == 0:
        (directory / LATEST).write_text(folder.name)


def load(directory: Path, trained: Trained) -> tuple[int, Beside]:
    """Take over the latest checkpoint in ``directory``, which must be of as many ranks of each kind.

    Returns:
        The steps that it had made, and what it holds beside.
    """
    latest = directory / LATEST
    if not latest.is_file():
        raise ValueError(f"--resume: no checkpoint in {directory}")
    if trained.optimizer.config.use_distributed_optimizer:
        trained.optimizer.step()  # it cannot tell what it would load before it has made a step, of gradients of 0
    found = dist_checkpointing.load(state_of(trained), str(directory / latest.read_text().strip()))
    trained.model.load_state_dict(found["model"])
    with torch.no_grad():  # of the distributed optimizer, parts in float32 are views of the weights
        trained.optimizer.load_state_dict(found["optimizer"])
    separate_step_counts(trained.optimizer)
    trained.scheduler.load_state_dict(found["scheduler"])
    return found["step"], found["beside"]


def separate_step_counts(optimizer: MegatronOptimizer) -> None:
    """Give every parameter its own count of steps, as torch's Adam has it.

    The distributed optimizer loads the count as Apex's has it: one in each group, which all parameters would advance.
    """
    if not optimizer.config.use_distributed_optimizer:
        return
    for member in optimizer.chained_optimizers:
        for group in member.optimizer.param_groups:
            for parameter in group["params"]:
                state = member.optimizer.state[parameter]
                if "step" in state:
                    state["step"] = torch.tensor(float(group["step"]))


def state_of(trained: Trained, step: int | None = None, beside: Beside | None = None) -> dict[str, Any]:
    """Everything in a checkpoint; without ``beside`` where what is there is to be loaded."""
    model = trained.model.module.sharded_state_dict(metadata=METADATA)
    loading = beside is None
    return {
        "model": model,
        "optimizer": trained.optimizer.sharded_state_dict(model, is_loading=loading, metadata=METADATA),
        "scheduler": trained.scheduler.state_dict(),
        "step": step,
        "beside": ShardedObject("beside", beside, *ranks_of_each_kind()),
    }


def ranks_of_each_kind() -> tuple[tuple[int, ...], tuple[int, ...]]:
    """How many pipeline, tensor-parallel and data-parallel ranks there are, and which of them this is."""
    sizes = (
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_data_parallel_world_size(),
    )
    ranks = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(),
    )
    return sizes, ranks
