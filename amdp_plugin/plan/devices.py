"""What a program becomes on devices that receive as NCCL does, and the proof that they never wait for each other.

A send is done only when it is received, and occupies its device until then; so does an update for which stages meet,
until all have entered it. What goes over one link goes through one stream of the device, in the order of issue. Streams
share hardware queues: nothing in a queue starts before all that was issued to it earlier has started. A host may wait
for its whole device after any action, for reasons of its own.

Multiprocessors do not run out: a link has one message under way at most, and the runtime lets those of all links of a
rank take half of its device's, or refuses the job.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
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
        super().__init__("; ".join(circle))
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

    def circle(buffers: int, until: int = count) -> DeviceDeadlock | None:
        """In the windows ``until`` then: one that is in them stays, whatever comes later."""
        try:
            check(steps(schedule, windows[:until], posted[:until], buffers), STRICTEST)
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
        found = circle(fewer, until=1) or circle(fewer)
        enough, step = (fewer, 2 * step) if found is None else (enough, step // 2)
    return enough


def check(of_ranks: Sequence[Sequence[Step]], device: Device) -> None:
    """Find an order in which all that was issued starts and ends.

    Messages whose other side is not among the steps, because they end before, are taken to get through.

    Raises:
        DeviceDeadlock: when there is none.
    """
    queues = [queue for of_rank in of_ranks for queue in _queues(of_rank, device)]
    parts = _parts(operation for of_rank in of_ranks for step in of_rank for operation in step)
    started: set[Operation] = set()
    over: set[Operation] = set()
    waiting: defaultdict[Operation, list[_Queue]] = defaultdict(list)
    runnable = deque(queues)
    while runnable:
        queue = runnable.popleft()
        while queue.waits:
            operation, host, before = queue.waits[0]
            if not (over.issuperset(host) and over.issuperset(before)):
                missing = next(need for need in chain(host, before) if need not in over)
                waiting[missing].append(queue)
                break
            queue.waits.popleft()
            started.add(operation)
            together = parts.get(operation, (operation,))
            if started.issuperset(together):
                over.update(together)
                for part in together:
                    runnable.extend(waiting.pop(part, ()))
    if any(queue.waits for queue in queues):
        raise DeviceDeadlock(_circle(queues, parts, started, over))


class _Queue:
    """A hardware queue: what is still to start there, in this order.

    Every operation has what must be over before: what its host waits for, and what its stream does.
    """

    def __init__(self) -> None:
        self.waits: deque[tuple[Operation, Iterable[Operation], Iterable[Operation]]] = deque()


def _queues(of_rank: Sequence[Step], device: Device) -> list[_Queue]:
    """Those of one rank's device, whose streams take them in turn."""
    queues = [_Queue() for _ in range(device.queues)]
    queue_of: dict[Link | None, _Queue] = {None: queues[0]}
    last: dict[Link | None, Operation] = {}
    host: Step = []
    computed: list[Step] = []
    for number, step in enumerate(of_rank):
        if not device.synchronizes and number >= HOST_AHEAD:
            host = computed[number - HOST_AHEAD]
        for operation in step:
            what = operation.what
            link = None if isinstance(what, Action) else what.link
            before = (*operation.after, last[link]) if link in last else operation.after
            queue = queue_of.setdefault(link, queues[len(queue_of) % device.queues])
            queue.waits.append((operation, host, before))
            last[link] = operation
        computed.append([operation for operation in step if isinstance(operation.what, Action)])
        if device.synchronizes and step:
            host = step
    return queues


def _parts(operations: Iterable[Operation]) -> dict[Operation, list[Operation]]:
    """Of what is over when it has started everywhere, all parts: both sides of a message, a meeting's updates."""
    of_one: defaultdict[Message | int, list[Operation]] = defaultdict(list)
    for operation in operations:
        if isinstance(operation.what, Message):
            of_one[operation.what].append(operation)
        elif operation.meets:
            of_one[operation.what.index].append(operation)
    return {operation: parts for parts in of_one.values() for operation in parts}


def _circle(
    queues: Iterable[_Queue],
    parts: Mapping[Operation, Iterable[Operation]],
    started: Container[Operation],
    over: set[Operation],
) -> list[str]:
    """Who waits for whom, round to the first."""
    queue_of = {operation: queue for queue in queues for operation, *_ in queue.waits}
    queue = next(iter(queue_of.values()))
    seen: dict[_Queue, str] = {}
    while queue not in seen:
        operation, host, before = queue.waits[0]
        missing = next(need for need in (*host, *before) if need not in over)
        who = f"the host of rank {operation.rank}, which waits for its device," if missing in host else operation
        seen.pop(queue, None)
        seen[queue] = f"{who} waits for: {missing}"
        queue = queue_of[next(part for part in parts.get(missing, (missing,)) if part not in started)]
    told = list(seen.items())
    first = [each for each, _ in told].index(queue)
    return [text for _, text in told[first:]]
