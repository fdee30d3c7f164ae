"""What a program becomes on devices that receive as NCCL does, and the proof that they never wait for each other.

A send is done only when it is received, and occupies its device until then. What goes over one link goes through one
stream of the device, in the order of issue. Streams share hardware queues: nothing in a queue starts before all that
was issued to it earlier has started. A host may wait for its whole device after any action, for reasons of its own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from typing import NamedTuple

from .action import BACKWARD, FORWARD, REDUCE, UPDATE, Action
from .laws import PROGRESS, ProgramError
from .messages import Link, Message, messages
from .planner import Planner
from .postings import Postings, next_guest
from .program import Row
from .schedule import Schedule

HOST_AHEAD = 2
"""Actions that a host may have issued, at most, and its device not finished: when it issues one, the one so many before
it is done."""
PROVEN_WINDOWS = 4
"""Windows that are proven, at most, from the first of those that repeat on; and those before."""
RECEIVE_BUFFERS = 2
"""Guests of a stage whose gradients its home receives at once where nothing ever waits for a whole device."""


class Operation(NamedTuple):
    """Something that a device does: one side of a message, or a part of an action's computation."""

    rank: int
    what: Message | Action
    part: int = 0

    def __str__(self) -> str:
        if isinstance(self.what, Action):
            return f"{self.what} on rank {self.rank}"
        sends = self.rank == self.what.sender
        verb, peer = ("sends", self.what.receiver) if sends else ("receives", self.what.sender)
        return f"rank {self.rank} {verb} for {self.what.action} ({'to' if sends else 'from'} rank {peer})"


class Issued(NamedTuple):
    """An operation, and those of the same rank that its stream waits for."""

    operation: Operation
    after: tuple[Operation, ...] = ()


Step = list[Issued]
"""What a host issues at once: for one action, or at the opening of a window."""


@dataclass(frozen=True)
class Device:
    """What is assumed of a rank's device and host.

    Args:
        queues: hardware queues (``CUDA_DEVICE_MAX_CONNECTIONS``).
        synchronizes: whether the host waits for the whole device after every action. A program that is proven with it
            may be interrupted so at any of them.
    """

    queues: int = 8
    synchronizes: bool = False


DEVICES = (Device(queues=1), Device(queues=8), Device(queues=8, synchronizes=True))
"""What a program must run on: with ``CUDA_DEVICE_MAX_CONNECTIONS=1``, as devices are, and interrupted anywhere."""


class DeviceDeadlock(Exception):
    """Devices would wait for each other for ever; ``circle`` says who for whom."""

    def __init__(self, circle: Sequence[str]) -> None:
        super().__init__(" <- ".join(circle))
        self.circle = circle


def gradient_buffers(planner: Planner) -> int:
    """The fewest guests of a stage whose gradients its home must receive at once, so that no device waits for ever.

    Proves the windows of the planner's program up to those that repeat, however few hardware queues there are, and
    whether or not hosts wait for their devices after any of their actions.

    Raises:
        ProgramError: when no number of buffers is enough.
    """
    schedule = planner.schedule
    first, after = planner.steady_windows()
    count = min(after + 1, first + PROVEN_WINDOWS)
    windows = [planner.window(index) for index in range(count)]
    posted = [[planner.postings(index, rank) for rank in range(schedule.num_ranks)] for index in range(count)]
    most = max(len(holders) - 1 for holders in schedule.sharing.holders)
    for buffers in range(1, max(2, most + 1)):
        try:
            for device in DEVICES:
                check(steps(schedule, windows, posted, buffers), device)
        except DeviceDeadlock as deadlock:
            circle = deadlock
        else:
            return buffers
    raise ProgramError(
        f"{schedule.name} breaks {PROGRESS} on devices whose messages occupy them until they are received: {circle}",
        PROGRESS.number,
    )


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
        self.begun: defaultdict[int, dict[int, Operation]] = defaultdict(dict)
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
            receive, stage = Operation(self.rank, message), message.action.stage
            if message.action.kind == REDUCE:
                self.begun[stage][message.sender] = receive
                self._receive_gradients(stage, self.schedule.sharing.holders[stage][1:])
            else:
                self.arriving[message.action] = receive
                self._communicate(receive)
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
            send = Operation(self.rank, message)
            self._communicate(send)
            self.sent[stage, kind].append(send)

    def _receive_gradients(self, stage: int, to_add: Sequence[int]) -> None:
        begun, receiving = self.begun[stage], self.receiving[stage]
        while (guest := next_guest(to_add, begun, receiving, self.free[stage])) is not None:
            self.free[stage] -= 1
            receiving[guest] = begun.pop(guest)
            self._communicate(receiving[guest])

    def _compute(self, action: Action, *after: Operation) -> None:
        self.computed = (Operation(self.rank, action, len(self.issued)),)
        self.issued.append(Issued(*self.computed, after))

    def _communicate(self, operation: Operation) -> None:
        self.issued.append(Issued(operation, self.computed))


def check(of_ranks: Sequence[Sequence[Step]], device: Device) -> None:
    """Find an order in which all that was issued starts and ends.

    Messages whose other side is not among the steps, because they end before, are taken to get through.

    Raises:
        DeviceDeadlock: when there is none.
    """
    graph = TopologicalSorter(_causes(of_ranks, device))
    try:
        graph.prepare()
    except CycleError as error:
        raise DeviceDeadlock([str(node) for node in error.args[1]]) from None


class _Instant(NamedTuple):
    """When an operation starts or ends; when a host goes on after a step."""

    what: Operation | tuple[int, int]
    is_end: bool

    def __str__(self) -> str:
        if not isinstance(self.what, Operation):
            return f"the host of rank {self.what[0]} waits for its device after step {self.what[1]}"
        return f"{self.what} {'ends' if self.is_end else 'starts'}"


Causes = dict[_Instant, list[_Instant]]


def _causes(of_ranks: Sequence[Sequence[Step]], device: Device) -> Causes:
    """What every instant comes after."""
    issued = {operation for of_rank in of_ranks for step in of_rank for operation, _ in step}
    causes: Causes = {}
    for rank, of_rank in enumerate(of_ranks):
        queues = _Queues(device.queues)
        for number, step in enumerate(of_rank):
            host = _Instant((rank, number), True)
            causes[host] = [_Instant(operation, True) for operation, _ in step]
            if number:
                causes[host].append(_Instant((rank, number - 1), True))
            wait = number - (1 if device.synchronizes else HOST_AHEAD)
            for operation, after in step:
                start, end = _Instant(operation, False), _Instant(operation, True)
                causes[start] = [_Instant(other, True) for other in after]
                causes[end] = [start, *(_Instant(other, False) for other in _other_sides(operation) if other in issued)]
                if wait >= 0:
                    causes[start] += _awaited(of_rank[wait], (rank, wait), device)
                causes[start] += queues.before(operation)
    return causes


def _awaited(step: Step, place: tuple[int, int], device: Device) -> list[_Instant]:
    """What a host has waited for that goes on after ``step``: everything so far, or what the step computed."""
    if device.synchronizes:
        return [_Instant(place, True)]
    return [_Instant(operation, True) for operation, _ in step if isinstance(operation.what, Action)]


def _other_sides(operation: Operation) -> list[Operation]:
    """The operation that a send or receive ends together with."""
    message = operation.what
    if isinstance(message, Action):
        return []
    return [Operation(message.receiver if operation.rank == message.sender else message.sender, message)]


class _Queues:
    """The streams and hardware queues of one rank's device; streams take queues in turn."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.latest: dict[Link | None, Operation] = {}
        self.queue_of: dict[Link | None, int] = {None: 0}
        self.latest_in: dict[int, Operation] = {}

    def before(self, operation: Operation) -> Iterator[_Instant]:
        """What ``operation``, issued next, comes after: the end of the one before it in its stream, and the start of
        the one before it in its queue."""
        link = None if isinstance(operation.what, Action) else operation.what.link
        queue = self.queue_of.setdefault(link, len(self.queue_of) % self.number)
        if link in self.latest:
            yield _Instant(self.latest[link], True)
        if queue in self.latest_in:
            yield _Instant(self.latest_in[queue], False)
        self.latest[link] = self.latest_in[queue] = operation
