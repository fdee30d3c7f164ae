"""Weights that several stages share: what their programs must obey, how late they are, and what that takes.

See :mod:`.sharing` for what they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from .action import BACKWARD, FORWARD, REDUCE, UPDATE, Action
from .devices import ON_HOSTS
from .laws import BOUNDS, ORDER, PLACES, WINDOWS, breach
from .planner import Planner
from .program import Program
from .versions import Version


def check_tied(program: Program) -> None:
    """Laws 1, 4 and 5, of tied weights: every rank that holds one sums each window whole and alone, in turn, the home
    before it steps, and a guest before it takes the new value; no value is later than the schedule states.

    Raises:
        ProgramError: at the first breach.
    """
    sharing = program.schedule.sharing
    for rank in range(len(program.rows)):
        for unit in filter(sharing.is_tied, sharing.units[rank]):
            _check_row(program, rank, unit)
    for (unit, stage, micro_batch), version in tied_versions(program).items():
        stated = program.schedule.max_gap[sharing.stages(unit)[0]]
        if version.gap > stated:
            rank, action = sharing.holders[stage][0], Action(stage, BACKWARD, micro_batch)
            what = f"the gap of {sharing.called(unit)} is {version.gap} updates, at most {stated} are stated"
            raise breach(program, rank, program.rows[rank].index(action), BOUNDS, what)


def _check_row(program: Program, rank: int, unit: int) -> None:
    """One tied weight on one of its ranks."""
    schedule, row = program.schedule, program.rows[rank]
    sharing, size = schedule.sharing, schedule.micro_batches
    stage, is_guest = sharing.stage_on(rank, unit), rank != sharing.holders[unit][0]
    backwards = 0
    done = Counter({REDUCE: 0, UPDATE: 0})
    for position, (other, kind, index) in enumerate(row):
        if other == stage and kind == BACKWARD:
            backwards += 1
            # A home is stepped with its stage, and checked so.
            if is_guest and backwards > (done[REDUCE] + 1) * size:
                owes = f"rank {rank} owes {Action(unit, REDUCE, done[REDUCE])} first, or mixes two windows"
                raise breach(program, rank, position, WINDOWS, owes)
        if other != unit:
            continue
        if kind not in done:
            raise breach(program, rank, position, PLACES, f"{unit} is a tied weight, which its stages compute with")
        if index != done[kind]:
            due = Action(unit, kind, done[kind])
            raise breach(program, rank, position, WINDOWS, f"the next one due on rank {rank} is {due}")
        if kind == REDUCE and backwards < (index + 1) * size:
            what = f"only {backwards - index * size} of {size} backwards of window {index} are in it"
            raise breach(program, rank, position, WINDOWS, what)
        if kind == UPDATE and done[REDUCE] <= index:
            what = f"rank {rank} owes {Action(unit, REDUCE, index)} first"
            raise breach(program, rank, position, ORDER, what)
        done[kind] += 1
    for kind, late in ((REDUCE, 0), (UPDATE, schedule.windows_late(rank, unit))):
        if done[kind] < program.windows - late:
            owes = f"rank {rank} owes {Action(unit, kind, done[kind])} and never runs it"
            raise breach(program, rank, len(row), WINDOWS, owes)


def tied_versions(program: Program) -> Mapping[tuple[int, int, int], Version]:
    """Of every tied weight, stage that shares it and micro-batch: which of its values the stage met."""
    found: dict[tuple[int, int, int], Version] = {}
    sharing, size = program.schedule.sharing, program.schedule.micro_batches
    for rank, row in enumerate(program.rows):
        updates: Counter[int] = Counter()
        at_forward: dict[tuple[int, int, int], int] = {}
        for stage, kind, index in row:
            if sharing.is_tied(stage):
                updates[stage] += kind == UPDATE and rank != sharing.holders[stage][0]
                continue
            if kind == UPDATE:
                updates.update(sharing.at_home(stage))  # which has the new value as soon as it is stepped
            for unit in sharing.of_stage[stage]:
                key = (unit, stage, index)
                if kind == FORWARD:
                    at_forward[key] = updates[unit]
                elif kind == BACKWARD and key in at_forward:
                    found[key] = Version(at_forward[key], updates[unit], index // size)
    return found


@dataclass(frozen=True)
class TiedWeight:
    """How late a tied weight is, and what it takes, on every stage that shares it, its home first.

    Args:
        unit: how actions call it.
        stages: that share it.
        gap: the largest (version at backward) - (version at forward).
        staleness: updates between a forward and the update its gradient goes into, at most.
        mean_staleness: the same in the mean over the micro-batches of a window.
        values: copies of it beside the weight: the one in use, and those that are received meanwhile; at home, the one
            that is sent.
        sums: copies of a sum of its gradients that are under way, or, at home, received.
    """

    unit: int
    stages: tuple[int, ...]
    gap: tuple[int, ...]
    staleness: tuple[int, ...]
    mean_staleness: tuple[float, ...]
    values: tuple[int, ...]
    sums: tuple[int, ...]


def tied_weights(planner: Planner, windows: range) -> tuple[TiedWeight, ...]:
    """Those of the planner's schedule.

    Args:
        windows: that repeat for ever.
    """
    schedule = planner.schedule
    if not schedule.tied:
        return ()
    found, size = tied_versions(planner.program(windows.stop)), schedule.micro_batches
    settled = range(windows.start * size, windows.stop * size)

    def weight(unit: int, stages: tuple[int, ...]) -> TiedWeight:
        of_stage = {stage: [v for (u, s, _), v in found.items() if (u, s) == (unit, stage)] for stage in stages}
        copies = [buffers(planner, schedule.placement.home(stage), unit, windows) for stage in stages]
        return TiedWeight(
            unit=unit,
            stages=stages,
            gap=tuple(max(version.gap for version in versions) for versions in of_stage.values()),
            staleness=tuple(max(version.staleness for version in versions) for versions in of_stage.values()),
            mean_staleness=tuple(
                sum(found[unit, stage, micro_batch].staleness for micro_batch in settled) / len(settled)
                for stage in stages
            ),
            values=tuple(values for values, _ in copies),
            sums=tuple(sums for _, sums in copies),
        )

    return tuple(weight(unit, stages) for unit, stages in enumerate(schedule.tied, start=schedule.num_stages))


def buffers(planner: Planner, rank: int, unit: int, windows: range) -> tuple[int, int]:
    """Of a tied weight on a rank that holds it: (copies of its value, copies of a sum of its gradients) that lie beside
    what is computed with, at most."""
    home, *guests = planner.schedule.sharing.holders[unit]
    if rank == home:
        return 1, min(len(guests), ON_HOSTS.gradient_buffers)
    values = sums = most_values = most_sums = 0
    for change in _changes(planner, rank, unit, windows.stop):
        values, sums = values + change[0], sums + change[1]
        most_values, most_sums = max(most_values, values), max(most_sums, sums)
    return 1 + most_values, most_sums


def _changes(planner: Planner, rank: int, unit: int, windows: int) -> Iterator[tuple[int, int]]:
    """On a guest, by how much there are more values and sums under way, step by step.

    A value is received while the one before it is in use. The home has had a sum when the new value comes."""
    for window in range(windows):
        begun = planner.postings(window, rank)
        for action in (None, *planner.row(window, rank)):
            if action is not None and action.stage == unit:
                yield (-1, -1) if action.kind == UPDATE else (0, 1)
            for message in begun.get(action, ()):
                if message.action.stage == unit:
                    yield 1, 0
