"""What goes over which link, in an order that both of its ends keep."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable
from typing import Any

import pytest

from amdp_plugin.plan.action import Action
from amdp_plugin.plan.issuing import steps
from amdp_plugin.plan.messages import Link, Message, Stream, links, messages
from amdp_plugin.plan.planner import Planner
from amdp_plugin.plan.schedules import make

CASES: list[tuple[str, int, int, dict[str, Any]]] = [
    ("1f1b", 3, 4, {}), ("paci", 4, 2, {}), ("paci", 4, 2, {"tied": ((0, 2, 3), (1, 2))}), ("chimera", 4, 4, {}),
    ("amdp", 8, 8, {}), ("amdp", 8, 8, {"directions": 2}), ("amdp", 6, 6, {}), ("paci", 1, 2, {}),
]  # fmt: skip
WINDOWS = 5


@pytest.mark.parametrize(("name", "stages", "size", "options"), CASES)
def test_links_are_those_that_messages_go_over(name: str, stages: int, size: int, options: dict[str, Any]) -> None:
    schedule = make(name, stages, size, **options)
    rows = Planner(schedule).program(WINDOWS).rows
    places = [(rank, action) for rank, row in enumerate(rows) for action in row]
    used = {message.link for place in places for message in messages(schedule, *place)}
    assert links(schedule, *Stream) == used
    for stream in Stream:
        assert links(schedule, stream) == {link for link in used if link.stream is stream}


def test_neighbours_have_a_link_each_way() -> None:
    pairs = {(0, 1), (1, 0), (1, 2), (2, 1)}
    assert links(make("1f1b", 3, 4), *Stream) == {Link(*pair, Stream.PIPELINE) for pair in pairs}


@pytest.mark.parametrize(("stages", "directions"), [(4, 2), (8, 4), (12, 6)])
def test_gradients_and_weights_share_no_link(stages: int, directions: int) -> None:
    """Two ranks may be guests of each other, so that both go the same way. In each of the two streams a pair carries
    one stage alone, window by window."""
    schedule = make("amdp", stages, 2 * directions, directions=directions)
    pairs = [(home, guest) for home, *guests in schedule.placement.holders for guest in guests]
    assert len(set(pairs)) == len(pairs)
    assert links(schedule, Stream.WEIGHTS) == {Link(*pair, Stream.WEIGHTS) for pair in pairs}
    assert links(schedule, Stream.GRADIENTS) == {Link(guest, home, Stream.GRADIENTS) for home, guest in pairs}
    assert {(guest, home) for home, guest in pairs} & set(pairs), "such pairs exist"


def orders(planner: Planner, buffers: int, line: Callable[[Message], Hashable]) -> tuple[Any, Any]:
    """Of every line, the messages in the order in which the sender's host issues them, and the receiver's."""
    schedule, ranks = planner.schedule, range(planner.schedule.num_ranks)
    windows = [planner.window(index) for index in range(WINDOWS)]
    posted = [[planner.postings(index, rank) for rank in ranks] for index in range(WINDOWS)]
    sent, received = defaultdict(list), defaultdict(list)
    for of_rank in steps(schedule, windows, posted, buffers):
        for rank, message in ((operation.rank, operation.what) for step in of_rank for operation in step):
            if not isinstance(message, Action):
                (sent if rank == message.sender else received)[line(message)].append(message)
    return sent, received


@pytest.mark.parametrize("buffers", [1, 2, 4])
@pytest.mark.parametrize(("name", "stages", "size", "options"), CASES)
def test_both_ends_of_a_link_keep_one_order(
    name: str, stages: int, size: int, options: dict[str, Any], buffers: int
) -> None:
    sent, received = orders(Planner(make(name, stages, size, **options)), buffers, lambda message: message.link)
    assert sent == received


def test_gradients_and_weights_of_a_pair_have_no_common_order() -> None:
    """Where gradients wait for a buffer, weights do not wait for these: so they have links of their own."""
    sent, received = orders(
        Planner(make("amdp", 8, 8)), 2, lambda message: (message[:2], message.link.stream is Stream.PIPELINE)
    )
    assert sent.keys() == received.keys() and sent != received
