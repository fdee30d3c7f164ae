"""A peer that is gone or stuck: every other rank says so, in time, and names the rank, the action and the peer."""

from __future__ import annotations

import os
import re
import signal
import time
from typing import Any

import pytest
import torch

from amdp_plugin.runtime.watch import PipelineStallError
from tests.processes import outcomes

from .jobs import Job, make_engine, stream

TIMEOUT = 2.0
GRACE = 6.0
"""Seconds beyond the timeout: a rank may wait for one that is itself waiting, on a machine with much else to do."""

FORWARDS = 5


def train(rank: int, job: Job, culprit: int, deed: str) -> tuple[str, float]:
    """Train until something breaks: the message, and the seconds since the last window that was trained."""
    engine = make_engine(rank, job)
    if rank == culprit and deed in DEEDS:
        calls = iter(range(1000))
        engine.module.register_forward_hook(lambda *_: DEEDS[deed]() if next(calls) == FORWARDS else None)
    batches = stream(engine, job)
    for window in range(20):
        start = time.monotonic()
        if rank == culprit and deed == "stay away" and window == 3:
            time.sleep(TIMEOUT + GRACE)
            return "stayed away", 0.0
        try:
            engine.train_batch(batches)
        except PipelineStallError as error:
            return str(error), time.monotonic() - start
    raise AssertionError("nothing broke")


def vanish() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def freeze() -> None:
    time.sleep(TIMEOUT + GRACE)


DEEDS = {"vanish": vanish, "freeze": freeze}


def check(job: Job, culprit: int, deed: str) -> list[str]:
    """The messages of all ranks but ``culprit``."""
    results = outcomes(job.world, train, job, culprit, deed, timeout=TIMEOUT + GRACE + 20)
    messages = []
    for rank, (good, value) in enumerate(results):
        if rank == culprit:
            continue
        assert good, f"rank {rank} of {job.world}, {culprit} is the culprit: {value}"
        message, seconds = value
        assert seconds < TIMEOUT + GRACE, f"rank {rank} needed {seconds:.1f} s: {message}"
        assert re.search(r"pipeline rank \d+", message) and "last action done here is" in message
        messages.append(message)
    return messages


def job_of(name: str, stages: int, size: int = 2, **more: Any) -> Job:
    return Job({"name": name, "timeout_seconds": TIMEOUT}, stages, size, **more)


@pytest.mark.parametrize(
    ("name", "culprit"), [("paci", 0), ("paci", 1), ("paci", 2), ("paci", 3), ("1f1b", 1), ("amdp", 0), ("amdp", 2)]
)
def test_killed_peer(name: str, culprit: int) -> None:
    """Its neighbours name it; whoever waits for them names them."""
    messages = check(job_of(name, 4), culprit, "vanish")
    assert all(re.search(r"with rank \d+ (failed|did not complete)", message) for message in messages)
    assert any(f"with rank {culprit} failed: the peer is gone" in message for message in messages)
    assert all(re.search(r"stage \d+, at \d+[FBRU]\d+", message) for message in messages), messages


@pytest.mark.parametrize(("culprit", "deed"), [(0, "freeze"), (1, "freeze"), (2, "freeze"), (1, "stay away")])
@pytest.mark.parametrize("job", [job_of("paci", 3), job_of("amdp", 4, 4)], ids=["paci", "amdp"])
def test_stuck_peer(job: Job, culprit: int, deed: str) -> None:
    messages = check(job, culprit, deed)
    assert any(f"with rank {culprit} did not complete within {TIMEOUT:g} s" in message for message in messages), (
        messages
    )


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
