"""A peer that is gone or stuck: every other rank says so, in time, and names the rank, the action and the peer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from amdp_plugin.runtime.watch import PipelineStallError
from tests.failures import TIMEOUT, assert_gone, assert_stuck, messages_of_others, train_until_broken
from tests.processes import outcomes

from .jobs import Job, make_engine, stream

FORWARDS = 5


def train(rank: int, job: Job, deed: str | None) -> tuple[str, float]:
    engine = make_engine(rank, job)
    batches = stream(engine, job)
    return train_until_broken(lambda: engine.train_batch(batches), engine.module, deed, FORWARDS)


def check(job: Job, culprit: int, deed: str) -> list[str]:
    """The messages of all ranks but ``culprit``."""
    return messages_of_others(job.world, train, job, culprit, deed)


def job_of(name: str, stages: int, size: int = 2, **more: Any) -> Job:
    return Job({"name": name, "timeout_seconds": TIMEOUT}, stages, size, **more)


@pytest.mark.parametrize(
    ("name", "culprit"), [("paci", 0), ("paci", 1), ("paci", 2), ("paci", 3), ("1f1b", 1), ("amdp", 0), ("amdp", 2)]
)
def test_killed_peer(name: str, culprit: int) -> None:
    assert_gone(check(job_of(name, 4), culprit, "vanish"), culprit)


@pytest.mark.parametrize(("culprit", "deed"), [(0, "freeze"), (1, "freeze"), (2, "freeze"), (1, "stay away")])
@pytest.mark.parametrize("job", [job_of("paci", 3), job_of("amdp", 4, 4)], ids=["paci", "amdp"])
def test_stuck_peer(job: Job, culprit: int, deed: str) -> None:
    assert_stuck(check(job, culprit, deed), culprit)


@pytest.mark.parametrize("culprit", [0, 1, 3])
def test_killed_peer_of_a_meeting(culprit: int) -> None:
    """Every update waits for all ranks."""
    check(job_of("amdp", 4, 4, config={"gradient_clipping": 0.05}), culprit, "vanish")


@pytest.mark.parametrize("culprit", [0, 1, 2, 3])
def test_killed_replica(culprit: int) -> None:
    """The replica of the same stage meets it in a collective."""
    check(job_of("paci", 2, replicas=2), culprit, "vanish")


def train_changing_shapes(rank: int, job: Job) -> str:
    engine = make_engine(rank, job)
    batches = iter([(torch.ones(rows, 6), torch.ones(rows, 6)) for rows in (3, 3, 3, 3, 5, 5, 5, 5)])
    try:
        for _ in range(4):
            engine.train_batch(batches)
    except (ValueError, PipelineStallError) as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("nothing broke")


@pytest.mark.parametrize("name", ["paci", "1f1b"])
def test_shapes_that_change_unannounced(name: str) -> None:
    found = outcomes(2, train_changing_shapes, job_of(name, 2), timeout=60.0)
    assert all(good for good, _ in found), found
    first, second = (message for _, message in found)
    assert first.startswith("ValueError") and "dynamic_shape=True" in first
    assert "[5, 6] float32" in first and "[3, 6] float32" in first
    assert second.startswith("PipelineStallError") and "with rank 0" in second
