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
from collections.abc import Container, Iterable, Mapping, Sequence

from .action import UPDATE, Action
from .costs import CostModel
from .graph import Graph
from .messages import Message, messages
from .play import play
from .program import Row
from .schedule import Place, Schedule
from .spans import spans

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
    position = [{action: count for count, action in enumerate(row, start=1)} for row in window]
    used_until = [{} if landing else _used_until(schedule, row) for row in window]
    for rank, action in _in_turn(schedule, window, costs):
        for other, entered in schedule.meeting(rank, action):  # all have, though all start at one instant
            begun[other] = max(begun[other], position[other].get(entered, 0))
        for message in messages(schedule, rank, action):
            receiver = message.receiver
            row, count = window[receiver], max(begun[receiver], used_until[receiver].get(message.action, 0))
            found[receiver][row[count - 1] if count else None].append(message)
        begun[rank] = max(begun[rank], position[rank][action])
    return tuple({after: tuple(received) for after, received in of_rank.items()} for of_rank in found)


def _used_until(schedule: Schedule, row: Row) -> dict[Action, int]:
    """After how many actions of ``row`` the weights that an update of a stage replaces are no longer used."""
    last_uses: dict[int, int] = {}
    found = {}
    for count, action in enumerate(row, start=1):
        if action.kind == UPDATE and not schedule.sharing.is_tied(action.stage):
            found[action] = last_uses.get(action.stage, 0)
        last_uses[action.stage] = count
    return found


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
    graph = Graph(schedule, window, is_part=True)
    order = list(play(graph))
    begun = spans(graph, order, costs)
    return [graph.places[number] for number in sorted(order, key=lambda number: begun[number][0])]
