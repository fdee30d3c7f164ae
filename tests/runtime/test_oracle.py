"""Several processes compute, bit for bit, what the serial oracle computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from amdp_plugin.plan.planner import Planner
from amdp_plugin.plan.program import Program
from amdp_plugin.plan.simulate import in_flight
from tests.processes import run_ranks

from .pipelines import (
    AMDP_SHAPES,
    Case,
    assert_equals_oracle,
    make_executor,
    make_oracle,
    oracle_of_parts,
    placed,
    result,
    run_parts,
)


def train(rank: int, windows: int, case: Case) -> dict[str, Any]:
    executor, worker = make_executor(rank, case)
    for _ in range(windows):
        executor.run_window()
    return {"rank": rank, **result(executor, worker)}


def check(case: Case, windows: int = 5) -> list[dict[str, Any]]:
    found = run_ranks(case.stages, train, windows, case)
    oracle = make_oracle(case)
    oracle.train(placed(case.dtype), windows)
    assert_equals_oracle(found, oracle)
    return found


@pytest.mark.parametrize("kind", ["plain", "recomputed", "tuples", "counting"])
@pytest.mark.parametrize(("stages", "size"), [(2, 1), (2, 4), (3, 2), (3, 3), (4, 1), (4, 2), (4, 6)])
@pytest.mark.parametrize("schedule", ["1f1b", "paci"])
def test_processes_equal_the_oracle(schedule: str, stages: int, size: int, kind: str) -> None:
    check(Case(schedule, stages, size, kind, {2: "sgd", 3: "adamw", 4: "fused"}[stages]))


KINDS = ["plain", "recomputed", "tuples", "counting"]
SMALL, DEEP = [shape for shape in AMDP_SHAPES if shape[0] < 6], [shape for shape in AMDP_SHAPES if shape[0] >= 6]


@pytest.mark.parametrize(
    ("stages", "size", "options", "kind"),
    [
        *((*shape, kind) for shape in SMALL for kind in KINDS),
        # What a stage computes does not depend on how deep the pipeline is: each kind once.
        *((*shape, kind) for shape, kind in zip([*DEEP, (6, 12, {"directions": 2})], KINDS, strict=True)),
    ],
)
def test_amdp(stages: int, size: int, options: dict[str, int], kind: str) -> None:
    """Replicas add up in one order, home first, so that their runs are equal bit for bit, too."""
    optimizer = {2: "sgd", 4: "adamw", 6: "sgd", 8: "fused"}[stages]
    check(Case("amdp", stages, size, kind, optimizer, options=tuple(options.items())))


@pytest.mark.parametrize(("stages", "size"), [(2, 2), (4, 4), (6, 4)])
def test_chimera(stages: int, size: int) -> None:
    check(Case("chimera", stages, size))


FEEDBACK = (("compensation", "error_feedback"),)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "fused"])
@pytest.mark.parametrize(("stages", "size"), [(2, 1), (2, 4), (3, 2), (4, 1), (4, 6)])
def test_paci_with_error_feedback(stages: int, size: int, optimizer: str) -> None:
    options = (*FEEDBACK, ("strength", 0.7))
    found = check(Case("paci", stages, size, "counting", optimizer, options=options))
    for end in found:
        computing = [value for key, value in end["weights"][end["rank"]].items() if key != "mean"]
        assert not any(map(torch.equal, computing, end["plain"][end["rank"]])), "ahead of the plain iterate"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("stages", "size", "options"), [(2, 2, {}), (4, 8, {}), (4, 4, {"decisions": "meeting"})])
def test_amdp_with_error_feedback(stages: int, size: int, options: dict[str, Any], dtype: torch.dtype) -> None:
    """Guests get what their home computes with."""
    check(Case("amdp", stages, size, "plain", "adamw", dtype, options=(*options.items(), *FEEDBACK)))


def test_error_feedback_and_flushes() -> None:
    check(Case("paci", 3, 2, "plain", options=(("flush_every", 3), *FEEDBACK)), windows=7)


@pytest.mark.parametrize("size", [1, 4])
def test_gpipe(size: int) -> None:
    check(Case("gpipe", 3, size))


@pytest.mark.parametrize("schedule", ["1f1b", "paci"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "fused"])
def test_every_optimizer_in_bf16(schedule: str, optimizer: str) -> None:
    check(Case(schedule, 3, 2, "plain", optimizer, torch.bfloat16))


def test_more_in_flight() -> None:
    """The first stage then forwards further ahead, and shows a larger gap."""
    found = check(Case("paci", 3, 2, options=(("extra_in_flight", 2),)))
    assert (found[0]["peak"], found[0]["gap"]) == (5, 2)


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize(("stages", "size"), [(3, 2), (4, 1)])
def test_a_flush_every_few_windows(stages: int, size: int, every: int) -> None:
    """Seven windows: flushes within the run, and forwards ahead at its end. The gap grows from flush to flush."""
    found = check(Case("paci", stages, size, "counting", options=(("flush_every", every),)), windows=7)
    assert found[0]["gap"] == min(every - 1, -(-(stages - 1) // size))


@pytest.mark.parametrize("schedule", ["paci", "amdp"])
def test_uneven_costs(schedule: str) -> None:
    """The oracle plans for them, too: with equal stages it would run another program."""
    case = Case(schedule, 4, 8, stage_costs=(1.0, 3.0, 0.5, 2.0))
    even = Planner(case.make()).program(5)
    assert Planner(case.make(), case.costs()).program(5).rows != even.rows
    check(case)


@pytest.mark.parametrize("schedule", ["1f1b", "paci", "gpipe"])
def test_measured_in_flight_is_the_planned(schedule: str) -> None:
    case = Case(schedule, 4, 5)
    program: Program = Planner(case.make()).program(5)
    planned = [max(in_flight(program, rank)) for rank in range(4)]
    assert [end["peak"] for end in run_ranks(4, train, 5, case)] == planned


@pytest.mark.parametrize("decisions", ["latest", "relayed", "meeting"])
@pytest.mark.parametrize(("stages", "size"), [(2, 1), (2, 4), (3, 1), (3, 2), (4, 1), (4, 2), (4, 4), (4, 6)])
def test_decisions(stages: int, size: int, decisions: str) -> None:
    """Windows below, at and above the number of stages; where they are relayed, several may be parked at once."""
    clipping = 0.0 if decisions == "meeting" else 0.05
    check(Case("paci", stages, size, "counting", "adamw", options=(("decisions", decisions),), clipping=clipping), 7)


@pytest.mark.parametrize("decisions", ["latest", "relayed"])
@pytest.mark.parametrize("options", [{"flush_every": 3}, {"extra_in_flight": 2}, {"flush_first": 2}, dict(FEEDBACK)])
def test_decisions_and_other_options(options: dict[str, Any], decisions: str) -> None:
    chosen = (("decisions", decisions), *options.items())
    for kind, size in (("recomputed", 2), ("tuples", 4)):
        check(Case("paci", 3, size, kind, "adamw", options=chosen, clipping=0.05), 7)


def test_amdp_with_the_latest_decisions() -> None:
    check(Case("amdp", 4, 8, options=(("decisions", "latest"),), clipping=0.05))


def train_in_parts(rank: int, parts: tuple[int, ...], case: Case) -> dict[str, Any]:
    executor, worker = make_executor(rank, case)
    run_parts(executor, parts)
    return {"rank": rank, **result(executor, worker)}


@pytest.mark.parametrize("decisions", ["latest", "relayed"])
@pytest.mark.parametrize(("stages", "size"), [(2, 1), (3, 2), (4, 1), (4, 5)])
def test_decisions_between_quiet_moments(stages: int, size: int, decisions: str) -> None:
    """Parked updates are made there, and what was told and not yet used is forgotten, as by the oracle."""
    case = Case("paci", stages, size, "counting", "adamw", options=(("decisions", decisions), *FEEDBACK), clipping=0.05)
    parts = (3, 1, 2)
    assert_equals_oracle(run_ranks(stages, train_in_parts, parts, case), oracle_of_parts(case, parts))
