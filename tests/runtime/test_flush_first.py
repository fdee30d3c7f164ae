"""The first windows of a job end with a flush, and the pipeline then runs freely, whenever it is resumed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from amdp_plugin.plan.planner import Planner
from amdp_plugin.plan.schedules import make
from amdp_plugin.plan.verify import verify
from amdp_plugin.runtime.serial import SerialPipeline

from ..processes import run_ranks
from .models import OPTIMIZERS, build_stages, data, loss
from .pipelines import Case, assert_equals_oracle, make_executor, oracle_of_parts, result

FEEDBACK = ("compensation", "error_feedback")
FIRST = ("flush_first", 3)
CASES = [
    Case("paci", 3, 2, options=(FIRST,)),
    Case("paci", 4, 4, "tuples", "adamw", options=(FIRST, FEEDBACK)),
    Case("amdp", 4, 4, optimizer="adamw", options=(FIRST, FEEDBACK)),
    Case("amdp", 4, 8, options=(FIRST, ("directions", 1))),
    Case("pipedream-2bw", 3, 3, optimizer="fused", options=(FIRST, FEEDBACK)),
    Case("pipedream", 4, 1, "counting", options=(FIRST,)),
]


def train(rank: int, case: Case, parts: tuple[int, ...]) -> dict[str, Any]:
    executor, worker = make_executor(rank, case)
    gaps = []
    for windows in parts:
        for _ in range(windows):
            executor.run_window()
            gaps.append((executor.largest_gap, len(executor._in_flight)))
        executor.quiesce()
    return {**result(executor, worker), "gaps": gaps}


@pytest.mark.parametrize("parts", [(7,), (2, 4), (3, 1, 2), (4, 3)], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.schedule}-{case.stages}-{case.micro_batches}")
def test_ranks_equal_the_oracle(case: Case, parts: tuple[int, ...]) -> None:
    found = run_ranks(case.stages, train, case, parts)
    assert_equals_oracle(found, oracle_of_parts(case, parts))
    for end in found:
        assert end["gaps"][:3] == [(0, 0)] * 3, "nothing is in flight between windows that end with a flush"
    assert any(in_flight for _, in_flight in found[0]["gaps"][3:])


def test_it_is_1f1b_and_then_the_schedule_from_an_empty_pipeline() -> None:
    def pipeline(schedule: Any) -> SerialPipeline:
        seeds = [100, 101, 102]
        return SerialPipeline(build_stages("plain", 3), OPTIMIZERS["adamw"], loss, schedule, seeds=seeds)

    told = pipeline(make("paci", 3, 2, flush_first=3, compensation="error_feedback"))
    told.train(data(), 8)
    by_hand, micro_batches = pipeline(make("1f1b", 3, 2)), data()
    by_hand.train(micro_batches, 3)
    by_hand.schedule = make("paci", 3, 2, compensation="error_feedback")
    by_hand.train(micro_batches, 5)
    for one, other in zip(told.stages, by_hand.stages, strict=True):
        for value, expected in zip(one.parameters(), other.parameters(), strict=True):
            assert torch.equal(value, expected)
    assert told.used == by_hand.used


@pytest.mark.parametrize(
    ("name", "stages", "size", "options"),
    [
        ("paci", 4, 2, {}), ("paci", 8, 8, {"extra_in_flight": 2}), ("pipedream", 4, 1, {}),
        ("pipedream-2bw", 4, 4, {}),
        ("amdp", 8, 8, {}), ("amdp", 8, 16, {"decisions": "meeting"}), ("amdp", 6, 12, {"directions": 3}),
    ],
)  # fmt: skip
def test_the_opening_of_every_schedule_obeys_the_laws(
    name: str, stages: int, size: int, options: dict[str, Any]
) -> None:
    opening = make(name, stages, size, flush_first=5, **options).opening()
    assert opening is not None and opening.flush and opening.opening() is None
    verify(Planner(opening).program(4))
    assert make(name, stages, size, **options).opening() is None


def test_what_flushes_anyway_has_no_first_windows() -> None:
    with pytest.raises(ValueError, match="flush_first cannot be 3; it flushes at every window anyway: leave it out"):
        make("1f1b", 2, 2, flush_first=3)
    with pytest.raises(ValueError, match="flush_first cannot be -1; it counts windows"):
        make("paci", 2, 2, flush_first=-1)
