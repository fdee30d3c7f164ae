"""A transport that keeps to NCCL's rules where there is only gloo: the model under the real executor."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from amdp_plugin.runtime.transport import Incoming, Transport, wire

DATA_TAG, BEGUN_TAG = 60, 61


class Awaited:
    """Is over when all of ``works`` are, however often somebody waits: gloo forgets a work that was waited for."""

    def __init__(self, *works: dist.Work) -> None:
        self._works = list(works)

    def wait(self, timeout: timedelta) -> bool:
        while self._works:
            self._works[-1].wait(timeout)
            self._works.pop()
        return True


class RendezvousTransport(Transport):
    """Direct messages of one link match in the order of issue, whatever they are; their send ends with the receive."""

    def __init__(self, ranks: Sequence[int], timeout_seconds: float) -> None:
        super().__init__(ranks, (), torch.device("cpu"), timeout_seconds)
        self._timeout = timedelta(seconds=timeout_seconds)
        self._under_way: list[tuple[Any, Tensor]] = []
        self._told: list[tuple[dist.Work, Tensor]] = []

    def send(self, tensor: Tensor, receiver: int, tag: int) -> tuple[Any, Tensor]:
        if not self.direct:
            return super().send(tensor, receiver, tag)
        data, word = wire(tensor), torch.zeros(1)
        sent = self._control.send(data, receiver, DATA_TAG)
        work = Awaited(sent, self._control.receive(word, receiver, BEGUN_TAG))
        self._under_way.append((work, word))
        return work, data

    def receive(self, target: Tensor, sender: int, tag: int, direct: bool) -> Incoming:
        if not direct:
            return super().receive(target, sender, tag, direct)
        word = torch.zeros(1)
        self._told.append((self._control.send(word, sender, BEGUN_TAG), word))  # gloo needs both until it has left
        work = Awaited(self._control.receive(wire(target), sender, DATA_TAG))
        self._under_way.append((work, word))
        return Incoming(cast(dist.Work, work), target, target)

    def synchronize(self) -> None:
        """Wait for all that the device has been given, as a host may that touches its device."""
        for work, _ in self._under_way:
            work.wait(self._timeout)
        self._under_way.clear()
