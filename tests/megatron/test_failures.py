"""A peer that is gone or stuck: every other rank says so, in time, and names the rank, the action and the peer."""

from __future__ import annotations

import os
import re
import signal
import time
from typing import Any

import pytest

from amdp_plugin.runtime.watch import PipelineStallError
from tests.processes import outcomes

from .jobs import Job
from .training import Trainer

TIMEOUT = 2.0
GRACE = 6.0
"""Seconds beyond the timeout: a rank may wait for one that is itself waiting, on a machine with much else to do."""

FORWARDS = 9


def train(rank: int, job: Job, culprit: int, deed: str) -> tuple[str, float]:
    """Train until something breaks: the message, and the seconds since the last window that was trained."""
    trainer = Trainer(rank, job)
    if rank == culprit and deed in DEEDS:
        calls = iter(range(1000))
        trainer.bare.register_forward_hook(lambda *_: DEEDS[deed]() if next(calls) == FORWARDS else None)
    for window in range(20):
        start = time.monotonic()
        if rank == culprit and deed == "stay away" and window == 3:
            freeze()
            return "stayed away", 0.0
        try:
            trainer.train(1)
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
    messages = []
    for rank, (good, value) in enumerate(outcomes(job.world, train, job, culprit, deed, timeout=TIMEOUT + GRACE + 30)):
        if rank == culprit:
            continue
        assert good, f"rank {rank} of {job.world}, {culprit} is the culprit: {value}"
        message, seconds = value
        assert seconds < TIMEOUT + GRACE, f"rank {rank} needed {seconds:.1f} s: {message}"
        assert re.match(r"pipeline rank \d+", message) and "last action done here is" in message
        messages.append(message)
    return messages


def job_of(name: str, stages: int, **more: Any) -> Job:
    return Job({"name": name, "timeout_seconds": TIMEOUT}, stages, **more)


@pytest.mark.parametrize(
    ("name", "culprit"), [("paci", 0), ("paci", 2), ("paci", 3), ("1f1b", 1), ("amdp", 0), ("amdp", 2)]
)
def test_killed_peer(name: str, culprit: int) -> None:
    """Its neighbours name it; whoever waits for them names them."""
    messages = check(job_of(name, 4), culprit, "vanish")
    assert all(re.search(r"with rank \d+ (failed|did not complete)", message) for message in messages), messages
    assert any(f"with rank {culprit} failed: the peer is gone" in message for message in messages), messages
    assert all(re.search(r"stage \d+, at \d+[FBRU]\d+", message) for message in messages), messages


@pytest.mark.parametrize("deed", ["freeze", "stay away"])
@pytest.mark.parametrize(("job", "culprit"), [(job_of("paci", 3), 1), (job_of("amdp", 4), 2)], ids=["paci", "amdp"])
def test_stuck_peer(job: Job, culprit: int, deed: str) -> None:
    messages = check(job, culprit, deed)
    assert any(f"with rank {culprit} did not complete within {TIMEOUT:g} s" in message for message in messages)


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
