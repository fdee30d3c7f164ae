"""What ranks send to each other, over which links, and in which streams."""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum
from typing import NamedTuple

from .action import BACKWARD, FORWARD, REDUCE, UPDATE, Action
from .schedule import Schedule


class Stream(IntEnum):
    """From one rank to another, messages of one stream are sent and received in one order, and have nothing else to be
    told apart by."""

    PIPELINE = 1
    GRADIENTS = 2
    WEIGHTS = 3


STREAMS = {FORWARD: Stream.PIPELINE, BACKWARD: Stream.PIPELINE, REDUCE: Stream.GRADIENTS, UPDATE: Stream.WEIGHTS}
"""By the kind of the action that needs a message. Where two ranks are guests of each other, gradients and weights go
the same way, and no order holds between the two: gradients may wait for a buffer."""


class Link(NamedTuple):
    """What a stream goes over, one way."""

    sender: int
    receiver: int
    stream: Stream


class Message(NamedTuple):
    """From one rank to another, named by the action of the receiver that needs it."""

    sender: int
    receiver: int
    action: Action

    @property
    def link(self) -> Link:
        return Link(self.sender, self.receiver, STREAMS[self.action.kind])


def messages(schedule: Schedule, rank: int, action: Action) -> Iterator[Message]:
    """What ``rank`` sends when it has done ``action``."""
    sent = schedule.message(rank, action)
    if sent is not None:
        yield Message(rank, *sent)
    if action.kind in (REDUCE, UPDATE):
        home, *guests = schedule.sharing.holders[action.stage]
        if action.kind == UPDATE and rank == home:
            yield from (Message(home, guest, action) for guest in guests)
        elif action.kind == REDUCE and rank != home:
            yield Message(rank, home, action)


def links(schedule: Schedule, *streams: Stream) -> set[Link]:
    """Those of all its messages in ``streams``."""
    passes = (
        (rank, Action(stage, kind, direction))
        for direction, row in enumerate(schedule.placement.ranks)
        for stage, rank in enumerate(row)
        for kind in (FORWARD, BACKWARD)
    )
    exchanges = (
        (rank, Action(unit, kind, 0))
        for unit, holders in enumerate(schedule.sharing.holders)
        for rank in holders
        for kind in (REDUCE, UPDATE)
    )
    found = {message.link for place in (*passes, *exchanges) for message in messages(schedule, *place)}
    return {link for link in found if link.stream in streams}
