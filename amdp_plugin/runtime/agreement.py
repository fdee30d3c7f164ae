"""What the ranks of a pipeline tell each other at its start: the program that they run, and what memory it takes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from hashlib import sha256

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..plan.costs import CostModel
from ..plan.handover import read, written
from ..plan.planner import Planner
from ..plan.schedule import Schedule
from .torch_private import set_timeout
from .transport import WATCHDOG

MEBIBYTE = 2**20
NO_TEXT = ("priorities", "alternatives", "smaller")
"""Fields of a schedule that hold functions: what they lead to is in the program."""
PLANNING_RANK = 0
"""The rank, in the group of the pipeline, that plans for all."""
CLIPPING = {
    "local": "each stage by its own norm",
    "latest": "the whole model, as far as each stage knows it when it updates (earlier stages: of the window before)",
    "relayed": "the whole model",
    "meeting": "the whole model",
}
"""By which norm gradients are clipped, under each way to decide."""
FAILED = -1
"""Told instead of the length of a program: what follows is the reason why there is none."""


def plan_together(schedule: Schedule, costs: CostModel, group: dist.ProcessGroup, device: torch.device) -> Planner:
    """The program that all ranks of the pipeline are going to run: the first one plans, the others receive it.

    Before, they compare their configurations and what the schedule says of itself: one of somebody else may depend on
    the rank, or on chance. After, they compare what they hold. Where no repetition was seen, every rank makes the
    windows under the order found, for it goes on by itself, and so shows that it would make the same.

    Raises:
        ValueError: on every rank, where they differ; they would wait for each other for ever, or mix up their
            micro-batches. Also where the first rank finds no program.
    """
    mine = repr((schedule.name, schedule.options, schedule.num_stages, schedule.micro_batches, costs))
    _compare(f"{mine}\n{_said(schedule)}".encode(), mine, group, device)
    planner, failure, text = None, None, b""
    if group.rank() == PLANNING_RANK:
        try:
            planner = Planner(schedule, costs)
            text = written(planner)
        except ValueError as error:
            failure = error
    text = _handed_over(str(failure).encode() if failure else text, failure is not None, group, device)
    if failure is not None:
        raise failure
    held = text
    if planner is None:
        try:
            planner = read(text, schedule, costs)
            held = written(planner)
        except ValueError as error:  # the others are to hear of it, too
            failure, held = error, str(error).encode()
    try:
        _compare(held, mine, group, device)
    except ValueError as error:
        raise failure or error from None
    assert planner is not None
    return planner


def _said(schedule: Schedule) -> str:
    """What ``schedule`` and its alternatives say, as text that is the same in all processes."""
    texts = [
        repr([(each.name, getattr(said, each.name)) for each in fields(said) if each.name not in NO_TEXT])
        for said in (*schedule.alternatives, schedule)
    ]
    return "\n".join([*texts, str(len(schedule.priorities))])


def _handed_over(text: bytes, failed: bool, group: dist.ProcessGroup, device: torch.device) -> bytes:
    """On every rank, the planning rank's ``text``. Raises ``ValueError`` with it on the others, where that failed."""
    head = torch.tensor([len(text), FAILED if failed else 0], device=device)
    dist.broadcast(head, group=group, group_src=PLANNING_RANK)
    length, state = head.tolist()
    leads = group.rank() == PLANNING_RANK
    content = torch.frombuffer(bytearray(text), dtype=torch.uint8) if leads else torch.empty(length, dtype=torch.uint8)
    content = content.to(device)
    dist.broadcast(content, group=group, group_src=PLANNING_RANK)
    received = content.cpu().numpy().tobytes()
    if state == FAILED and not leads:
        raise ValueError(received.decode())
    return received


def _compare(text: bytes, mine: str, group: dist.ProcessGroup, device: torch.device) -> None:
    """Raise ``ValueError`` on every rank, with ``mine``, its configuration, where ``text`` is not the same on all."""
    digest = int.from_bytes(sha256(text).digest()[:7], "big")
    sums = torch.tensor([digest, -digest], device=device)
    dist.all_reduce(sums, op=dist.ReduceOp.MAX, group=group)
    if sums.tolist() != [digest, -digest]:
        raise ValueError(
            f"the ranks of the pipeline are configured for different programs, rank {group.rank()} for {mine}: give "
            "all of them the same configuration, and let nothing in a schedule of your own depend on the rank or on "
            "chance"
        )


def bound_collectives(groups: Iterable[dist.ProcessGroup], timeout_seconds: float) -> None:
    """Let the groups that a host uses fail, not hang, when a peer is gone.

    NCCL counts from when a collective is issued, in the first window too, and ends the process: only when the host,
    which has a limit of its own and can say what it waits for, must have done so.
    """
    for group in groups:
        by_device = "nccl" in dist.get_backend_config(group)
        set_timeout(group, timeout_seconds * (WATCHDOG if by_device else 1))


@dataclass(frozen=True)
class Held:
    """What one rank keeps for training, for :func:`memory_table`.

    Args:
        home: the modules of its own stage.
        guests: replicas of other ranks' stages.
        sum_dtype: in what gradients are summed, where that is not the parameters' dtype.
        exchange: the buffers that replicas exchange gradients and weights through.
        plain: bytes of the plain iterate that error feedback keeps beside the weights.
        parked: gradients of closed windows that wait for their update at once.
        extrapolated: bytes of what is kept while a pass computes with extrapolated weights, and to make them.
    """

    home: Sequence[nn.Module]
    guests: Sequence[nn.Module]
    sum_dtype: torch.dtype | None
    exchange: Iterable[Tensor]
    plain: int = 0
    parked: int = 0
    extrapolated: int = 0


def memory_table(held: Held, group: dist.ProcessGroup, device: torch.device) -> list[str]:
    """MiB of every rank's weights and gradients, beside those under 1F1B. All ranks of ``group`` must call it."""
    home, guests = _sizes(held.home, held.sum_dtype), _sizes(held.guests, held.sum_dtype)
    all_weights, all_gradients = home[0] + guests[0], home[1] * (1 + held.parked) + guests[1]
    more = _bytes(held.exchange), held.plain, held.extrapolated
    mine = torch.tensor([*home, all_weights, all_gradients, *more], device=device)
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
        *([row("plain iterate", columns[5])] if any(columns[5]) else []),
        *([row("extrapolation", columns[6])] if any(columns[6]) else []),
        "  optimizer state as under 1F1B: of the rank's own stage alone",
    ]


def clipping_line(limit: float, schedule: Schedule) -> str:
    """By which norm gradients are clipped."""
    if limit <= 0:
        return "gradient clipping: off"
    scope = "the whole model" if schedule.updates_meet else CLIPPING[schedule.decisions]
    return f"gradient clipping: {scope}, at {limit}"


def _sizes(modules: Iterable[nn.Module], sum_dtype: torch.dtype | None) -> tuple[int, int]:
    """Bytes of the weights and of the sums of gradients of ``modules``."""
    parameters = [parameter for module in modules for parameter in module.parameters()]
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    sums = sum(parameter.numel() * (sum_dtype or parameter.dtype).itemsize for parameter in trained)
    return _bytes(parameters), sums


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
