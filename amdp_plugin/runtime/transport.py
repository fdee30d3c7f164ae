"""Raw messages between the ranks of one pipeline: gloo, NCCL, and CUDA tensors over gloo."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..plan.messages import STREAMS, Link, Stream
from .groups import MAX_CHANNELS, Group
from .watch import InStream, Waitable, Watch

SIGNATURE_TAG, HEADER_TAG, REPORT_TAG, SUM_TAG = range(len(Stream) + 1, len(Stream) + 5)
WATCHDOG = 10
"""NCCL gives a message up after this many times its limit, counted from when its receive begins. Until then a wait that
is too long has raised its own error, unless the host itself is held by CUDA, which waits for the device."""
CONTROL_TAGS = 8
"""Control messages of direction ``d`` have their tag plus ``d * CONTROL_TAGS``: each has an order of its own."""


class Incoming(NamedTuple):
    """A receive under way: when ``work`` is done ``landed`` holds the bytes, wanted in ``target``."""

    work: Waitable
    landed: Tensor
    target: Tensor

    def finish(self) -> Tensor:
        """The received tensor, on its device."""
        if self.landed is not self.target:
            self.target.copy_(self.landed, non_blocking=True)
        return self.target


def wire(tensor: Tensor) -> Tensor:
    """``tensor`` as the transports take it: contiguous, and booleans as bytes."""
    tensor = tensor.detach().contiguous()
    return tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor


class Transport:
    """Point-to-point messages of one pipeline. Every rank of the pipeline makes it at the same point.

    Small control messages go over gloo, whatever the device. Tensors go over gloo, where their stream is their tag, or,
    for CUDA devices where NCCL is the job's backend, over one NCCL communicator per link, because NCCL has no tags and
    matches messages in the order of issue per communicator.

    Even there they go through the hosts' memory at first: a message on a device occupies it until its peer is there,
    and whatever then waits for the whole device (kernels that are loaded, memory that is taken for the first time,
    groups that connect) waits for the peer, which may be waiting likewise.

    Attributes:
        direct: whether messages go from device to device where they can. To be set by all ranks between the same
            two windows.

    Args:
        ranks: global rank of each pipeline rank.
        links: what tensors go over, between pipeline ranks.
        device: where tensors live.
        watch: whose limit bounds every operation of the groups, and what is waited for here.
        max_channels: multiprocessors that a message may take.
    """

    def __init__(
        self,
        ranks: Sequence[int],
        links: Iterable[Link],
        device: torch.device,
        watch: Watch,
        max_channels: int = MAX_CHANNELS,
    ) -> None:
        self.ranks, self.device, self.direct = list(ranks), device, False
        self._watch, timeout = watch, watch.timeout
        self._control = Group(self.ranks, "gloo", timeout)
        self._groups: dict[Link, Group] = {}
        self.rank = me = self.ranks.index(dist.get_rank())
        if device.type == "cuda" and "nccl" in str(dist.get_backend()):
            for link in sorted(links):
                if me in (link.sender, link.receiver):
                    pair = [self.ranks[link.sender], self.ranks[link.receiver]]
                    self._groups[link] = Group(pair, "nccl", WATCHDOG * timeout, max_channels)
                    self._connect(link, timeout)

    def _connect(self, link: Link, timeout: timedelta) -> None:
        """Make the communicator now, in the order common to all: NCCL would make it at the first message."""
        probe, group = torch.zeros(1, device=self.device), self._groups[link]
        if self.rank == link.sender:
            group.send(probe, self.ranks[link.receiver], link.stream).wait(timeout)
        else:
            group.receive(probe, self.ranks[link.sender], link.stream).wait(timeout)

    def send(self, tensor: Tensor, receiver: int, kind: str) -> tuple[Waitable, Tensor]:
        """Start to send what an action of ``kind`` needs; the tensor that comes back must live, unchanged, until the
        work is done."""
        link = Link(self.rank, receiver, STREAMS[kind])
        data, group = wire(tensor), self._group(link, self.direct)
        if group is self._control and data.is_cuda:
            data = self._watch.fetch(data, f"computing what is sent to rank {receiver}")
        return self._waitable(group, group.send(data, self.ranks[receiver], link.stream)), data

    def receive(self, target: Tensor, sender: int, kind: str, direct: bool) -> Incoming:
        """Start to receive into ``target``, contiguous and of the shape and dtype that are coming.

        Args:
            kind: of the action that needs it.
            direct: what :attr:`direct` is in the window that the message is sent in.
        """
        link = Link(sender, self.rank, STREAMS[kind])
        landed, group = wire(target), self._group(link, direct)
        if group is not self._control or not target.is_cuda:
            work = group.receive(landed, self.ranks[sender], link.stream)
            return Incoming(self._waitable(group, work), target, target)
        landed = torch.empty(landed.shape, dtype=landed.dtype, pin_memory=True)
        work = group.receive(landed, self.ranks[sender], link.stream)
        return Incoming(work, landed.view(torch.bool) if target.dtype == torch.bool else landed, target)

    def _group(self, link: Link, direct: bool) -> Group:
        return self._groups[link] if direct and self._groups else self._control

    def _waitable(self, group: Group, work: dist.Work) -> Waitable:
        return work if group is self._control else InStream(work)

    def abort(self) -> None:
        """Give up the messages between devices, so that nothing keeps this process from ending."""
        for group in self._groups.values():
            group.abort()

    def send_control(self, values: Tensor, receiver: int, tag: int) -> tuple[dist.Work, Tensor]:
        """Start to send a small CPU tensor, beside the tensors' own order."""
        return self._control.send(values, self.ranks[receiver], tag), values

    def receive_control(self, target: Tensor, sender: int, tag: int) -> dist.Work:
        """Start to receive a small CPU tensor."""
        return self._control.receive(target, self.ranks[sender], tag)
