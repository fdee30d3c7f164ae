"""Ranks that would run different programs are told so at the start, all of them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from amdp_plugin.plan.action import Action
from amdp_plugin.plan.planner import Planner
from amdp_plugin.plan.schedule import Schedule
from amdp_plugin.plan.schedules import make
from amdp_plugin.runtime.agreement import agree
from tests.processes import run_ranks

Make = Callable[[int], Schedule]
"""The schedule that a rank makes, all with one name and one set of options."""

BASE = make("amdp", 4, 8, preload=1)


def same(rank: int) -> Schedule:
    return BASE


def priority_of_the_rank(rank: int) -> Schedule:
    """The last rank prefers other forwards."""

    def turned(action: Action, since: float) -> tuple[Any, ...]:
        return (action.kind, (action.stage if rank < 3 else -action.stage), action.index)

    return replace(BASE, priorities=(turned,))


def priority_of_chance(rank: int) -> Schedule:
    dice = random.Random(rank)
    return replace(BASE, priorities=(lambda action, since: (dice.random(), action),))


def limit_of_the_rank(rank: int) -> Schedule:
    return replace(BASE, in_flight=(3, 3, 3, 3 + rank // 3))


def bound_of_the_rank(rank: int) -> Schedule:
    """The program is the same, what is promised of it is not."""
    return replace(BASE, max_gap=(1 + rank, 1, 1, 1))


def failing_on_a_rank(rank: int) -> Schedule:
    def late(action: Action, since: float) -> int:
        return action.index if action.index < 12 or rank != 1 else {}[action.index]

    return replace(BASE, priorities=(late,))


def attempt(rank: int, make_schedule: Make) -> str:
    planner = Planner(make_schedule(rank))
    try:
        agree(planner, rank, dist.group.WORLD, torch.device("cpu"))
    except ValueError as error:
        return str(error)
    return "agreed"


def test_one_program_is_agreed_on() -> None:
    assert run_ranks(4, attempt, same) == ["agreed"] * 4


@pytest.mark.parametrize(
    "make_schedule", [priority_of_the_rank, priority_of_chance, limit_of_the_rank, bound_of_the_rank]
)
def test_what_depends_on_the_rank_or_on_chance_is_refused_on_all_ranks(make_schedule: Make) -> None:
    for rank, message in enumerate(run_ranks(4, attempt, make_schedule)):
        assert f"configured for different programs, rank {rank} for ('amdp', {{'directions': 2, 'preload': 1" in message
        assert "let nothing in a schedule of your own depend on the rank or on chance" in message


def test_a_rank_without_a_program_says_why_and_the_others_hear_of_it() -> None:
    found = run_ranks(4, attempt, failing_on_a_rank)
    assert "amdp: the priority failing_on_a_rank.<locals>.late failed with KeyError: 1" in found[1]
    assert all("different programs" in message for rank, message in enumerate(found) if rank != 1)
