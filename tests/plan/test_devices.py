"""Devices that receive as NCCL does never wait for each other for ever; with other rules for receiving they would."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amdp_plugin.plan.action import REDUCE, UPDATE, Action
from amdp_plugin.plan.devices import Device, DeviceDeadlock, Provision, check, gradient_buffers, provide
from amdp_plugin.plan.issuing import steps
from amdp_plugin.plan.laws import ProgramError
from amdp_plugin.plan.messages import Message, messages
from amdp_plugin.plan.planner import Planner
from amdp_plugin.plan.postings import Postings, next_guest
from amdp_plugin.plan.schedules import make

WINDOWS = 4
INTERRUPTED = Device(queues=8, synchronizes=True)
DEVICES = (Device(queues=1), Device(queues=8), INTERRUPTED)
"""With ``CUDA_DEVICE_MAX_CONNECTIONS=1``, as devices are, and interrupted anywhere."""


def planned(planner: Planner, landing: bool = False) -> list[list[Postings]]:
    ranks = range(planner.schedule.num_ranks)
    return [[planner.postings(index, rank, landing) for rank in ranks] for index in range(WINDOWS)]


def all_at_the_opening(planner: Planner) -> list[list[Postings]]:
    """Begin to receive everything when a window opens, but for weights, which would replace those in use."""

    def at_once(begun: Postings) -> Postings:
        every = [message for received in begun.values() for message in received]
        weights = {after: tuple(m for m in received if m.action.kind == UPDATE) for after, received in begun.items()}
        first = tuple(message for message in every if message.action.kind != UPDATE)
        return {**weights, None: (*first, *weights.get(None, ()))}

    return [[at_once(begun) for begun in of_ranks] for of_ranks in planned(planner)]


def run(planner: Planner, posted: Sequence[Sequence[Postings]], device: Device, buffers: int = 4) -> None:
    windows = [planner.window(index) for index in range(WINDOWS)]
    check(steps(planner.schedule, windows, posted, buffers), device)


@pytest.mark.parametrize("name", ["1f1b", "paci", "chimera", "amdp"])
def test_receives_that_begin_too_early_wait_for_ever(name: str) -> None:
    """Where a host waits for its device, which receives what depends on what this host has not issued yet."""
    planner = Planner(make(name, 4, 8))
    with pytest.raises(DeviceDeadlock, match="waits for its device"):
        run(planner, all_at_the_opening(planner), INTERRUPTED)
    run(planner, planned(planner), INTERRUPTED)


def test_one_hardware_queue_is_blocked_by_receives_that_wait_in_line() -> None:
    """Two receives on one stream: the second cannot start, and nothing behind it in the queue can."""
    planner = Planner(make("paci", 4, 8))
    run(planner, all_at_the_opening(planner), Device(queues=32))
    with pytest.raises(DeviceDeadlock):
        run(planner, all_at_the_opening(planner), Device(queues=1))
    run(planner, planned(planner), Device(queues=1))


NAMES = ["1f1b", "gpipe", "paci", "pipedream-2bw", "chimera", "amdp"]


@settings(deadline=None, max_examples=20)
@given(st.sampled_from(NAMES), st.integers(1, 4), st.integers(1, 4), st.booleans())
def test_programs_run_on_devices_interrupted_anywhere(
    name: str, half: int, per_direction: int, opening: bool
) -> None:
    """All kinds of devices, with no more buffers for gradients than there are guests."""
    stages = 2 * half
    schedule = make(name, stages, stages // 2 * 2 * per_direction)
    if opening and not schedule.flush:
        schedule = replace(schedule, flush_first=1).opening() or schedule
    planner = Planner(schedule)
    most = max(len(holders) - 1 for holders in planner.schedule.placement.holders)
    buffers, landing = provide([planner])
    assert 1 <= buffers <= max(1, most)
    for device in DEVICES:
        run(planner, planned(planner, landing), device, buffers)


@pytest.mark.parametrize(("name", "stages"), [("chimera", 2), ("chimera", 4), ("amdp", 4)])
def test_what_a_meeting_lets_go_on_is_received_after_it(name: str, stages: int) -> None:
    """Its sender waits for the receiver to enter, whose host may wait for its device before."""
    schedule = make(name, stages, stages, **({"decisions": "meeting"} if name == "amdp" else {}))
    planner = Planner(schedule)
    for rank, row in enumerate(planner.window(0)):
        met = row.index(Action(rank, UPDATE, 0))
        for after, received in planner.postings(0, rank, True).items():
            for message in received:
                next_window = message.action.window(schedule.micro_batches) > 0
                if message.action.kind == UPDATE or (schedule.flush and next_window):
                    assert after is not None and row.index(after) >= met, f"rank {rank} receives for {message.action}"
    run(planner, planned(planner, landing=True), INTERRUPTED)


def test_weights_land_where_guests_still_use_those_before() -> None:
    """There the home's device would wait in its send for guests who wait, through others, for this home."""
    planner = Planner(make("amdp", 6, 12))
    with pytest.raises(ProgramError, match=r"law 3 .* occupy them until they are received: .*U"):
        gradient_buffers(planner)
    buffers, landing = provide([Planner(make("amdp", 4, 8)), planner])
    assert landing and buffers == 2
    assert provide([Planner(make("amdp", 4, 8))]) == Provision(1, landing=False)


def test_eight_stages_need_a_buffer_for_every_guest() -> None:
    """With two, a guest's gradient would wait on its device for a buffer that waits for what this guest does next."""
    planner = Planner(make("amdp", 8, 16))
    assert gradient_buffers(planner) == 3
    with pytest.raises(DeviceDeadlock):
        run(planner, planned(planner), INTERRUPTED, buffers=2)


CASES = [("paci", 4, 2), ("1f1b", 3, 5), ("chimera", 4, 8), ("amdp", 8, 16)]


@pytest.mark.parametrize(("name", "stages", "size"), CASES)
@pytest.mark.parametrize("landing", [False, True])
def test_every_message_is_received_once_and_in_time(name: str, stages: int, size: int, landing: bool) -> None:
    """In the window in which it is sent, in the order of sending, before it is needed, and weights after their use,
    unless they land elsewhere."""
    planner = Planner(make(name, stages, size))
    schedule = planner.schedule
    for index in (0, 1, 7):
        window = planner.window(index)
        places = [(rank, action) for rank, row in enumerate(window) for action in row]
        sent = [message for place in places for message in messages(schedule, *place)]
        begun: list[Message] = []
        for rank, row in enumerate(window):
            found = planner.postings(index, rank, landing)
            place = {None: 0, **{action: count for count, action in enumerate(row, start=1)}}
            assert set(found) <= set(place)
            for after, received in found.items():
                for message in received:
                    assert message.receiver == rank
                    if message.action in place:
                        assert place[after] < place[message.action]
                    if message.action.kind == UPDATE and not landing:
                        between = row[place[after] : place[message.action] - 1]
                        assert all(action.stage != message.action.stage for action in between)
            begun += [message for after in (None, *row) for message in found.get(after, ())]
        assert Counter(begun) == Counter(sent)
        of_one_kind = [(m.sender, m.receiver, m) for m in begun if m.action.kind not in (REDUCE, UPDATE)]
        for pair in {entry[:2] for entry in of_one_kind}:
            assert [e[2] for e in of_one_kind if e[:2] == pair] == [
                m for m in sent if m[:2] == pair and m.action.kind not in (REDUCE, UPDATE)
            ]


def test_buffers_are_left_for_those_that_are_added_earlier() -> None:
    order = (5, 6, 7)
    assert next_guest(order, {6}, {}, buffers=2) == 6
    assert next_guest(order, {6}, {}, buffers=1) is None
    assert next_guest(order, {6, 7}, {5}, buffers=1) == 6
    assert next_guest(order, {7}, {5}, buffers=1) is None
    assert next_guest(order[2:], {7}, {}, buffers=1) == 7
