"""Proof, for the program at hand, that it obeys the laws (before a run starts, without torch)."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from .action import BACKWARD, FORWARD, REDUCE, UPDATE, Action
from .laws import BOUNDS, FLUSH, ORDER, PLACES, PROGRESS, WINDOWS, ProgramError, breach
from .play import Stuck, play
from .program import Program
from .tied import check_tied
from .versions import entries, versions


def verify(program: Program) -> Sequence[int]:
    """Check every law on ``program``.

    Returns:
        The numbers of all actions in ``program.graph``, in an order that their dependencies allow.

    Raises:
        ProgramError: at the first breach, with the rank-by-step grid around the cell.
    """
    _check_places(program)
    _check_updates(program)
    check_tied(program)
    order = _check_order(program)
    _check_messages(program)
    _check_bounds(program)
    _check_versions(program)
    return order


def _check_places(program: Program) -> None:
    """Law 1: every (stage, micro-batch) once forward and once backward, on the rank that owns it."""
    schedule = program.schedule
    complete = program.windows * schedule.micro_batches
    if len(program.rows) != schedule.num_ranks:
        what = f"it has {schedule.num_ranks} ranks, the program has {len(program.rows)} rows"
        raise ProgramError(f"{schedule.name} breaks {PLACES}: {what}", PLACES.number)
    seen: set[tuple[int, Action]] = set()
    for rank, row in enumerate(program.rows):
        stages, units = frozenset(schedule.placement.stages[rank]), frozenset(schedule.sharing.units[rank])
        for position, action in enumerate(row):
            if action.stage not in (units if action.kind in (REDUCE, UPDATE) else stages):
                what = f"rank {rank} holds the stages {schedule.placement.stages[rank]}, not {action.stage}"
                raise breach(program, rank, position, PLACES, what)
            owner = schedule.owner(action)
            if owner not in (rank, None):
                raise breach(program, rank, position, PLACES, f"it belongs to rank {owner}")
            if (rank, action) in seen:
                raise breach(program, rank, position, PLACES, f"rank {rank} has run {action} before")
            seen.add((rank, action))
    for micro_batch in range(complete):
        for stage, rank in enumerate(schedule.placement.ranks[micro_batch % schedule.placement.directions]):
            for kind in (FORWARD, BACKWARD):
                action = Action(stage, kind, micro_batch)
                if (rank, action) not in seen:
                    owes = f"rank {rank} owes {action} and never runs it"
                    raise breach(program, rank, len(program.rows[rank]), PLACES, owes)


def _check_updates(program: Program) -> None:
    """Law 4: update ``k`` applies exactly the gradients of window ``k``, after it reduced them, in turn."""
    schedule = program.schedule
    for rank, row in enumerate(program.rows):
        updates: Counter[int] = Counter()
        forwards: Counter[int] = Counter()
        backwards: Counter[int] = Counter()
        each_window = {stage: schedule.backwards_per_window(rank, stage) for stage in schedule.placement.stages[rank]}
        for position, (stage, kind, index) in enumerate(row):
            if schedule.sharing.is_tied(stage):
                continue
            per_window = each_window[stage]
            if kind == BACKWARD:
                early = backwards[stage] + 1 - (updates[stage] + 1) * per_window
                if early > schedule.update_delay[stage]:
                    owes = f"rank {rank} owes {Action(stage, UPDATE, updates[stage])} first, or mixes two windows"
                    raise breach(program, rank, position, WINDOWS, owes)
                backwards[stage] += 1
            elif kind in (REDUCE, UPDATE):
                if index != updates[stage]:
                    due = Action(stage, kind, updates[stage])
                    raise breach(program, rank, position, WINDOWS, f"the next one due on rank {rank} is {due}")
                if backwards[stage] < (index + 1) * per_window:
                    count = backwards[stage] - index * per_window
                    what = f"only {count} of {per_window} backwards of window {index} are in it"
                    raise breach(program, rank, position, WINDOWS, what)
                brings = schedule.forward_after(index)
                if kind == UPDATE and schedule.relays and forwards[stage] != brings:
                    what = f"its decision comes with {Action(stage, FORWARD, brings)}, which does not follow next"
                    raise breach(program, rank, position, WINDOWS, what)
                updates[stage] += kind == UPDATE
            else:
                forwards[stage] += 1
        for stage in schedule.placement.stages[rank]:
            if updates[stage] < program.windows - schedule.windows_late(rank, stage):
                owes = f"rank {rank} owes {Action(stage, UPDATE, updates[stage])} and never runs it"
                raise breach(program, rank, len(row), WINDOWS, owes)


def _check_messages(program: Program) -> None:
    """Law 3, second half: what a rank sends to another is used there in the order sent."""
    schedule, at_sender, at_receiver = program.schedule, defaultdict(list), defaultdict(list)
    for rank, row in enumerate(program.rows):
        for position, action in enumerate(row):
            if action.kind in (REDUCE, UPDATE):
                home, *guests = schedule.sharing.holders[action.stage]
                peers = guests if rank == home else [home]
                sends = (action.kind == UPDATE) == (rank == home)
                for peer in peers:
                    if sends:
                        at_sender[rank, peer, action.kind].append(action)
                    else:
                        at_receiver[peer, rank, action.kind].append((position, action))
    for (sender, receiver, kind), used in at_receiver.items():
        for sent, (position, action) in zip(at_sender[sender, receiver, kind], used, strict=False):
            if sent != action:
                what = f"the next that rank {sender} sends to rank {receiver} is {sent}"
                raise breach(program, receiver, position, PROGRESS, what)


def _check_order(program: Program) -> Sequence[int]:
    """Laws 2, 3 and 6: dependencies are met, and nothing waits for ever."""
    try:
        return list(play(program.graph))
    except Stuck as stuck:
        rank = _root(program, stuck)
        position, action, (owner, missing) = stuck.blocked[rank]
        law = FLUSH if action.kind == FORWARD and missing.kind == UPDATE else ORDER
        what = f"it needs {missing}, which rank {owner} owes "
        if missing not in program.rows[owner]:
            raise breach(program, rank, position, law, what + "and never runs") from None
        what += f"only at step {program.rows[owner].index(missing)}"
        if owner != rank:
            law, what = PROGRESS, what + _circle(rank, stuck)
        raise breach(program, rank, position, law, what) from None


def _circle(rank: int, stuck: Stuck) -> str:
    """Who waits for whom, from the rank that ``rank`` waits for and round to ``rank``."""
    waits, waiting = [], stuck.blocked[rank][2][0]
    while waiting != rank:
        _, action, (owner, missing) = stuck.blocked[waiting]
        waits.append(f"rank {waiting} itself waits at {action} for {missing} of rank {owner}")
        waiting = owner
    return ", but " + ", and ".join(waits)


def _root(program: Program, stuck: Stuck) -> int:
    """The rank to name: one that waits for itself or for what never comes, else one in a circle of waiting ranks."""
    for rank, (_, _, (owner, missing)) in sorted(stuck.blocked.items()):
        if owner == rank or missing not in program.rows[owner]:
            return rank
    rank = min(stuck.blocked, key=lambda rank: stuck.blocked[rank][0])
    seen: set[int] = set()
    while rank not in seen:
        seen.add(rank)
        rank = stuck.blocked[rank][2][0]
    return rank


def _check_bounds(program: Program) -> None:
    """Law 5: gap and in-flight count stay within what the schedule states."""
    schedule = program.schedule
    found = versions(program)
    for rank, row in enumerate(program.rows):
        flying: Counter[tuple[int, int]] = Counter()
        for position, action in enumerate(row):
            stage, kind, index = action
            lane = (stage, index % schedule.placement.directions)
            if kind == FORWARD:
                flying[lane] += 1
                if flying[lane] > schedule.in_flight[stage]:
                    count, most = flying[lane], schedule.in_flight[stage]
                    what = f"{count} micro-batches in flight on stage {stage}, at most {most} are stated"
                    raise breach(program, rank, position, BOUNDS, what)
            elif kind == BACKWARD:
                flying[lane] -= 1
                version = found[stage, index]
                if version.gap > schedule.max_gap[stage]:
                    what = f"the gap is {version.gap} updates, at most {schedule.max_gap[stage]} are stated"
                    raise breach(program, rank, position, BOUNDS, what)


def _check_versions(program: Program) -> None:
    """Law 5, of weights: there are no more versions at once than the schedule states."""
    schedule, size = program.schedule, program.schedule.micro_batches
    if not schedule.keeps_versions:
        return
    entered = entries(program)
    for rank, row in enumerate(program.rows):
        updates: Counter[int] = Counter()
        flying: dict[int, dict[int, int]] = defaultdict(dict)
        for position, (stage, kind, index) in enumerate(row):
            if kind == UPDATE:
                updates[stage] += 1
            elif kind == FORWARD:
                flying[stage][index] = schedule.forward_version(index // size, updates[stage], entered[index])
            elif kind == BACKWARD:
                flying[stage].pop(index, None)
            used = sorted({*flying[stage].values(), updates[stage]})
            if len(used) > schedule.weight_versions[stage]:
                stated = schedule.weight_versions[stage]
                what = f"versions {used} of its weights are in use, at most {stated} are stated"
                raise breach(program, rank, position, BOUNDS, what)
            if used[-1] > updates[stage]:
                what = f"it uses version {used[-1]} of its weights, which have had {updates[stage]} updates"
                raise breach(program, rank, position, BOUNDS, what)
