"""Extrapolated weights in the executor: ranks equal the oracle, with nothing swapped under a live graph."""

from __future__ import annotations

from typing import Any

import pytest

from ..processes import run_ranks
from .pipelines import Case, assert_equals_oracle, make_executor, oracle_of_parts, result, run_parts

PIPEMARE = (("correction_decay", 0.3), ("rescale_steps", 5))
CASES = [
    Case("pipemare", 2, 1, options=PIPEMARE),
    Case("pipemare", 4, 1, optimizer="adamw", options=PIPEMARE),
    Case("pipemare", 3, 2, "tuples", options=PIPEMARE),
    Case("pipemare", 4, 4, "recomputed", optimizer="fused", options=PIPEMARE),
    Case("pipemare", 3, 2, "counting", optimizer="adamw", options=(*PIPEMARE, ("flush_first", 2))),
    Case("spectrain", 2, 1),
    Case("spectrain", 4, 1, optimizer="adamw"),
    Case("spectrain", 4, 2, "tuples", optimizer="fused"),
    Case("spectrain", 3, 2, "counting"),
    Case("xpipe", 4, 1, optimizer="adamw"),
    Case("xpipe", 4, 4, "tuples", optimizer="adamw"),
    Case("xpipe", 4, 2, "recomputed"),
    Case("xpipe", 3, 5, "counting", optimizer="fused"),
    Case("xpipe", 4, 3, optimizer="adamw", options=(("flush_first", 3),)),
]


def train(rank: int, case: Case, parts: tuple[int, ...]) -> dict[str, Any]:
    executor, worker = make_executor(rank, case)
    run_parts(executor, parts)
    kept = worker.extrapolation[rank]
    stated = kept.bytes_kept()
    found = sum(tensor.numel() * tensor.element_size() for tensor in kept.kept())
    return {**result(executor, worker), "stated": stated, "kept": found}


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case[:4])))
def test_ranks_equal_the_oracle(case: Case) -> None:
    parts = (4, 1, 3)
    found = run_ranks(case.stages, train, case, parts)
    assert_equals_oracle(found, oracle_of_parts(case, parts))
