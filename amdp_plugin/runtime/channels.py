"""Ordered messages between stages: receives begun in the sender's order, sends that never block."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

from ..plan.action import BACKWARD, FORWARD, Action
from ..plan.schedule import Schedule
from .packing import Spec, pack, packed_spec, parts, specs_of
from .torch_private import storage_uses
from .transport import CONTROL_TAGS, HEADER_TAG, REPORT_TAG, SIGNATURE_TAG, SUM_TAG, Incoming, Transport
from .watch import InStream, Waitable, Watch

Tensors = tuple[Tensor, ...]

_DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128,
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool,
)  # fmt: skip
_SIGNATURE_LENGTH = 256
NOT_YET = -1
"""In the place of a control message that has not come; none ends so, but for losses, which are then just waited for."""


class Signature(NamedTuple):
    """Shapes and dtypes of the tensors of one message."""

    specs: tuple[Spec, ...]

    @classmethod
    def of(cls, tensors: Tensors) -> Signature:
        return cls(specs_of(tensors))

    def gradients(self) -> Signature:
        """What comes back for them: one gradient for every floating-point tensor."""
        return Signature(tuple(spec for spec in self.specs if spec[1].is_floating_point))

    def encode(self) -> Tensor:
        """As int64 [256]: count, then dtype, dimensions and sizes of each."""
        values = [len(self.specs)]
        for shape, dtype in self.specs:
            values += [_DTYPES.index(dtype), len(shape), *shape]
        if len(values) > _SIGNATURE_LENGTH:
            raise ValueError(f"{len(self.specs)} tensors cannot be described in {_SIGNATURE_LENGTH} numbers")
        return torch.tensor(values + [0] * (_SIGNATURE_LENGTH - len(values)), dtype=torch.int64)

    @classmethod
    def decode(cls, encoded: Tensor) -> Signature:
        values = iter(encoded.tolist())
        specs = []
        for _ in range(next(values)):
            dtype, dimensions = _DTYPES[next(values)], next(values)
            specs.append((tuple(next(values) for _ in range(dimensions)), dtype))
        return cls(tuple(specs))

    def __str__(self) -> str:
        return ", ".join(f"{list(shape)} {str(dtype).removeprefix('torch.')}" for shape, dtype in self.specs)


class BufferPool:
    """Receive buffers, used again as soon as nothing but the pool refers to their memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._free: dict[Spec, list[tuple[Tensor, int]]] = {}

    def get(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A buffer of that shape and dtype, with whatever was in it."""
        pool = self._free.setdefault((shape, dtype), [])
        for buffer, idle in pool:
            if storage_uses(buffer) == idle:
                return buffer.detach()
        buffer = torch.empty(shape, dtype=dtype, device=self._device)
        pool.append((buffer, storage_uses(buffer)))
        return buffer.detach()

    def clear(self) -> None:
        """Let go of all buffers (when shapes change)."""
        self._free.clear()


def keep_sent(schedule: Schedule) -> int:
    """Messages from one rank to another after which the oldest has certainly been received.

    Between the two there is at most one link a direction, with at most as many messages as may be in flight.
    One more, and some direction has had an answer to a message sent after the oldest; messages are received in order.
    """
    return schedule.placement.directions * max(schedule.in_flight) + 1


class _Sent(NamedTuple):
    """A message that may be on its way still, and what it is sent from."""

    action: Action | None
    work: Waitable
    data: Tensor

    def is_over(self) -> bool:
        """Where a device says so."""
        return isinstance(self.work, InStream) and self.work.is_over()


class _Posted(NamedTuple):
    """A message that is being received."""

    action: Action
    signature: Signature
    incoming: Incoming


class _Inbox:
    """Messages of one sender: expected in its order, being received, kept until they are asked for."""

    def __init__(self) -> None:
        self.expected: deque[tuple[Action, bool]] = deque()
        """With each, whether it comes directly (:attr:`.Transport.direct`)."""
        self.posted: deque[_Posted] = deque()
        self.arrived: dict[Action, Tensors] = {}


class Channels:
    """All messages of one rank of a pipeline.

    A message is named by the action that needs it: ``2F5`` is the activation that the forward of
    micro-batch 5 on stage 2 takes, ``2B5`` the gradient that its backward takes.

    Args:
        transport: the raw messages.
        watch: bounds and records the waits.
        keep_sent: messages to one receiver after which the oldest has certainly been received.
        dynamic_shapes: whether every activation may have other shapes than the one before.
        shapes_hint: what to do about shapes that differ, for a message.
    """

    def __init__(
        self, transport: Transport, watch: Watch, keep_sent: int, dynamic_shapes: bool = False, shapes_hint: str = ""
    ) -> None:
        self._transport, self._watch = transport, watch
        self.keep_sent, self._dynamic, self._shapes_hint = keep_sent, dynamic_shapes, shapes_hint
        self._pool = BufferPool(transport.device)
        self._inboxes: dict[int, _Inbox] = {}
        self._outboxes: dict[tuple[int, int | None], deque[_Sent]] = {}
        """By receiver, and for control messages by their tag, too."""
        self._sent_signatures: dict[tuple[int, int], Signature] = {}
        self._received_signatures: dict[tuple[int, int], Signature] = {}
        self._returning: dict[Action, Signature] = {}

    # Tensors

    def send(self, receiver: int, action: Action, tensors: Tensors, returns: Action | None = None) -> None:
        """Start to send what ``action`` on rank ``receiver`` takes; the gradient comes back for ``returns``.

        Raises:
            ValueError: when shapes or dtypes differ from those agreed on and dynamic shapes were not asked for.
        """
        if action.kind == FORWARD:
            signature = Signature.of(tensors)
            self._agree(receiver, action, signature)
            if returns is not None:
                self._returning[returns] = signature.gradients()
        with self._watch.guard("sending", action, receiver):
            sent = self._transport.send(pack(tensors), receiver, action.kind)
        self._keep(receiver, None, _Sent(action, *sent))

    def expect(self, sender: int, action: Action) -> None:
        """Begin to receive the message for ``action``, which ``sender`` sends next to this rank.

        Where its shapes are not known yet, that begins when it is asked for. A device's send may hold the sender until
        then, and others through it: so of direct messages the shapes are waited for here, which the sender tells when
        it issues the action. By the plan that is before this rank has anything else to do.
        """
        inbox, direct = self._inboxes.setdefault(sender, _Inbox()), self._transport.direct
        inbox.expected.append((action, direct))
        self._post_known(sender, inbox)
        while direct and inbox.expected:
            self._post_next(sender, inbox)

    def receive(self, sender: int, action: Action) -> Tensors:
        """The message for ``action``; waits for it, and no longer than the watch allows."""
        inbox = self._inboxes[sender]
        while action not in inbox.arrived:
            self._receive_next(sender, inbox)
        self._post_known(sender, inbox)
        return inbox.arrived.pop(action)

    def drain(self) -> None:
        """Receive and drop all messages that were expected, and see this rank's own received."""
        for sender, inbox in self._inboxes.items():
            while inbox.expected or inbox.posted:
                self._receive_next(sender, inbox)
            inbox.arrived.clear()
        self._returning.clear()
        for (receiver, _), outbox in self._outboxes.items():
            while outbox:
                self._reap(receiver, outbox)

    def forget_shapes(self) -> None:
        """Agree on shapes anew with the next activations. Nothing may be under way. All ranks do it between the same
        two windows; in the next one, messages go through the hosts' memory, as in the first."""
        self._transport.direct = False
        self._sent_signatures.clear()
        self._received_signatures.clear()
        self._pool.clear()

    def go_direct(self) -> None:
        """A window is over in which all shapes were agreed on and all kernels loaded: see :class:`.Transport`."""
        self._transport.direct = True

    # Control messages: small, on the CPU, in an order of their own for each direction

    def send_header(self, receiver: int, action: Action, window_exists: bool, direction: int = 0) -> None:
        """Tell the stage of ``action``, its first forward of a window, whether there is data for that window."""
        values = torch.tensor([int(window_exists)])
        self._send_control(values, receiver, HEADER_TAG + CONTROL_TAGS * direction, action)

    def receive_header(self, sender: int, action: Action, direction: int = 0) -> bool:
        """Whether there is data for the window that ``action`` begins, as the stage before says."""
        target, tag = torch.zeros(1, dtype=torch.int64), HEADER_TAG + CONTROL_TAGS * direction
        return bool(self._receive_control(target, sender, tag, "receiving a header", action).item())

    def send_report(self, receiver: int, values: Tensor, direction: int = 0) -> None:
        """Send a small report, float64 [k] on the CPU, for example the losses of a window."""
        self._send_control(values, receiver, REPORT_TAG + CONTROL_TAGS * direction, self._watch.last_done)

    def receive_report(self, sender: int, length: int, direction: int = 0) -> Tensor:
        """The next report of ``sender`` about ``direction``, float64 [length]."""
        target, tag = torch.zeros(length, dtype=torch.float64), REPORT_TAG + CONTROL_TAGS * direction
        return self._receive_control(target, sender, tag, "receiving a report", self._watch.last_done)

    def send_sum(self, receiver: int, value: float, action: Action) -> None:
        """Send what the stage of the update ``action`` has summed up."""
        self._send_control(torch.tensor([value], dtype=torch.float64), receiver, SUM_TAG, action)

    def receive_sum(self, sender: int, action: Action | None) -> float:
        """The next sum of ``sender``, which ``action`` takes."""
        target = torch.zeros(1, dtype=torch.float64)
        return self._receive_control(target, sender, SUM_TAG, "receiving a sum", action).item()

    # How

    def _send_control(self, values: Tensor, receiver: int, tag: int, action: Action | None) -> None:
        with self._watch.guard("sending", action, receiver):
            sent = self._transport.send_control(values, receiver, tag)
        self._keep(receiver, tag, _Sent(action, *sent))

    def _receive_control(self, target: Tensor, sender: int, tag: int, what: str, action: Action | None) -> Tensor:
        target.fill_(NOT_YET)
        with self._watch.guard(what, action, sender):
            work = self._transport.receive_control(target, sender, tag)
        # Gloo does not say whether a message has come, but it lands in the meantime.
        self._watch.wait(work, what, action, sender, name=what, has_come=lambda: target[-1].item() != NOT_YET)
        return target

    def _keep(self, receiver: int, tag: int | None, sent: _Sent) -> None:
        """Hold on to what is being sent; a gloo send never says that it is done, so the program tells when."""
        outbox = self._outboxes.setdefault((receiver, tag), deque())
        while outbox and outbox[0].is_over():
            outbox.popleft()
        outbox.append(sent)
        if len(outbox) > self.keep_sent:
            self._reap(receiver, outbox)

    def _reap(self, receiver: int, outbox: deque[_Sent]) -> None:
        sent = outbox.popleft()
        self._watch.wait(sent.work, "sending", sent.action, receiver)

    def _agree(self, receiver: int, action: Action, signature: Signature) -> None:
        agreed = self._sent_signatures.get((receiver, action.stage))
        if agreed == signature and not self._dynamic:
            return
        if agreed is not None and not self._dynamic:
            hint = self._shapes_hint or "ask for dynamic shapes"
            raise ValueError(f"the activation for {action} is ({signature}), the ones before were ({agreed}): {hint}")
        self._sent_signatures[receiver, action.stage] = signature
        self._send_control(signature.encode(), receiver, SIGNATURE_TAG, action)

    def _post_known(self, sender: int, inbox: _Inbox) -> None:
        while inbox.expected:
            signature = self._known_signature(sender, inbox.expected[0][0])
            if signature is None:
                return
            self._post(sender, inbox, signature)

    def _known_signature(self, sender: int, action: Action) -> Signature | None:
        if action.kind == BACKWARD:
            return self._returning.get(action)
        return None if self._dynamic else self._received_signatures.get((sender, action.stage))

    def _post(self, sender: int, inbox: _Inbox, signature: Signature) -> None:
        action, direct = inbox.expected.popleft()
        self._returning.pop(action, None)
        with self._watch.guard("receiving", action, sender):
            target = self._pool.get(*packed_spec(signature.specs))
            incoming = self._transport.receive(target, sender, action.kind, direct)
        inbox.posted.append(_Posted(action, signature, incoming))

    def _post_next(self, sender: int, inbox: _Inbox) -> None:
        action, _ = inbox.expected[0]
        signature = self._known_signature(sender, action)
        if signature is None:
            encoded = torch.zeros(_SIGNATURE_LENGTH, dtype=torch.int64)
            self._receive_control(encoded, sender, SIGNATURE_TAG, "receiving a signature", action)
            signature = Signature.decode(encoded)
            self._received_signatures[sender, action.stage] = signature
        self._post(sender, inbox, signature)

    def _receive_next(self, sender: int, inbox: _Inbox) -> None:
        if not inbox.posted:
            self._post_next(sender, inbox)
        action, signature, incoming = inbox.posted.popleft()
        self._watch.wait(incoming.work, "receiving", action, sender)
        inbox.arrived[action] = tuple(parts(incoming.finish(), signature.specs))
