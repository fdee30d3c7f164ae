"""Micro-batches by number, from an iterator that may end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Feed:
    """Pulls micro-batches one after the other and keeps each until its backward is done.

    A forward that is cancelled therefore finds its data again, and a window that cannot be completed
    keeps what it has for when there is more.

    Args:
        pull: returns the next micro-batch; raises ``StopIteration`` at the end, and may go on later.
        wanted: which micro-batches are used here, of those that all directions share; the others are let go.
    """

    def __init__(self, pull: Callable[[], Any], wanted: Callable[[int], bool] = lambda micro_batch: True) -> None:
        self._pull, self._wanted = pull, wanted
        self._kept: dict[int, Any] = {}
        self._next = 0
        self._latest: Any = None
        self._ended = False

    def has(self, micro_batch: int) -> bool:
        """Whether ``micro_batch`` exists; pulls as far as that. Once the data has ended it stays so until
        :meth:`reopen`."""
        while self._next <= micro_batch and not self._ended:
            try:
                self._latest = self._pull()
            except StopIteration:
                self._ended = True
                break
            if self._wanted(self._next):
                self._kept[self._next] = self._latest
            self._next += 1
        return micro_batch < self._next

    def take(self, micro_batch: int) -> Any:
        """The micro-batch; beyond the end of the data the latest one again, as padding for a forward that
        will be cancelled (the pipeline runs on until all ranks know of the end)."""
        return self._kept[micro_batch] if self.has(micro_batch) else self._latest

    def release(self, micro_batch: int) -> None:
        """Its backward is done."""
        self._kept.pop(micro_batch, None)

    def reopen(self) -> None:
        """Nothing is in flight: if the data goes on after an end, it may be asked for."""
        self._ended = False

    def restart(self, micro_batch: int) -> None:
        """Let go of everything; the next micro-batch pulled is number ``micro_batch``."""
        self._kept.clear()
        self._next = micro_batch
        self._ended = False

    def renumber(self, before: int, after: int) -> None:
        """What was micro-batch ``before`` is number ``after`` from now on (when windows change their size)."""
        self._kept = {number - before + after: value for number, value in self._kept.items()}
        self._next += after - before
