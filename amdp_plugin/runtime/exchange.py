"""What the replicas of a stage exchange: gradients to its home, weights back.

Every action starts its messages and goes on. The home receives into buffers of its own, used again and again; a
guest receives straight into its weights, unless it may use them meanwhile, and waits for them only before it uses the
stage again. When either begins, the plan says. Sums are taken in one order, home first, so that they do not depend on
who is late.

A weight that several stages share is exchanged likewise, but that its guests send and receive in memory of their own,
of several windows at once where windows are short, and take the oldest value when the program says so.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..plan.action import REDUCE, UPDATE, Action
from ..plan.devices import Provision
from ..plan.postings import next_guest
from ..plan.schedule import Schedule
from .replica import Guest, Home
from .tied import Replicas, TiedGuest, tied_guests
from .transport import Incoming, Transport
from .watch import Waitable, Watch

CONTIGUOUS = torch.contiguous_format
"""Of what is received into; a buffer of a module may be laid out otherwise."""


class _Receiving(NamedTuple):
    buffer: Tensor
    incoming: Incoming


class _Arriving(NamedTuple):
    action: Action
    incoming: Incoming


class _Sent(NamedTuple):
    action: Action
    receiver: int
    work: Waitable
    tensor: Tensor


class Exchange:
    """One rank's side.

    Args:
        schedule: tells who holds what.
        replicas: the stages and tied weights on this rank that others hold too.
        transport: the raw messages.
        watch: bounds and records the waits.

    Attributes:
        landing: as in :class:`.Provision`, of which :meth:`provide` tells before the first window.
    """

    def __init__(self, schedule: Schedule, replicas: Replicas, transport: Transport, watch: Watch) -> None:
        self._holders, self._is_tied = schedule.sharing.holders, schedule.sharing.is_tied
        self._replicas, self._transport, self._watch = replicas, transport, watch
        self._homes = {stage: replica for stage, replica in replicas.items() if isinstance(replica, Home)}
        self._free: dict[int, list[Tensor]] = {stage: [] for stage in self._homes}
        self._kept: list[Tensor] = []
        self._begun: dict[int, dict[int, bool]] = {stage: {} for stage in self._homes}
        """Guests whose gradients may be received, and whether they come directly (:attr:`.Transport.direct`)."""
        self._receiving: dict[int, dict[int, _Receiving]] = {stage: {} for stage in self._homes}
        self._arriving: dict[int, deque[_Arriving]] = {}
        """Of every guest, the values that are received, in the order in which they come."""
        self._sent: dict[int, list[_Sent]] = {}
        self.landing = False

    def provide(self, provision: Provision) -> None:
        """Take the memory for what is received; nothing may be in flight."""
        self.landing = provision.landing
        for stage, free in self._free.items():
            while len(free) < min(provision.gradient_buffers, len(self._holders[stage]) - 1):
                free.append(self._homes[stage].gradient_buffer())
                self._kept.append(free[-1])
        for guest in self._guests():
            guest.land(self.landing)

    def buffers(self) -> Iterator[Tensor]:
        """The memory that exchanging takes on this rank, beside the replicas' own."""
        yield from self._kept
        for home in self._homes.values():
            yield home.send_buffer
        for guest in self._guests():
            if guest.landing is not None:
                yield guest.landing
        for tied in tied_guests(self._replicas):
            yield from tied.buffers()

    def _guests(self) -> list[Guest]:
        return [replica for replica in self._replicas.values() if isinstance(replica, Guest)]

    def receive(self, sender: int, action: Action) -> None:
        """Begin to receive what ``action`` takes: at home the gradients of the guest ``sender``, as soon as there is a
        buffer; on a guest the new weights, which it uses from :meth:`settle` on."""
        if action.kind == REDUCE:
            self._begun[action.stage][sender] = self._transport.direct
            self._receive_gradients(action, self._holders[action.stage][1:])
        else:
            self._receive_weights(action)

    def reduce(self, action: Action) -> None:
        """On a guest, send the window's gradients home; at home, add those of the guests, one after the other."""
        replica = self._replicas[action.stage]
        if not isinstance(replica, Home):
            self._send(action, [replica.outgoing()], self._holders[action.stage][:1])
            return
        guests = self._holders[action.stage][1:]
        for added, guest in enumerate(guests, start=1):
            buffer, incoming = self._receiving[action.stage].pop(guest)
            self._wait(incoming, action, guest)
            with self._watch.timeline.span(str(action)):
                replica.add(incoming.finish())
            self._free[action.stage].append(buffer)
            self._receive_gradients(action, guests[added:])

    def send_weights(self, action: Action) -> None:
        """At home, after the step: start to send the new weights to the guests."""
        self._reap(action.stage)
        self._send(action, [self._homes[action.stage].weights()], self._holders[action.stage][1:])

    def pass_on(self, action: Action) -> None:
        """Of a tied weight: at home, after its stage's step, start to send it; on a guest, take the value."""
        if action.stage in self._homes:
            self.send_weights(action)
        else:
            self._take(action.stage)

    def _receive_weights(self, action: Action) -> None:
        replica, home = self._replicas[action.stage], self._holders[action.stage][0]
        assert not isinstance(replica, Home)
        with self._watch.guard("receiving", action, home):
            incoming = self._receive(replica.incoming(), home, action)
        self._arriving.setdefault(action.stage, deque()).append(_Arriving(action, incoming))

    def settle(self, stage: int, updates: float = inf) -> None:
        """Wait until ``stage`` has the weights that so many updates made, if they are on their way."""
        arriving = self._arriving.get(stage)
        while arriving and arriving[0].action.index < updates:
            self._take(stage)

    def _take(self, stage: int) -> None:
        """Wait for the oldest weights that are on their way."""
        action, incoming = self._arriving[stage].popleft()
        self._wait(incoming, action, self._holders[stage][0])
        incoming.finish()
        self._reap(stage, action.index)  # the home has stepped, so it has had the gradients
        replica = self._replicas[stage]
        assert not isinstance(replica, Home)
        replica.arrived()

    def go_direct(self) -> None:
        """A window is over in which all kernels were loaded: see :class:`.Transport`."""
        self._transport.direct = True

    def drain(self) -> None:
        """See all messages through."""
        for stage in self._replicas:
            self.settle(stage)
        for stage in self._homes:
            self._reap(stage)

    def copy_home(self, modules: Mapping[int, nn.Module]) -> None:
        """Let every guest take all weights and buffers of its home; nothing may be in flight.

        Args:
            modules: the stages and tied weights on this rank that others hold too.
        """
        for stage, module in sorted(modules.items()):
            home, *guests = self._holders[stage]
            action, tensors = Action(stage, UPDATE, 0), _all_tensors(module)
            if stage in self._homes:
                self._send(action, tensors, guests)
                continue
            for tensor in tensors:
                incoming = self._receive(torch.empty_like(tensor, memory_format=CONTIGUOUS), home, action)
                self._wait(incoming, action, home)
                tensor.copy_(incoming.finish())
        for guest in tied_guests(self._replicas):
            guest.adopt()
        self.drain()

    def is_home(self, unit: int) -> bool:
        """Whether this rank is that of ``unit``, a stage or a tied weight."""
        return unit in self._homes

    def show_homes(self, modules: Mapping[int, nn.Module]) -> None:
        """Between two windows, let guests of tied weights show what their homes have, whatever is still on its way to
        them, until they :meth:`.TiedGuest.write` again what they compute with. All ranks must call it.

        Args:
            modules: as for :meth:`copy_home`.
        """
        for unit, module in sorted(modules.items()):
            replica = self._replicas[unit]
            if isinstance(replica, TiedGuest):
                replica.write(*self.share(unit, _all_tensors(module)))
            elif self._is_tied(unit):
                self.share(unit, _all_tensors(module))

    def share(self, unit: int, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Between two windows: at the home of a tied weight send ``tensors`` to its guests; on a guest receive them.

        Returns:
            The home's; ``tensors`` are as many of the same shapes and dtypes everywhere.
        """
        home, *guests = self._holders[unit]
        action, copies = Action(unit, UPDATE, 0), [tensor.clone(memory_format=CONTIGUOUS) for tensor in tensors]
        if unit in self._homes:
            self._send(action, copies, guests)
            return copies
        arriving = [self._receive(copy, home, action) for copy in copies]
        for incoming in arriving:
            self._wait(incoming, action, home)
        return [incoming.finish() for incoming in arriving]

    def _receive_gradients(self, action: Action, to_add: Sequence[int]) -> None:
        stage = action.stage
        begun, receiving, free = self._begun[stage], self._receiving[stage], self._free[stage]
        while (guest := next_guest(to_add, begun, receiving, len(free))) is not None:
            direct = begun.pop(guest)
            buffer = free.pop()
            with self._watch.guard("receiving", action, guest):
                incoming = self._receive(buffer, guest, action, direct)
            receiving[guest] = _Receiving(buffer, incoming)

    def _send(self, action: Action, tensors: Iterable[Tensor], receivers: Iterable[int]) -> None:
        tensors, kept = list(tensors), self._sent.setdefault(action.stage, [])
        for receiver in receivers:
            with self._watch.guard("sending", action, receiver):
                for tensor in tensors:
                    kept.append(_Sent(action, receiver, *self._transport.send(tensor, receiver, action.kind)))

    def _receive(self, target: Tensor, sender: int, action: Action, direct: bool | None = None) -> Incoming:
        direct = self._transport.direct if direct is None else direct
        return self._transport.receive(target, sender, action.kind, direct)

    def _wait(self, incoming: Incoming, action: Action, sender: int) -> None:
        self._watch.wait(incoming.work, "receiving", action, sender)

    def _reap(self, stage: int, window: float = inf) -> None:
        """Wait until what was sent for ``stage``, in windows up to that, has left its buffers."""
        all_sent = self._sent.pop(stage, [])
        self._sent[stage] = [sent for sent in all_sent if sent.action.index > window]
        for sent in all_sent:
            if sent.action.index <= window:
                self._watch.wait(sent.work, "sending", sent.action, sent.receiver)


def _all_tensors(module: nn.Module) -> list[Tensor]:
    """All parameters and buffers, in an order that is the same on all ranks."""
    return [*(parameter.detach() for parameter in module.parameters()), *module.buffers()]
