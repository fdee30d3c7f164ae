"""The losses of the windows that are under way on the last stage."""

from __future__ import annotations

from typing import Any

from torch import Tensor

MicroBatchLoss = tuple[Any, dict[str, Tensor] | None]
"""The loss, and the additional losses by name where the module has some."""


class WindowLosses:
    """Losses by micro-batch, until their window is over."""

    def __init__(self) -> None:
        self._losses: dict[int, MicroBatchLoss] = {}

    def add(self, micro_batch: int, loss: Any, additional: dict[str, Tensor] | None) -> None:
        self._losses[micro_batch] = (loss, additional)

    def drop(self, micro_batch: int) -> None:
        """Its forward was cancelled."""
        self._losses.pop(micro_batch, None)

    def take(self, micro_batches: range) -> list[MicroBatchLoss]:
        """The losses of a window, in order; they are forgotten here."""
        return [self._losses.pop(micro_batch) for micro_batch in micro_batches]
