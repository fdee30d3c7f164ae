"""Decisions that travel with the pipeline: which sums of other stages an update may use without waiting.

In a pipeline every stage hears from every other: its activations have passed the stages before it, its gradients those
after it. So when a stage updates, much that others summed up has been on its way for long, for example the squares of
their gradients. :func:`windows_ago` says how much, from the program alone. Sums are sent to whoever uses them as soon
as they are made; since what a stage uses was made before something that it needs anyway, nobody waits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from functools import cache
from math import inf

from .action import BACKWARD, REDUCE, UPDATE, Action
from .laws import PROGRESS, WINDOWS, ProgramError, breach
from .planner import Planner
from .play import Stuck, play
from .program import Program
from .schedule import Place

WindowsAgo = tuple[tuple[int, ...], ...]
"""``[stage][other]``: how many windows before that of an update of ``stage`` the sum of ``other`` is that it takes."""

NOTHING = -1
"""The latest window of a stage of which nothing is known."""


def windows_ago(planner: Planner, order: Iterable[int] | None = None) -> WindowsAgo | None:
    """What every update takes of the others; ``None`` where each stage decides for itself, or all meet.

    It is one number for a pair of stages, whatever the window. In the windows after a start with an empty pipeline
    there may be no such sum yet, and an update does without it. Of relayed decisions all are 0.

    Args:
        order: what :func:`.verify` returns for the program up to the end of the settled windows, where it is known.

    Raises:
        ProgramError: when decisions are relayed, and stages know too little of each other.
    """
    schedule = planner.schedule
    if schedule.decisions not in ("latest", "relayed"):
        return None
    program = planner.program(planner.settled_windows().stop)
    stages = range(schedule.num_stages)
    ago = [[0] * schedule.num_stages for _ in stages]
    for action, known in _known_at_updates(program, order or play(program.graph)):
        row = ago[action.stage]
        for other in stages:
            row[other] = max(row[other], action.index - known[other])
    late = [(stage, row.index(max(row))) for stage, row in enumerate(ago) if any(row)]
    if schedule.relays and late:
        stage, other = late[0]
        raise ProgramError(
            f"{schedule.name} breaks {WINDOWS}: decisions are relayed, and stage {stage} knows the sum of stage "
            f"{other} only {ago[stage][other]} windows late",
            WINDOWS.number,
        )
    return tuple(map(tuple, ago))


def sums_of(ago: WindowsAgo, action: Action) -> Iterator[tuple[int, int]]:
    """(other stage, window) of the sums that the update ``action`` takes, beside its own; windows before the first one
    mean that there is none."""
    for other, late in enumerate(ago[action.stage]):
        if other != action.stage:
            yield other, action.index - late


def check_decisions(program: Program, ago: WindowsAgo) -> None:
    """Law 3, of sums: no update waits for ever for those that it takes.

    Those that :func:`windows_ago` finds for a program were made before its updates, whatever the pace of its ranks.

    Raises:
        ProgramError: naming an update and what it waits for.
    """
    schedule = program.schedule
    steps = {(rank, action): step for rank, row in enumerate(program.rows) for step, action in enumerate(row)}

    @cache
    def made(stage: int, window: int) -> Place:
        return max(schedule.gathered(stage, window), key=lambda place: steps.get(place, inf))

    def sums(rank: int, action: Action) -> Iterator[Place]:
        tied = schedule.sharing.is_tied(action.stage)
        if action.kind == UPDATE and not tied and rank == schedule.placement.home(action.stage):
            yield from (made(other, window) for other, window in sums_of(ago, action) if window >= 0)

    try:
        deque(play(program.graph, sums), maxlen=0)
    except Stuck as stuck:
        updates = {rank: blocked for rank, blocked in stuck.blocked.items() if blocked[1].kind == UPDATE}
        rank, (position, _, (owner, missing)) = min((updates or stuck.blocked).items())
        what = f"a sum that it takes needs {missing} of rank {owner}, and others wait for it meanwhile"
        raise breach(program, rank, position, PROGRESS, what) from None


def _known_at_updates(program: Program, order: Iterable[int]) -> Iterator[tuple[Action, tuple[int, ...]]]:
    """Every home's updates, each with the latest window of every stage whose sum is on its way there for sure."""
    schedule, graph = program.schedule, program.graph
    homes = [schedule.placement.home(stage) for stage in range(schedule.num_stages)]
    alone = [len(holders) == 1 for holders in schedule.placement.holders]
    backwards = [0] * schedule.num_stages
    known = [(NOTHING,) * schedule.num_stages for _ in program.rows]
    sent: list[tuple[int, ...]] = [()] * len(graph.places)
    heard: dict[tuple[int, int], tuple[int, ...]] = {}
    """By rank and sender, what came last: most messages bring nothing new."""
    for number in order:
        rank, action = graph.places[number]
        stage, kind, index = action
        for need in graph.needs[number]:
            sender = graph.places[need][0]
            if heard.get((rank, sender)) is not sent[need]:
                heard[rank, sender] = sent[need]
                known[rank] = _later(known[rank], sent[need])
        if not schedule.sharing.is_tied(stage) and rank == homes[stage]:
            # What the guests of a tied weight have summed up has set out before the last backward at its home.
            complete = kind == REDUCE
            if kind == BACKWARD and alone[stage]:
                backwards[stage] += 1
                complete = backwards[stage] % schedule.micro_batches == 0
                index = backwards[stage] // schedule.micro_batches - 1
            if complete:
                known[rank] = (*known[rank][:stage], index, *known[rank][stage + 1 :])
            if kind == UPDATE:
                yield action, known[rank]
        sent[number] = known[rank]


def _later(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
    """The later window of each stage; ``one`` itself, where ``other`` knows of none."""
    both = tuple(map(max, one, other))
    return one if both == one else both
