"""A peer that is gone or stuck: every other rank says so, in time, and names the rank, the action and the peer."""

from __future__ import annotations

from typing import Any

import pytest

from amdp_plugin.runtime.watch import PipelineStallError
from tests.failures import TIMEOUT, assert_gone, assert_stuck, messages_of_others, train_until_broken
from tests.processes import outcomes

from .jobs import Job
from .training import Trainer

FORWARDS = 9


def train(rank: int, job: Job, deed: str | None) -> tuple[str, float]:
    trainer = Trainer(rank, job)
    return train_until_broken(lambda: trainer.train(1), trainer.bare, deed, FORWARDS)


def check(job: Job, culprit: int, deed: str) -> list[str]:
    """The messages of all ranks but ``culprit``."""
    return messages_of_others(job.world, train, job, culprit, deed)


def job_of(name: str, stages: int, **more: Any) -> Job:
    return Job({"name": name, "timeout_seconds": TIMEOUT}, stages, **more)


@pytest.mark.parametrize(
    ("name", "culprit"), [("paci", 0), ("paci", 2), ("paci", 3), ("1f1b", 1), ("amdp", 0), ("amdp", 2)]
)
def test_killed_peer(name: str, culprit: int) -> None:
    assert_gone(check(job_of(name, 4), culprit, "vanish"), culprit)


@pytest.mark.parametrize("deed", ["freeze", "stay away"])
@pytest.mark.parametrize(("job", "culprit"), [(job_of("paci", 3), 1), (job_of("amdp", 4), 2)], ids=["paci", "amdp"])
def test_stuck_peer(job: Job, culprit: int, deed: str) -> None:
    assert_stuck(check(job, culprit, deed), culprit)


@pytest.mark.parametrize("culprit", [0, 3])
def test_killed_peer_of_a_meeting(culprit: int) -> None:
    """Every update waits for all ranks, in Megatron's own collectives."""
    check(job_of("amdp", 4, clip=0.05), culprit, "vanish")


@pytest.mark.parametrize("more", [{"data": 2}, {"tensor": 2}], ids=str)
@pytest.mark.parametrize("culprit", [0, 3])
def test_killed_rank_of_a_stage(culprit: int, more: dict[str, int]) -> None:
    """The others of its stage meet it in a collective: a data-parallel replica at the update, a tensor-parallel rank
    in every layer."""
    check(job_of("paci", 2, **more), culprit, "vanish")


def train_changing_lengths(rank: int, job: Job) -> str:
    trainer = Trainer(rank, job)
    try:
        trainer.train(6)
    except (ValueError, PipelineStallError) as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("nothing broke")


@pytest.mark.parametrize("name", ["paci", "1f1b"])
def test_lengths_that_change_unannounced(name: str) -> None:
    found = outcomes(2, train_changing_lengths, job_of(name, 2, lengths=(8,) * 8 + (5,) * 100), timeout=60.0)
    assert all(good for good, _ in found), found
    first, second = (message for _, message in found)
    assert first.startswith("ValueError") and "variable_seq_lengths (--variable-seq-lengths)" in first
    assert "[5, 2, 16] float32" in first and "[8, 2, 16] float32" in first
    assert second.startswith("PipelineStallError") and "with rank 0" in second
