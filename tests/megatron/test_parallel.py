"""Schedules beside data parallelism, tensor parallelism and sequence parallelism, all of Megatron's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from .jobs import DISTRIBUTED, Job
from .oracle import nothing, oracle
from .test_oracle import LOOSE, clip
from .test_stock import OVERLAP, SEQUENCE_PARALLEL
from .training import assert_same_weights, run

SPREAD: dict[str, Any] = {**DISTRIBUTED, "ddp": {**DISTRIBUTED["ddp"], **OVERLAP}}
CASES: dict[str, Job] = {
    "paci, two replicas": Job("paci", 2, 2, data=2),
    "paci, two replicas, distributed optimizer": Job("paci", 2, 2, data=2, clip=0.05, **SPREAD),
    "paci, tensor parallel": Job("paci", 2, 2, tensor=2, clip=0.05),
    "paci, sequence parallel": Job("paci", 2, 2, tensor=2, model=SEQUENCE_PARALLEL),
    "amdp, four stages, two replicas": Job("amdp", 4, 4, data=2, **SPREAD),
    "amdp, four stages, tensor parallel": Job("amdp", 4, 4, tensor=2, clip=0.05),
    "amdp, four stages, sequence parallel": Job("amdp", 4, 4, tensor=2, model=SEQUENCE_PARALLEL),
    "paci, relayed, two of each": Job({"name": "paci", "decisions": "relayed"}, 2, 2, tensor=2, data=2, clip=0.05),
    "paci, relayed, distributed optimizer": Job(
        {"name": "paci", "decisions": "relayed"}, 2, 2, data=2, clip=0.05, **SPREAD
    ),
    "paci, two of each": Job("paci", 2, 2, tensor=2, data=2, clip=0.05),
    "paci, two of each, all options": Job("paci", 2, 2, tensor=2, data=2, model=SEQUENCE_PARALLEL, **SPREAD),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_oracle_of_one_rank_a_stage(case: str) -> None:
    """With the rows of both replicas in a micro-batch. Sums over ranks are taken in another order than over one rank's
    columns and rows, so equal means to the rounding of fp32; another schedule is far from it."""
    job = CASES[case]
    job = replace(job, optimizer={**job.optimizer, **LOOSE})
    found = run(job)
    expected = oracle(job)
    other = oracle(replace(job, schedule="1f1b"), before_step=clip if job.clip else nothing)
    assert largest_error(job, found, expected) < 1e-6
    assert largest_error(job, found, other) > 1e-5
    for replica in range(job.data):
        ends = [result for result in found if result["replica"] == replica and result["losses"]]
        assert all(result["losses"] == ends[0]["losses"] for result in ends), "of a stage's tensor-parallel ranks"
    means = [
        [sum(values) / job.data for values in zip(*windows, strict=True)]
        for windows in zip(*(result["losses"] for result in found[-job.tensor * job.data :: job.tensor]), strict=True)
    ]
    for window, losses in zip(means, expected["losses"], strict=True):
        assert window == pytest.approx(losses, rel=1e-5)


def largest_error(job: Job, found: list[dict[str, Any]], expected: dict[str, Any]) -> float:
    """Of all weights of all stages; replicas must be equal bit for bit."""
    errors = []
    for stage in range(job.pipeline):
        ranks = [result for result in found if result["stage"] == stage]
        first, *others = (ranks[start : start + job.tensor] for start in range(0, len(ranks), job.tensor))
        for replica in others:
            for left, right in zip(first, replica, strict=True):
                assert_same_weights(left["weights"][stage], right["weights"][stage], f"replicas of stage {stage}")
        whole = joined([result["weights"][stage] for result in first], first[0]["shards"])
        errors += [
            float((one - other).abs().max())
            for one, other in zip(whole, expected["weights"][stage][stage], strict=True)
        ]
    return max(errors)


def joined(parts: list[list[Tensor]], shards: list[int]) -> list[Tensor]:
    """Parameters of a stage from those of its tensor-parallel ranks, which hold the others in common, bit for bit.

    Args:
        shards: along which dimension each is cut; -1 where it is not.
    """
    whole = []
    for number, (dimension, each) in enumerate(zip(shards, zip(*parts, strict=True), strict=True)):
        if dimension < 0:
            assert all(torch.equal(part, each[0]) for part in each), f"the ranks disagree on parameter {number}"
        whole.append(each[0] if dimension < 0 else torch.cat(each, dim=dimension))
    return whole
