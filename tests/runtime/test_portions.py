"""Windows that were made to end as they begin run as any others (plan/test_portions.py has when that is)."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest

from amdp_plugin.plan import planner as planner_module
from amdp_plugin.plan.planner import Planner
from tests.processes import run_ranks

from .pipelines import (
    Case,
    Parts,
    assert_equals_oracle,
    make_executor,
    oracle_of_parts,
    result,
    run_parts,
    run_to_the_ends,
)

UNEVEN = (1, 1.37, 0.731, 1.19)
CASES = [
    Case("amdp", 6, 12, "counting"),
    Case("paci", 4, 2, "tuples", stage_costs=UNEVEN),
    Case("paci", 4, 2, "counting", stage_costs=UNEVEN, options=(("decisions", "relayed"),), clipping=0.01),
]
IDS = ["amdp", "paci", "relayed"]
PARTS = (7, 1, 8)


def hurried() -> Any:
    """Planners look at no more windows than they must, in the enclosed block."""
    return patch.object(planner_module, "ACTIONS_TO_EXAMINE", 1)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_these_cases_would_go_another_way(case: Case) -> None:
    planner, free = Planner(case.make(), case.costs()), Planner(case.make(), case.costs())
    with hurried():
        planner = Planner(case.make(), case.costs())
    first, _ = planner.steady_windows()
    assert planner.period == 1 and first < min(PARTS[0], PARTS[2]) - 1
    assert planner.program(PARTS[0]).rows != free.program(PARTS[0]).rows


def train(rank: int, case: Case) -> dict[str, Any]:
    with hurried():
        executor, worker = make_executor(rank, case)
    run_parts(executor, PARTS)
    return result(executor, worker)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_they_equal_the_oracle(case: Case) -> None:
    found = run_ranks(case.stages, train, case)
    with hurried():
        assert_equals_oracle(found, oracle_of_parts(case, PARTS))


def train_to_the_end(rank: int, case: Case) -> dict[str, Any]:
    feed = Parts.of([case.micro_batches * windows for windows in PARTS])
    with hurried():
        executor, worker = make_executor(rank, case, feed)
    windows = run_to_the_ends(executor, feed)
    return {**result(executor, worker), "windows": windows}


def test_data_may_end_with_any_of_them() -> None:
    case = CASES[0]
    found = run_ranks(case.stages, train_to_the_end, case)
    assert [end["windows"] for end in found] == [[7, 8, 16]] * case.stages
    with hurried():
        assert_equals_oracle(found, oracle_of_parts(case, PARTS))
