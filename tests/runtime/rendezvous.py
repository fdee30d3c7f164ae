"""A transport that keeps to NCCL's rules where there is only gloo: the model under the real executor."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from amdp_plugin.plan.messages import STREAMS, Link
from amdp_plugin.runtime.transport import Incoming, Transport
from amdp_plugin.runtime.watch import Waitable

BEGUN_TAG = 60
"""Of messages in a stream, plus its number: their receive has begun."""


class Awaited:
    """Is over when all of ``works`` are, however often somebody waits: gloo forgets a work that was waited for."""

    def __init__(self, *works: Waitable) -> None:
        self._works = list(works)

    def wait(self, timeout: timedelta) -> bool:
        while self._works:
            self._works[-1].wait(timeout)
            self._works.pop()
        return True


class RendezvousTransport(Transport):
    """Messages of one link match in the order of issue, as ever; the send of a direct one ends with its receive."""

    def __init__(self, ranks: Sequence[int], links: Iterable[Link], timeout_seconds: float) -> None:
        super().__init__(ranks, links, torch.device("cpu"), timeout_seconds)
        self._timeout = timedelta(seconds=timeout_seconds)
        self._under_way: list[tuple[Any, Tensor]] = []
        self._told: list[tuple[dist.Work, Tensor]] = []

    def send(self, tensor: Tensor, receiver: int, kind: str) -> tuple[Any, Tensor]:
        sent, data = super().send(tensor, receiver, kind)
        if not self.direct:
            return sent, data
        word = torch.zeros(1)
        work = Awaited(sent, self._control.receive(word, receiver, BEGUN_TAG + STREAMS[kind]))
        self._under_way.append((work, word))
        return work, data

    def receive(self, target: Tensor, sender: int, kind: str, direct: bool) -> Incoming:
        incoming = super().receive(target, sender, kind, direct)
        if not direct:
            return incoming
        word = torch.zeros(1)
        told = self._control.send(word, sender, BEGUN_TAG + STREAMS[kind])
        self._told.append((told, word))  # gloo needs both until it has left
        work = Awaited(incoming.work)
        self._under_way.append((work, word))
        return incoming._replace(work=work)

    def synchronize(self) -> None:
        """Wait for all that the device has been given, as a host may that touches its device."""
        for work, _ in self._under_way:
            work.wait(self._timeout)
        self._under_way.clear()
