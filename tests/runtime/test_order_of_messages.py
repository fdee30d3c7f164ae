"""What a rank asks of its transports: what was proven of the program, in that order, kept no longer than planned."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import pytest

from amdp_plugin.plan.action import Action
from amdp_plugin.plan.devices import Provision, provide
from amdp_plugin.plan.issuing import Operation, steps
from amdp_plugin.plan.messages import Stream
from amdp_plugin.plan.planner import Planner
from amdp_plugin.plan.tied import buffers
from amdp_plugin.runtime.channels import keep_sent

from ..processes import run_ranks
from .pipelines import Case, make_executor
from .rendezvous import End, Given, Rendezvous, Waited

CASES = [
    Case("1f1b", 3, 4),
    Case("paci", 4, 2),
    Case("paci", 3, 4, "tuples"),
    Case("paci", 3, 4, options=(("decisions", "relayed"),), clipping=0.05),
    Case("paci", 4, 1, tied=((0, 3),)),
    Case("pipedream-2bw", 3, 3),
    Case("chimera", 4, 4),
    Case("amdp", 4, 8),
    Case("amdp", 8, 8),
    Case("amdp", 6, 12),
]
"""Tuples: with three tensors a forward's message, two a backward's."""
PARTS = (5, 3)
Steps = list[list[Given]]
"""What was begun at the opening of a window and after each of its actions, window after window."""


def name(case: Case) -> str:
    more = [*["relayed"] * bool(case.options), *["tied"] * bool(case.tied), case.kind]
    return "-".join(map(str, [case.schedule, case.stages, case.micro_batches, *more]))


def planned(case: Case) -> Planner:
    return Planner(case.make(), case.costs())


def record(rank: int, case: Case, provided: Provision) -> list[Steps]:
    rendezvous, found = Rendezvous(case.stages), []
    executor, _ = make_executor(rank, case, None, 60, rendezvous.transport, provided)
    for windows in PARTS:
        part = []
        for _ in range(windows):
            actions = executor.open_window()
            part.append(rendezvous.take())
            for action in actions:
                executor.execute(action)
                part.append(rendezvous.take())
            executor.close_window()
        executor.quiesce()
        rendezvous.take()
        found.append(part)
    return found


def proven(planner: Planner, windows: int, provided: Provision) -> list[Steps]:
    """Of every rank."""

    def of_messages(operations: Iterable[Operation]) -> list[Given]:
        sides = ((each.rank, each.what) for each in operations if not isinstance(each.what, Action))
        return [
            Given(rank == what.sender, what.receiver if rank == what.sender else what.sender, what.action.kind)
            for rank, what in sides
        ]

    gradients, landing = provided
    rows = [planner.window(index) for index in range(windows)]
    posted = [[planner.postings(index, rank, landing) for rank in range(len(row))] for index, row in enumerate(rows)]
    return [[of_messages(step) for step in of_rank] for of_rank in steps(planner.schedule, rows, posted, gradients)]


def check_begun(case: Case, provided: Provision) -> None:
    """Every send and receive, after the action and in the order that the proof is about. In a job's first window,
    which sends no message from device to device, receives wait until shapes are known."""
    planner = planned(case)
    found = run_ranks(case.stages, record, case, provided)
    for part, windows in enumerate(PARTS):
        for rank, expected in enumerate(proven(planner, windows, provided)):
            begun = found[rank][part]
            first = 0 if part else 1 + len(planner.row(0, rank))
            assert begun[first:] == expected[first:], f"rank {rank}, part {part}"
            sent, to_send = ([[each for each in step if each.sends] for step in some] for some in (begun, expected))
            assert sent == to_send


@pytest.mark.parametrize("case", CASES, ids=name)
def test_what_is_begun_is_what_was_proven(case: Case) -> None:
    check_begun(case, provide([planned(case)]))


def test_guests_whose_gradients_wait_for_a_buffer_come_in_turn() -> None:
    """A home has three guests and one buffer, which is too little on devices alone."""
    check_begun(Case("amdp", 8, 8), Provision(1, landing=False))


class Kept(NamedTuple):
    """Of one rank: what it still held of what it had sent, at most; what it waited for within windows, and in all; how
    much it began; and what it held after all that."""

    most: Counter[End]
    within: list[Waited]
    waited: list[Waited]
    counts: Counter[End]
    left: int


def observe(rank: int, case: Case, provided: Provision) -> Kept:
    rendezvous, most, within = Rendezvous(case.stages), Counter[End](), []
    executor, _ = make_executor(rank, case, None, 60, rendezvous.transport, provided)
    for windows in PARTS:
        for _ in range(windows):
            seen = len(rendezvous.waited)
            for action in executor.open_window():
                executor.execute(action)
                most |= rendezvous.retained()
            within += rendezvous.waited[seen:]
            executor.close_window()
        executor.quiesce()
    return Kept(most, within, rendezvous.waited, rendezvous.counts, len(rendezvous.under_way))


def most_kept(planner: Planner, rank: int, stream: Stream) -> int:
    """Messages that ``rank`` may hold at once of what it has sent over one link: messages between stages until later
    ones are answered; the sum of a window until its new weights come, which a home sends from one buffer; of a tied
    weight as many as are under way."""
    schedule, sharing = planner.schedule, planner.schedule.sharing
    if stream is Stream.PIPELINE:
        return keep_sent(schedule)
    tied = [unit for unit in sharing.units[rank] if sharing.is_tied(unit)]
    if stream is Stream.GRADIENTS and tied:
        return buffers(planner, rank, tied[0], planner.settled_windows())[1]
    return 1


@pytest.mark.parametrize("case", CASES, ids=name)
def test_messages_are_kept_as_long_as_planned_and_all_are_received(case: Case) -> None:
    """Waiting for a send never blocks: it was received before. At the end everything was, in the order of sending."""
    planner = planned(case)
    found = run_ranks(case.stages, observe, case, provide([planner]))
    for rank, kept in enumerate(found):
        for end, number in kept.most.items():
            assert number <= most_kept(planner, rank, end.stream), f"rank {rank}: {end}"
        late = [waited for waited in kept.within if waited.end.sends and not waited.in_time]
        assert not late, f"rank {rank}"
        order: defaultdict[End, list[int]] = defaultdict(list)
        for end, number, _ in kept.waited:
            order[end].append(number)
        assert order == {end: list(range(count)) for end, count in kept.counts.items()}
        assert kept.left == 0
        for end, count in kept.counts.items():
            assert found[end.peer].counts[End(not end.sends, rank, end.stream)] == count
