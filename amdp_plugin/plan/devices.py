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
from itertools import permutations
from typing import NamedTuple

from .action import Action
from .collection import uncollected
from .issuing import Operation, Step, steps
from .laws import PROGRESS, ProgramError
from .messages import Link, Message
from .planner import Planner

HOST_AHEAD = 2
"""Actions that a host may have issued, at most, and its device not finished: when it issues one, the one so many before
it is done."""
PROVEN_WINDOWS = 4
"""Windows that are proven, at most, from the first of those that repeat on; and those before."""


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


STRICTEST = Device(queues=1, synchronizes=True)
"""What is proven of it holds on all: others wait for a part of what it waits for."""


class DeviceDeadlock(Exception):
    """Devices would wait for each other for ever; ``circle`` says who for whom."""

    def __init__(self, circle: Sequence[str]) -> None:
        super().__init__(" <- ".join(circle))
        self.circle = circle


class Provision(NamedTuple):
    """What ranks have, so that their devices never wait for each other.

    Args:
        gradient_buffers: guests of a stage whose gradients its home receives at once.
        landing: whether guests receive new weights into memory of their own, beside those that they use meanwhile.
    """

    gradient_buffers: int
    landing: bool

    def __str__(self) -> str:
        guests = f"{self.gradient_buffers} guest{'' if self.gradient_buffers == 1 else 's'}"
        landing = ", and guests new weights beside those in use" if self.landing else ""
        return f"a home receives the gradients of {guests} at once{landing}"


ON_HOSTS = Provision(gradient_buffers=2, landing=False)
"""Where no message occupies a device, and nothing ever waits for the whole of one."""


@uncollected()
def provide(planners: Sequence[Planner]) -> Provision:
    """The least that is proven to be enough for the programs of all of ``planners``, on the :data:`STRICTEST` device.

    Raises:
        ProgramError: when nothing is enough.
    """
    try:
        return Provision(max(gradient_buffers(planner) for planner in planners), landing=False)
    except ProgramError:
        if not any(planner.schedule.reduces for planner in planners):
            raise
    return Provision(max(gradient_buffers(planner, landing=True) for planner in planners), landing=True)


def gradient_buffers(planner: Planner, landing: bool = False) -> int:
    """For one program. Its windows up to those that repeat are proven.

    Args:
        landing: as in :class:`Provision`.

    Raises:
        ProgramError: when no number of buffers is enough.
    """
    schedule = planner.schedule
    first, after = planner.steady_windows()
    count, ranks = min(after + 1, first + PROVEN_WINDOWS), range(schedule.num_ranks)
    windows = [planner.window(index) for index in range(count)]
    posted = [[planner.postings(index, rank, landing) for rank in ranks] for index in range(count)]

    def circle(buffers: int) -> DeviceDeadlock | None:
        try:
            check(steps(schedule, windows, posted, buffers), STRICTEST)
        except DeviceDeadlock as deadlock:
            return deadlock
        return None

    enough = max(1, max(len(holders) - 1 for holders in schedule.sharing.holders))
    found = circle(enough)
    if found is not None:
        raise ProgramError(
            f"{schedule.name} breaks {PROGRESS} on devices whose messages occupy them until they are received: {found}",
            PROGRESS.number,
        )
    step = 1
    while enough > 1 and step:  # most need all, or one less
        fewer = max(1, enough - step)
        enough, step = (fewer, 2 * step) if circle(fewer) is None else (enough, step // 2)
    return enough


def check(of_ranks: Sequence[Sequence[Step]], device: Device) -> None:
    """Find an order in which all that was issued starts and ends.

    Messages whose other side is not among the steps, because they end before, are taken to get through.

    Raises:
        DeviceDeadlock: when there is none.
    """
    instants = _Instants()
    sides: defaultdict[Message, list[_Side]] = defaultdict(list)
    for rank, of_rank in enumerate(of_ranks):
        for message, side in _Host(rank, device, instants).run(of_rank):
            sides[message].append(side)
    for both in sides.values():
        for one, other in permutations(both, 2):
            instants.put_after(one.end, other.start)
    instants.order()


class _Instants:
    """When operations start and end, and hosts go on: instants by number, each after others."""

    def __init__(self) -> None:
        self._what: list[object] = ["the beginning"]
        self._graph: TopologicalSorter[int] = TopologicalSorter()

    def new(self, what: object, *after: int) -> int:
        """Another instant, called ``what``."""
        number = len(self._what)
        self._what.append(what)
        self._graph.add(number, *after)
        return number

    def as_soon_as(self, after: set[int], what: object) -> int:
        """The instant when all of ``after`` have been: of one, that itself."""
        return next(iter(after)) if len(after) == 1 else self.new(what, *after)

    def put_after(self, one: int, other: int) -> None:
        self._graph.add(one, other)

    def order(self) -> None:
        """Raises :class:`DeviceDeadlock` where some would have to come before themselves."""
        try:
            self._graph.prepare()
        except CycleError as error:
            raise DeviceDeadlock([_told(self._what[number]) for number in error.args[1]]) from None


def _told(what: object) -> str:
    if not isinstance(what, tuple):
        return str(what)
    if isinstance(what[0], Operation):
        operation, verb = what
        return f"{operation} {verb}"
    return "the host of rank {} waits for its device after step {}".format(*what)


class _Side(NamedTuple):
    """When a message starts, and ends, on one of its two devices."""

    start: int
    end: int


class _Host:
    """When one rank's operations start and end; its streams take hardware queues in turn."""

    def __init__(self, rank: int, device: Device, instants: _Instants) -> None:
        self.rank, self.device, self.instants = rank, device, instants
        self.goes_on = {0}
        """What the host has waited for."""
        self.ends: dict[Operation, int] = {}
        """Of what it has not: that of every operation."""
        self.last_ends: dict[Link | None, int] = {}
        self.last_starts: dict[int, int] = {}
        """Likewise, of the last operation in every stream, and in every queue."""
        self.queue_of: dict[Link | None, int] = {None: 0}

    def run(self, of_rank: Sequence[Step]) -> Iterator[tuple[Message, _Side]]:
        """Issue everything. Yields the messages."""
        computed: list[set[int]] = []
        for number, step in enumerate(of_rank):
            if not self.device.synchronizes and number >= HOST_AHEAD:
                self.goes_on = computed[number - HOST_AHEAD] or {0}
            ends = []
            for operation, after in step:
                side = self._issue(operation, after)
                ends.append(side.end)
                if isinstance(operation.what, Message):
                    yield operation.what, side
            computed.append({self.ends[operation] for operation, _ in step if isinstance(operation.what, Action)})
            if self.device.synchronizes:
                self._synchronize(number, ends)

    def _issue(self, operation: Operation, after: Iterable[Operation]) -> _Side:
        what, instants = operation.what, self.instants
        link = None if isinstance(what, Action) else what.link
        queue = self.queue_of.setdefault(link, len(self.queue_of) % self.device.queues)
        causes = self.goes_on | {self.ends[other] for other in after if other in self.ends}
        if link in self.last_ends:
            causes.add(self.last_ends[link])
        if queue in self.last_starts:
            causes.add(self.last_starts[queue])
        start = instants.as_soon_as(causes, (operation, "starts"))
        end = start if isinstance(what, Action) else instants.new((operation, "ends"), start)
        self.ends[operation] = self.last_ends[link] = end
        self.last_starts[queue] = start
        return _Side(start, end)

    def _synchronize(self, number: int, ends: Iterable[int]) -> None:
        """Wait for the device, so that nothing else needs to wait for what it has done."""
        self.goes_on = {self.instants.as_soon_as({*self.goes_on, *ends}, (self.rank, number))}
        for waited in (self.ends, self.last_ends, self.last_starts):
            waited.clear()
