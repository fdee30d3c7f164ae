"""Transports that keep to NCCL's rules where there is only gloo, and tell what they are asked for: the model under the
real executor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from datetime import timedelta
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor

from amdp_plugin.plan.messages import STREAMS, Link, Stream
from amdp_plugin.runtime.executor import Executor
from amdp_plugin.runtime.transport import Incoming, Transport
from amdp_plugin.runtime.watch import Waitable, Watch

BEGUN_TAG = 60
"""Of a stream, plus its number: a message's receive has begun."""


class Given(NamedTuple):
    """A message's send or receive, for an action of ``kind``."""

    sends: bool
    peer: int
    kind: str


class End(NamedTuple):
    """This rank's of a link."""

    sends: bool
    peer: int
    stream: Stream


class Waited(NamedTuple):
    """Of the sends or receives at ``end`` that of ``number``. Whether its peer had begun to receive is known of direct
    sends alone."""

    end: End
    number: int
    in_time: bool


class UnderWay:
    """A send or receive. Over when all of ``works`` are, however often somebody waits: gloo forgets a work then."""

    def __init__(self, rendezvous: Rendezvous, given: Given, begun: Tensor | None, *works: Waitable) -> None:
        self._rendezvous, self._begun, self._works = rendezvous, begun, list(works)
        self.end = End(given.sends, given.peer, STREAMS[given.kind])
        self._number = rendezvous.counts[self.end]
        rendezvous.counts[self.end] += 1
        rendezvous.given.append(given)
        rendezvous.under_way.add(self)

    @property
    def occupies(self) -> bool:
        """Whether it holds its rank's device."""
        return self._begun is not None

    def wait(self, timeout: timedelta) -> bool:
        in_time = self._begun is None or bool(self._begun)
        self._rendezvous.waited.append(Waited(self.end, self._number, in_time))
        return self.finish(timeout)

    def finish(self, timeout: timedelta) -> bool:
        while self._works:
            self._works[-1].wait(timeout)
            self._works.pop()
        return True


class Rendezvous:
    """The transports of one rank, and what they are asked for.

    Args:
        ranks: how many the pipeline has.
        timeout_seconds: bound on every message.

    Attributes:
        given: what was begun, in this order.
        waited: what was waited for, in this order, but by :meth:`synchronize`.
        under_way: of what was begun, all that somebody still holds.
        counts: how much was begun at every end of a link.
    """

    def __init__(self, ranks: int, timeout_seconds: float = 60) -> None:
        self._ranks, self._timeout_seconds = range(ranks), timeout_seconds
        self._transports: list[Transport] = []
        self.given: list[Given] = []
        self.waited: list[Waited] = []
        self.under_way: WeakSet[UnderWay] = WeakSet()
        self.counts: Counter[End] = Counter()
        _made.append(self)

    def transport(self, links: Iterable[Link], *_: Any) -> Transport:
        """A new one over ``links``."""
        self._transports.append(RendezvousTransport(self, self._ranks, links, self._timeout_seconds))
        return self._transports[-1]

    def synchronize(self) -> None:
        """Wait for all that the device has been given, as a host may that touches its device."""
        for each in list(self.under_way):
            if each.occupies:
                each.finish(timedelta(seconds=self._timeout_seconds))

    def synchronize_after_actions(self, executor: Executor) -> None:
        """From now on, after every one of ``executor``."""
        execute = executor.execute

        def executing(action: Any) -> None:
            execute(action)
            self.synchronize()

        executor.execute = executing  # type: ignore[method-assign]

    def take(self) -> list[Given]:
        """What was begun since the last time."""
        taken, self.given = self.given, []
        return taken

    def retained(self) -> Counter[End]:
        """Messages that are sent and that somebody still holds, at every end of a link."""
        return Counter(each.end for each in self.under_way if each.end.sends)


_made: list[Rendezvous] = []
"""Until the process ends: a transport that goes closes connections that others may still look at."""


class RendezvousTransport(Transport):
    """Messages of one link match in the order of issue, as ever; the send of a direct one ends with its receive."""

    def __init__(
        self, rendezvous: Rendezvous, ranks: Iterable[int], links: Iterable[Link], timeout_seconds: float
    ) -> None:
        super().__init__(list(ranks), (), torch.device("cpu"), Watch(dist.get_rank(), timeout_seconds))
        self._rendezvous, self._links = rendezvous, set(links)
        self._told: list[Any] = []

    def send(self, tensor: Tensor, receiver: int, kind: str) -> tuple[Waitable, Tensor]:
        assert Link(self.rank, receiver, STREAMS[kind]) in self._links
        given = Given(True, receiver, kind)
        if not self.direct:
            work, data = super().send(tensor, receiver, kind)
            return UnderWay(self._rendezvous, given, None, work), data
        begun = torch.zeros(1)
        told = self._control.receive(begun, receiver, BEGUN_TAG + STREAMS[kind])  # first: so it comes before answers
        work, data = super().send(tensor, receiver, kind)
        return UnderWay(self._rendezvous, given, begun, work, told), data

    def receive(self, target: Tensor, sender: int, kind: str, direct: bool) -> Incoming:
        assert Link(sender, self.rank, STREAMS[kind]) in self._links
        incoming, begun = super().receive(target, sender, kind, direct), None
        if direct:
            begun = torch.ones(1)
            told = self._control.send(begun, sender, BEGUN_TAG + STREAMS[kind])
            self._told.append((told, begun))  # gloo needs both until it has left
        given = Given(False, sender, kind)
        return incoming._replace(work=UnderWay(self._rendezvous, given, begun, incoming.work))
