"""What the ranks of a pipeline tell each other at its start: that they run one program, and what memory it takes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from hashlib import sha256

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..plan.planner import Planner
from .torch_private import set_timeout

MEBIBYTE = 2**20
NO_TEXT = ("priorities", "alternatives", "smaller")
"""Fields of a schedule that hold functions: what they lead to is in the program."""


def agree(planner: Planner, rank: int, group: dist.ProcessGroup, device: torch.device) -> None:
    """Make sure that all ranks of the pipeline are going to run one program.

    Compared are the windows up to those that repeat, or as many as are examined at a start, and what the schedule
    says of itself: a schedule of somebody else may depend on the rank, or on chance, with one configuration.

    Raises:
        ValueError: on every rank, where they differ; they would wait for each other for ever, or mix up their
            micro-batches. Where this rank has no program at all, its own error.
    """
    schedule, failure = planner.schedule, None
    mine = repr((schedule.name, schedule.options, schedule.num_stages, schedule.micro_batches, planner.costs))
    try:
        program = _written_out(planner)
    except ValueError as error:
        program, failure = str(error), error  # the others are to hear of it, too
    digest = int.from_bytes(sha256(f"{mine}\n{program}".encode()).digest()[:7], "big")
    sums = torch.tensor([digest, -digest], device=device)
    dist.all_reduce(sums, op=dist.ReduceOp.MAX, group=group)
    if failure is not None:
        raise failure
    if sums.tolist() != [digest, -digest]:
        raise ValueError(
            f"the ranks of the pipeline are configured for different programs, rank {rank} for {mine}: give all of "
            "them the same configuration, and let nothing in a schedule of your own depend on the rank or on chance"
        )


def _written_out(planner: Planner) -> str:
    """The program, and what the schedule says of itself, as text that is the same wherever they are the same."""
    schedule = planner.schedule
    said = [(each.name, getattr(schedule, each.name)) for each in fields(schedule) if each.name not in NO_TEXT]
    _, end = planner.steady_windows()
    rows = [" ".join(map(str, row)) for index in range(end) for row in planner.window(index)]
    return "\n".join([repr(said), str(planner.period), *rows])


def bound_collectives(groups: Iterable[dist.ProcessGroup], timeout_seconds: float) -> None:
    """Let the groups that a host uses fail, not hang, when a peer is gone."""
    for group in groups:
        set_timeout(group, timeout_seconds)


@dataclass(frozen=True)
class Held:
    """What one rank keeps for training, for :func:`memory_table`.

    Args:
        home: the modules of its own stage.
        guests: replicas of other ranks' stages.
        sum_dtype: in what gradients are summed, where that is not the parameters' dtype.
        exchange: the buffers that replicas exchange gradients and weights through.
    """

    home: Sequence[nn.Module]
    guests: Sequence[nn.Module]
    sum_dtype: torch.dtype | None
    exchange: Iterable[Tensor]


def memory_table(held: Held, group: dist.ProcessGroup, device: torch.device) -> list[str]:
    """MiB of every rank's weights and gradients, beside those under 1F1B. All ranks of ``group`` must call it."""
    home, guests = _sizes(held.home, held.sum_dtype), _sizes(held.guests, held.sum_dtype)
    mine = torch.tensor([*home, home[0] + guests[0], home[1] + guests[1], _bytes(held.exchange)], device=device)
    ranks = [torch.zeros_like(mine) for _ in range(group.size())]
    dist.all_gather(ranks, mine, group=group)
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


def clipping_line(limit: float, updates_meet: bool) -> str:
    """By which norm gradients are clipped."""
    if limit <= 0:
        return "gradient clipping: off"
    scope = "the whole model" if updates_meet else "each stage by its own norm"
    return f"gradient clipping: {scope}, at {limit}"


def _sizes(modules: Iterable[nn.Module], sum_dtype: torch.dtype | None) -> tuple[int, int]:
    """Bytes of the weights and of the sums of gradients of ``modules``."""
    parameters = [parameter for module in modules for parameter in module.parameters()]
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    sums = sum(parameter.numel() * (sum_dtype or parameter.dtype).itemsize for parameter in trained)
    return _bytes(parameters), sums


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
