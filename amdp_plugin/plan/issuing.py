"""What the hosts of a program issue to their devices, in the order of the executor, the channels and the exchange."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .action import BACKWARD, FORWARD, REDUCE, UPDATE, Action
from .messages import Message, messages
from .postings import Postings, next_guest
from .program import Row
from .schedule import Schedule


@dataclass(eq=False, slots=True)
class Operation:
    """Something that a device does: one side of a message, or a part of an action's computation.

    Args:
        after: those of the same rank that its stream waits for.
        meets: whether it is an update that all homes make in one meeting.
    """

    rank: int
    what: Message | Action
    after: tuple[Operation, ...] = ()
    meets: bool = False

    def __str__(self) -> str:
        if isinstance(self.what, Action):
            return f"{self.what} on rank {self.rank}"
        sends = self.rank == self.what.sender
        verb, peer = ("sends", self.what.receiver) if sends else ("receives", self.what.sender)
        return f"rank {self.rank} {verb} for {self.what.action} ({'to' if sends else 'from'} rank {peer})"


Step = list[Operation]
"""What a host issues at once: for one action, or at the opening of a window."""


def steps(
    schedule: Schedule, windows: Sequence[Sequence[Row]], posted: Sequence[Sequence[Postings]], buffers: int
) -> list[list[Step]]:
    """For every rank, what its host issues, step by step.

    Args:
        windows: what every rank does, window after window.
        posted: when every rank begins to receive, window after window.
        buffers: guests of a stage whose gradients its home receives at once.
    """
    found = []
    for rank in range(schedule.num_ranks):
        host = _Host(schedule, rank, buffers)
        of_rank = []
        for window, begun in zip(windows, posted, strict=True):
            of_rank += [host.step(action, begun[rank].get(action, ())) for action in (None, *window[rank])]
        found.append(of_rank)
    return found


class _Host:
    """Issues one rank's operations, in the order of the executor, the channels and the exchange.

    As in torch, a stream of messages goes on only after all that was computed before the message was issued.
    """

    def __init__(self, schedule: Schedule, rank: int, buffers: int) -> None:
        self.schedule, self.rank = schedule, rank
        self.issued: Step = []
        self.computed: tuple[Operation, ...] = ()
        self.arriving: dict[Action, Operation] = {}
        """Activations and gradients of micro-batches that are being received."""
        self.free = dict.fromkeys(range(len(schedule.sharing.holders)), buffers)
        self.begun: defaultdict[int, dict[int, Message]] = defaultdict(dict)
        self.receiving: defaultdict[int, dict[int, Operation]] = defaultdict(dict)
        """Of every stage at home, by guest, the gradients that may be received, and those that are."""
        self.unsettled: dict[int, list[Operation]] = {}
        """Of every guest, what must be over before its stage is used again."""
        self.sent: defaultdict[tuple[int, str], list[Operation]] = defaultdict(list)

    def step(self, action: Action | None, begun: Iterable[Message]) -> Step:
        """Do ``action``, then begin to receive."""
        self.issued = []
        if action is not None:
            self._run(action)
        for message in begun:
            stage = message.action.stage
            if message.action.kind == REDUCE:
                self.begun[stage][message.sender] = message
                self._receive_gradients(stage, self.schedule.sharing.holders[stage][1:])
            else:
                self.arriving[message.action] = self._communicate(message)
        return self.issued

    def _run(self, action: Action) -> None:
        stage, kind, _ = action
        home, *guests = self.schedule.sharing.holders[stage]
        at_home = self.rank == home
        if kind in (FORWARD, BACKWARD):
            arrived = [self.arriving.pop(action)] if action in self.arriving else []
            self._compute(action, *arrived, *self.unsettled.pop(stage, ()))
        elif kind == REDUCE and at_home:
            for added, guest in enumerate(guests, start=1):
                self._compute(action, self.receiving[stage].pop(guest))
                self.free[stage] += 1
                self._receive_gradients(stage, guests[added:])
        elif kind == UPDATE and at_home:
            self._compute(action, *self.sent.pop((stage, UPDATE), ()))  # which read what it overwrites
        elif kind == UPDATE and self.schedule.sharing.is_tied(stage):
            self._compute(action, self.arriving.pop(action), self.sent[stage, REDUCE].pop(0))
        elif kind == UPDATE:
            self.unsettled[stage] = [self.arriving.pop(action), *self.sent.pop((stage, REDUCE), ())]
        for message in messages(self.schedule, self.rank, action):
            self.sent[stage, kind].append(self._communicate(message))

    def _receive_gradients(self, stage: int, to_add: Sequence[int]) -> None:
        begun, receiving = self.begun[stage], self.receiving[stage]
        while (guest := next_guest(to_add, begun, receiving, self.free[stage])) is not None:
            self.free[stage] -= 1
            receiving[guest] = self._communicate(begun.pop(guest))

    def _compute(self, action: Action, *after: Operation) -> None:
        self.computed = (self._issue(action, after),)

    def _communicate(self, message: Message) -> Operation:
        return self._issue(message, self.computed)

    def _issue(self, what: Message | Action, after: tuple[Operation, ...]) -> Operation:
        meets = isinstance(what, Action) and bool(self.schedule.meeting(self.rank, what))
        operation = Operation(self.rank, what, after, meets)
        self.issued.append(operation)
        return operation
