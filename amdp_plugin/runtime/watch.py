"""What a rank waits for, and for how long: turns a hang, or a peer that is gone, into a message."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Protocol

import torch.distributed

from ..plan.action import Action
from .timeline import WAIT, Timeline


class PipelineStallError(RuntimeError):
    """A peer is gone, or what it owes did not come in time. The pipeline cannot go on."""


class Waitable(Protocol):
    """The part of ``torch.distributed.Work`` that is waited on."""

    def wait(self, timeout: timedelta) -> bool: ...


class Watch:
    """Bounds every wait of one rank, and remembers what the rank was doing.

    Args:
        rank: this rank in its pipeline.
        timeout_seconds: the longest that one message may take.
        timeline: where waits are recorded.
    """

    def __init__(self, rank: int, timeout_seconds: float, timeline: Timeline | None = None) -> None:
        self.rank = rank
        self.timeout = timedelta(seconds=timeout_seconds)
        self.timeline = timeline or Timeline()
        self.last_done: Action | None = None

    def wait(self, work: Waitable, what: str, action: Action | None, peer: int, name: str | None = None) -> None:
        """Wait for ``work``, one wait with the whole timeout (an expired gloo wait closes its pair for good).

        Args:
            what: what is done, for a message.
            action: for which action.
            name: what the timeline calls it; by default as the action.

        Raises:
            PipelineStallError: when it does not complete in time, or the peer is gone.
        """
        with self.guard(what, action, peer), self.timeline.span(name or str(action or what), WAIT):
            work.wait(self.timeout)

    @contextmanager
    def guard(self, what: str, action: Action | None, peer: int | None = None) -> Iterator[None]:
        """Turn a transport's error in the enclosed block into a :class:`PipelineStallError`; let others pass."""
        try:
            yield
        except PipelineStallError:
            raise
        except RuntimeError as error:
            if not _of_transport(error):
                raise
            raise PipelineStallError(self._message(what, action, peer, str(error))) from error

    def _message(self, what: str, action: Action | None, peer: int | None, error: str) -> str:
        stage = f", stage {action.stage}, at {action}" if action else ""
        whom = f" with rank {peer}" if peer is not None else ""
        why = (
            f"did not complete within {self.timeout.total_seconds():g} s: the peer is stuck or slower than that "
            "(raise the schedule's timeout_seconds if it is only slow)"
            if _LATE.search(error)
            else "failed: the peer is gone (look for the first error in the other ranks' logs)"
        )
        done = f"the last action done here is {self.last_done}" if self.last_done else "no action was done here yet"
        return f"pipeline rank {self.rank}{stage}: {what}{whom} {why}; {done}. Transport: {error.splitlines()[0]}"


_LATE = re.compile("timed? ?out", re.IGNORECASE)
_TRANSPORT = re.compile(r"gloo|nccl|socket|connection (was )?(closed|reset|refused)|broken pipe", re.IGNORECASE)


def _of_transport(error: RuntimeError) -> bool:
    """Whether ``error`` comes from a process group; gloo raises plain ``RuntimeError``."""
    return isinstance(error, torch.distributed.DistError) or _TRANSPORT.search(str(error)) is not None
