"""What a rank waits for, and for how long: turns a hang, or a peer that is gone, into a message."""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple, Protocol

import torch.distributed
from torch import Tensor

from ..plan.action import Action
from ..plan.devices import HOST_AHEAD
from .device import Copy, Mark
from .timeline import WAIT, Timeline

FIRST_WINDOW = 5
"""Times the usual limit of a wait in the first window, which loads and compiles."""
POLL_SECONDS = 5e-5


class PipelineStallError(RuntimeError):
    """A peer is gone, or what it owes did not come in time. The pipeline cannot go on."""


class Waitable(Protocol):
    """The part of ``torch.distributed.Work`` that is waited on."""

    def wait(self, timeout: timedelta) -> bool: ...


class InStream:
    """Work of a backend whose bare ``wait()`` makes the current stream wait, and not the host: NCCL's."""

    def __init__(self, work: torch.distributed.Work) -> None:
        self._work = work

    def wait(self, timeout: timedelta) -> bool:
        """The device waits; the host goes on. ``timeout`` is the watch's to keep."""
        return self._work.wait()

    def is_over(self) -> bool:
        """Whether the device is past it, or it has failed; asking waits for nothing."""
        return self._work.is_completed()

    def check(self) -> None:
        """When the device is past it: raise what went wrong. A message that NCCL gives up ends like any other."""
        self._work.is_completed()  # which looks for errors
        self._work.wait()


class _Given(NamedTuple):
    """Something that the device was given to do, done when it comes to ``mark``, or never where ``work`` failed."""

    mark: Mark
    what: str
    action: Action | None
    peer: int | None
    work: InStream | None = None


class _Coming(NamedTuple):
    """Values on their way to the host, and who takes them."""

    copy: Copy
    what: str
    take: Callable[[Tensor], None]


class Watch:
    """Bounds every wait of one rank, and remembers what the rank was doing.

    Args:
        rank: this rank in its pipeline.
        timeout_seconds: the longest that one message may take, from when it is waited for.
        timeline: where waits are recorded.
    """

    def __init__(self, rank: int, timeout_seconds: float, timeline: Timeline | None = None) -> None:
        self.rank = rank
        self.timeout = timedelta(seconds=timeout_seconds)
        self.timeline = timeline or Timeline()
        self.last_done: Action | None = None
        self.in_first_window = True
        self._given: deque[_Given] = deque()
        self._coming: deque[_Coming] = deque()
        self._handing_over = False

    def wait(
        self,
        work: Waitable,
        what: str,
        action: Action | None,
        peer: int | None,
        name: str | None = None,
        has_come: Callable[[], bool] | None = None,
    ) -> None:
        """Wait for ``work``, one wait with the whole timeout (an expired gloo wait closes its pair for good).

        The device waits in place of the host where ``work`` is :class:`InStream`; then :meth:`keep_pace` raises.

        Args:
            what: what is done, for a message.
            action: for which action.
            name: what the timeline calls it; by default as the action.
            has_come: whether it need not be waited for, where that can be seen.

        Raises:
            PipelineStallError: when it does not complete in time, or the peer is gone.
        """
        if not isinstance(work, InStream):
            self.hand_over(has_come)  # the peer may be waiting for it
        with self.guard(what, action, peer), self.timeline.span(name or str(action or what), WAIT):
            work.wait(timedelta(seconds=self._limit))
            if isinstance(work, InStream):
                self._given.append(_Given(self.timeline.device.mark(), what, action, peer, work))

    @property
    def _limit(self) -> float:
        """Seconds."""
        return self.timeout.total_seconds() * (FIRST_WINDOW if self.in_first_window else 1)

    def given(self, action: Action) -> None:
        """The device has been given all of ``action``."""
        if self.timeline.device.runs_ahead:
            self._given.append(_Given(self.timeline.device.mark(), _COMPUTING, action, None))

    def keep_pace(self, ahead: int = HOST_AHEAD) -> None:
        """Before an action: let the device come so far that less than ``ahead`` others are to be done; 0: all is done.

        The limit counts from here, and anew whenever something is done.

        Raises:
            PipelineStallError: when the device gets nothing done in time, or a transport says that it failed.
        """
        self._let(lambda: bool(ahead) and sum(given.what == _COMPUTING for given in self._given) < ahead)

    def pass_messages(self) -> None:
        """Before the host may ask the device something that has no limit: let it come past all messages. What it
        computes after them ends by itself.

        Raises:
            PipelineStallError: as :meth:`keep_pace`.
        """
        self._let(lambda: all(given.work is None for given in self._given))

    def _let(self, far_enough: Callable[[], bool]) -> None:
        """Let the device go on until it is ``far_enough``, or through."""
        since, limit = time.monotonic(), self._limit
        while self._given:
            first = self._given[0]
            with self.guard(first.what, first.action, first.peer):
                if self.timeline.device.is_done(first.mark):
                    if first.work is not None:
                        first.work.check()
                    self._given.popleft()
                    since = time.monotonic()
                    continue
            self._hand_over_ready()
            if far_enough():
                return
            if time.monotonic() - since > limit:
                error = f"timed out after {limit:g} s on the device"
                raise PipelineStallError(self._message(first.what, first.action, first.peer, error))
            time.sleep(POLL_SECONDS)
        self._hand_over_ready()
        self.timeline.settle()

    def fetch(self, tensor: Tensor, what: str) -> Tensor:
        """The values of ``tensor`` on the CPU, now: with :meth:`hand_over` the one way here to wait for values of the
        device, within the limit.

        Raises:
            PipelineStallError: as :meth:`keep_pace`.
        """
        copy = self.timeline.device.to_host(tensor)
        self._await(copy, what)
        self._hand_over_ready()
        return copy.values()

    def bring(self, tensor: Tensor, what: str, take: Callable[[Tensor], None]) -> None:
        """Give ``take`` the values of ``tensor`` on the CPU as soon as the host, which goes on, finds them there: while
        it keeps pace, at the latest before it waits for others or in :meth:`hand_over`."""
        self._coming.append(_Coming(self.timeline.device.to_host(tensor), what, take))
        self._hand_over_ready()
        if self._coming:
            self._given.append(_Given(self.timeline.device.mark(), what, self.last_done, None))

    def hand_over(self, unless: Callable[[], bool] | None = None) -> None:
        """What was to be brought is with those who take it; waits for what is not there yet, ``unless`` that says, in
        the meantime, that the host need not stop at all.

        Raises:
            PipelineStallError: as :meth:`keep_pace`.
        """
        if self._handing_over:
            return
        if unless is not None:
            self._let(lambda: not self._coming or unless())
            return
        while self._coming:
            self._await(self._coming[0].copy, self._coming[0].what)
            self._hand_over_ready()

    def _hand_over_ready(self) -> None:
        # One after the other: whoever takes values may send them, and so come by here.
        while self._coming and not self._handing_over and self._coming[0].copy.is_done():
            self._handing_over = True
            try:
                coming = self._coming.popleft()
                coming.take(coming.copy.values())
            finally:
                self._handing_over = False

    def _await(self, copy: Copy, what: str) -> None:
        if not copy.is_done():
            self._given.append(_Given(self.timeline.device.mark(), what, self.last_done, None))
            self.keep_pace(0)

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
            f"did not complete within {self._limit:g} s: the peer is stuck or slower than that "
            "(raise the schedule's timeout_seconds if it is only slow)"
            if _LATE.search(error)
            else "failed: the peer is gone (look for the first error in the other ranks' logs)"
        )
        done = f"the last action done here is {self.last_done}" if self.last_done else "no action was done here yet"
        return f"pipeline rank {self.rank}{stage}: {what}{whom} {why}; {done}. Transport: {error.splitlines()[0]}"


_COMPUTING = "computing"
_LATE = re.compile("timed? ?out", re.IGNORECASE)
_TRANSPORT = re.compile(r"gloo|nccl|socket|connection (was )?(closed|reset|refused)|broken pipe", re.IGNORECASE)


def _of_transport(error: RuntimeError) -> bool:
    """Whether ``error`` comes from a process group; gloo raises plain ``RuntimeError``."""
    return isinstance(error, torch.distributed.DistError) or _TRANSPORT.search(str(error)) is not None
