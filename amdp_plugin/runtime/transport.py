"""Raw messages between the ranks of one pipeline: gloo, NCCL, and CUDA tensors over gloo."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

ACTIVATION_TAG, GRADIENT_TAG, SIGNATURE_TAG, HEADER_TAG, REPORT_TAG = range(1, 6)


class Incoming(NamedTuple):
    """A receive under way: when ``work`` is done ``landed`` holds the bytes, wanted in ``target``."""

    work: dist.Work
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

    Small control messages go over gloo, whatever the device. Tensors go over gloo, or, for CUDA devices
    where NCCL is the job's backend, over one NCCL communicator per directed pair, because NCCL has no
    tags and matches messages in the order of issue per communicator.

    Args:
        ranks: global rank of each pipeline rank.
        links: the directed pairs (pipeline ranks) that exchange tensors.
        device: where tensors live.
        timeout_seconds: bound on every operation of the groups.
    """

    def __init__(
        self, ranks: Sequence[int], links: Iterable[tuple[int, int]], device: torch.device, timeout_seconds: float
    ) -> None:
        self.ranks, self.device = list(ranks), device
        timeout = timedelta(seconds=timeout_seconds)

        def group(members: Sequence[int], backend: str) -> Any:
            return dist.new_group(members, timeout=timeout, backend=backend, use_local_synchronization=True)

        self._control = group(self.ranks, "gloo")
        self._groups: dict[tuple[int, int], Any] = {}
        me = self.ranks.index(dist.get_rank())
        if device.type == "cuda" and "nccl" in str(dist.get_backend()):
            self._staged = False
            for sender, receiver in sorted(set(links)):
                if me in (sender, receiver):
                    self._groups[sender, receiver] = group([self.ranks[sender], self.ranks[receiver]], "nccl")
        else:
            self._staged = device.type != "cpu"
        self.rank = me

    def send(self, tensor: Tensor, receiver: int, tag: int) -> tuple[dist.Work, Tensor]:
        """Start to send; the tensor that comes back must live, unchanged, until the work is done."""
        data = wire(tensor)
        if self._staged:
            pinned = torch.empty(data.shape, dtype=data.dtype, pin_memory=True)
            pinned.copy_(data, non_blocking=True)
            torch.cuda.current_stream(self.device).synchronize()
            data = pinned
        group = self._groups.get((self.rank, receiver), self._control)
        return dist.isend(data, self.ranks[receiver], group=group, tag=tag), data

    def receive(self, target: Tensor, sender: int, tag: int) -> Incoming:
        """Start to receive into ``target``, contiguous and of the shape and dtype that are coming."""
        landed = wire(target)
        if self._staged:
            landed = torch.empty(landed.shape, dtype=landed.dtype, pin_memory=True)
        group = self._groups.get((sender, self.rank), self._control)
        work = dist.irecv(landed, self.ranks[sender], group=group, tag=tag)
        if not self._staged:
            return Incoming(work, target, target)
        return Incoming(work, landed.view(torch.bool) if target.dtype == torch.bool else landed, target)

    def send_control(self, values: Tensor, receiver: int, tag: int) -> tuple[dist.Work, Tensor]:
        """Start to send a small CPU tensor, beside the tensors' own order."""
        return dist.isend(values, self.ranks[receiver], group=self._control, tag=tag), values

    def receive_control(self, target: Tensor, sender: int, tag: int) -> dist.Work:
        """Start to receive a small CPU tensor."""
        return dist.irecv(target, self.ranks[sender], group=self._control, tag=tag)
