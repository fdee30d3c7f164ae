"""What a culprit among the ranks does, and what all the others must then say, on any host."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from typing import Any

from torch import nn

from amdp_plugin.runtime.watch import PipelineStallError

from .processes import outcomes

TIMEOUT = 2.0
"""Seconds that a job of these tests waits for a peer."""
GRACE = 6.0
"""Seconds beyond the timeout: a rank may wait for one that is itself waiting, on a machine with much else to do."""
START = 30.0
"""Seconds until a job trains, at most."""
WINDOWS, STAYS_AWAY_FROM = 20, 3


def vanish() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def freeze() -> None:
    time.sleep(TIMEOUT + GRACE)


IN_A_FORWARD = {"vanish": vanish, "freeze": freeze}


def train_until_broken(
    train_window: Callable[[], Any], module: nn.Module, deed: str | None, forwards: int
) -> tuple[str, float]:
    """Train until something breaks: the message, and the seconds since the last window that was trained.

    Args:
        module: this rank's stage.
        deed: this rank's, if it is the culprit: "vanish" or "freeze" after ``forwards`` forwards of its stage, or
            "stay away" from a window.
    """
    if deed in IN_A_FORWARD:
        calls = iter(range(1000))
        module.register_forward_hook(lambda *_: IN_A_FORWARD[deed]() if next(calls) == forwards else None)
    for window in range(WINDOWS):
        start = time.monotonic()
        if deed == "stay away" and window == STAYS_AWAY_FROM:
            freeze()
            return "stayed away", 0.0
        try:
            train_window()
        except PipelineStallError as error:
            return str(error), time.monotonic() - start
    raise AssertionError("nothing broke")


def messages_of_others(world: int, train: Callable[..., Any], job: Any, culprit: int, deed: str) -> list[str]:
    """What all ranks but ``culprit`` say of ``train(rank, job, deed)``, where ``deed`` is ``None`` for them."""
    limit = TIMEOUT + GRACE + START
    found = outcomes(world, _train, train, job, culprit, deed, timeout=limit, without=culprit)
    messages = []
    for rank, (good, value) in enumerate(found):
        if rank == culprit:
            continue
        assert good, f"rank {rank} of {world}, {culprit} is the culprit: {value}"
        message, seconds = value
        assert seconds < TIMEOUT + GRACE, f"rank {rank} needed {seconds:.1f} s: {message}"
        assert re.search(r"pipeline rank \d+", message) and "last action done here is" in message
        messages.append(message)
    return messages


def _train(rank: int, train: Callable[..., Any], job: Any, culprit: int, deed: str) -> Any:
    return train(rank, job, deed if rank == culprit else None)


def assert_gone(messages: list[str], culprit: int) -> None:
    """Its neighbours name it; whoever waits for them names them."""
    assert all(re.search(r"with rank \d+ (failed|did not complete)", message) for message in messages), messages
    assert any(f"with rank {culprit} failed: the peer is gone" in message for message in messages), messages
    assert all(re.search(r"stage \d+, at \d+[FBRU]\d+", message) for message in messages), messages


def assert_stuck(messages: list[str], culprit: int) -> None:
    """Somebody names it."""
    expected = f"with rank {culprit} did not complete within {TIMEOUT:g} s"
    assert any(expected in message for message in messages), messages
