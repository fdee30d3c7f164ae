"""When a rank begins to receive: as soon as nothing that the message waits for is still to be done there.

On a GPU a receive occupies the device until its message comes, and a host that must wait for its whole device then
(the first use of a kernel, an allocator that is out of memory, a synchronization in a layer) waits for the message
too. So no receive may begin whose message depends on what its own rank has not started yet. Beginning no later than
that leaves every send a receive that has begun, so that sends do not wait either.

New weights of a stage come straight into the weights, and so only when those are no longer used, unless that leads to
ranks that wait for each other; a tied weight's come into buffers.

Messages that are sent in a window are received from the opening of the receiver's same window on: a run may end with
any window.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from graphlib import TopologicalSorter

from .action import UPDATE, Action
from .costs import CostModel
from .messages import Message, messages
from .program import Row
from .schedule import Place, Schedule

Postings = Mapping[Action | None, tuple[Message, ...]]
"""Of one rank and window: after which of its actions it begins to receive what; ``None`` at the opening."""


def postings(
    schedule: Schedule, window: Sequence[Row], costs: CostModel, landing: bool = False
) -> tuple[Postings, ...]:
    """For every rank, when it begins to receive what others send to it in ``window``.

    Args:
        window: what every rank does in it.
        costs: decide between the orders that are possible.
        landing: whether new weights come into memory of their own, and so while those that they replace are used.
    """
    found: list[defaultdict[Action | None, list[Message]]] = [defaultdict(list) for _ in window]
    begun: list[int] = [0 for _ in window]
    """Of every rank, how many of its actions have begun."""
    for rank, action in _in_turn(schedule, window, costs):
        for message in messages(schedule, rank, action):
            receiver = message.receiver
            row, count = window[receiver], begun[receiver]
            if action.kind == UPDATE and not landing and not schedule.sharing.is_tied(action.stage):
                count = max(count, _used_until(row, action))
            found[receiver][row[count - 1] if count else None].append(message)
        begun[rank] += 1
    return tuple({after: tuple(received) for after, received in of_rank.items()} for of_rank in found)


def _used_until(row: Row, update: Action) -> int:
    """After how many actions of ``row`` the weights that ``update`` replaces are no longer used."""
    before = row[: row.index(update)]
    uses = [count for count, action in enumerate(before, start=1) if action.stage == update.stage]
    return max(uses, default=0)


def next_guest(to_add: Iterable[int], begun: Container[int], receiving: Container[int], buffers: int) -> int | None:
    """Whose gradients a home receives next, if there is a buffer that no guest added earlier is going to need.

    Args:
        to_add: guests whose gradients are still to be added, in the order of the sum.
        begun: those that the plan lets it receive.
        receiving: those that have a buffer.
        buffers: how many are free.
    """
    for guest in to_add:
        if guest in receiving:
            continue
        if not buffers:
            return None
        if guest in begun:
            return guest
        buffers -= 1
    return None


def shifted(begun: Postings, windows: int, micro_batches: int) -> Postings:
    """The like postings, that many windows later."""
    if not windows:
        return begun
    return {
        after and after.shifted(windows, micro_batches): tuple(
            message._replace(action=message.action.shifted(windows, micro_batches)) for message in received
        )
        for after, received in begun.items()
    }


def _in_turn(schedule: Schedule, window: Sequence[Row], costs: CostModel) -> list[Place]:
    """Everything that is done in ``window``, in the order in which it starts where only this window is run."""
    before = {
        (rank, action): (rank, row[position - 1]) if position else None
        for rank, row in enumerate(window)
        for position, action in enumerate(row)
    }

    def causes(rank: int, action: Action) -> Iterator[Place]:
        previous = before[rank, action]
        if previous is not None:
            yield previous
        yield from (place for place in schedule.dependencies(rank, action) if place[0] != rank and place in before)
        for place in schedule.meeting(rank, action):
            entered = before.get(place)
            if entered is not None:
                yield entered

    graph = {place: tuple(causes(*place)) for place in before}
    starts: dict[Place, int] = {}
    ends: dict[Place, int] = {}
    for place in TopologicalSorter(graph).static_order():
        starts[place] = max((ends[cause] for cause in graph[place]), default=0)
        ends[place] = starts[place] + (costs.action_ticks(place[1]) if schedule.computes(*place) else 0)
    return sorted(starts, key=lambda place: starts[place])
