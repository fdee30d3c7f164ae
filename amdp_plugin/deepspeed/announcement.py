"""What an engine says when it starts: the plan's figures, what is clipped, and the memory of every rank."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import sha256
from typing import Any

import torch
from deepspeed import comm
from torch import Tensor, nn

from ..plan.planner import Planner
from ..plan.report import Report
from .guests import sum_dtype

MEBIBYTE = 2**20


def agree(engine: Any, planner: Planner) -> None:
    """Make sure that all ranks of the pipeline are going to run one program.

    Raises:
        ValueError: on every rank, where their configurations differ; they would wait for each other for ever.
    """
    schedule, costs = planner.schedule, planner.costs
    mine = repr((schedule.name, schedule.options, schedule.num_stages, schedule.micro_batches, costs))
    digest = int.from_bytes(sha256(mine.encode()).digest()[:7], "big")
    sums = torch.tensor([digest, -digest], device=engine.device)
    comm.all_reduce(sums, op=comm.ReduceOp.MAX, group=engine.grid.get_pipe_parallel_group())
    if sums.tolist() != [digest, -digest]:
        raise ValueError(
            f"the ranks of the pipeline are configured for different programs, rank {engine.stage_id} for {mine}: "
            "give all of them the same DeepSpeed configuration"
        )


def announce(engine: Any, planned: Report) -> None:
    """Print the summary on rank 0, as DeepSpeed prints the stages (its logger keeps silent below warnings).

    All ranks of the pipeline must call it.
    """
    memory = _memory(engine)
    if engine.global_rank == 0:
        print("\n".join([planned.to_text(), _clipping(engine), *memory]), flush=True)


def _clipping(engine: Any) -> str:
    if engine.gradient_clipping() <= 0:
        return "gradient clipping: off"
    scope = "the whole model" if engine.executor.schedule.updates_meet else "each stage by its own norm"
    return f"gradient clipping: {scope}, at {engine.gradient_clipping()}"


def _memory(engine: Any) -> list[str]:
    """MiB of every rank's weights and gradients, where it holds more than under 1F1B."""
    placement = engine.executor.schedule.placement
    if not engine.executor.schedule.reduces:
        return []
    home, guests = _sizes(engine, [engine.module]), _sizes(engine, engine.guests.values())
    exchange = _bytes(engine.exchange_buffers())
    mine = torch.tensor([*home, home[0] + guests[0], home[1] + guests[1], exchange], device=engine.device)
    ranks = [torch.zeros_like(mine) for _ in range(placement.num_ranks)]
    comm.all_gather(ranks, mine, group=engine.grid.get_pipe_parallel_group())
    columns = (torch.stack(ranks).double() / MEBIBYTE).T.tolist()

    def row(name: str, values: list[float], flushed: list[float] | None = None) -> str:
        cells = [f"{value:.1f}" for value in values]
        if flushed is not None:
            cells = [f"{cell} ({before:.1f})" for cell, before in zip(cells, flushed, strict=True)]
        return f"  {name:<15}{'  '.join(cells)}"

    return [
        "memory in MiB, by rank (under 1F1B):",
        row("weights", columns[2], columns[0]),
        row("gradients", columns[3], columns[1]),
        row("exchange", columns[4]),
        "  optimizer state as under 1F1B: of the rank's own stage alone",
    ]


def _sizes(engine: Any, modules: Iterable[nn.Module]) -> tuple[int, int]:
    """Bytes of the weights and of the sums of gradients of ``modules``."""
    dtype = sum_dtype(engine.optimizer)
    parameters = [parameter for module in modules for parameter in module.parameters()]
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    sums = sum(parameter.numel() * (dtype or parameter.dtype).itemsize for parameter in trained)
    return _bytes(parameters), sums


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
