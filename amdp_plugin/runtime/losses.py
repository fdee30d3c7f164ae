"""The losses of the windows that are under way on a last stage."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


class WindowLosses:
    """What a host reports of every micro-batch, until its window is over."""

    def __init__(self) -> None:
        self._losses: dict[int, Any] = {}

    def add(self, micro_batch: int, loss: Any) -> None:
        self._losses[micro_batch] = loss

    def drop(self, micro_batch: int) -> None:
        """Its forward was cancelled."""
        self._losses.pop(micro_batch, None)

    def take(self, micro_batches: Iterable[int]) -> list[Any]:
        """The losses of a window, in order; they are forgotten here."""
        return [self._losses.pop(micro_batch) for micro_batch in micro_batches]
