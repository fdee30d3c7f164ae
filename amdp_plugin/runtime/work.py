"""What the executor wants of a rank."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from torch import nn

from ..plan.action import Action
from .channels import Tensors


class Worker(Protocol):
    """What a rank can do; the executor says when. Micro-batches and windows are numbered from the job's start."""

    def has_window(self, window: int) -> bool:
        """Where a first or last stage is: whether there is data for the whole window."""

    def forward(self, action: Action, inputs: Tensors | None) -> Tensors | None:
        """Forward one micro-batch; ``inputs`` is ``None`` on the first stage, the result on the last."""

    def backward(self, action: Action, gradients: Tensors | None) -> Tensors | None:
        """Accumulate the gradients of one micro-batch. Takes those of the forward's floating-point outputs
        (``None`` on the last stage), returns those of its floating-point inputs (``None`` on the first)."""

    def close(self, update: Action) -> None:
        """The window of ``update`` has closed, which comes later."""

    def drop(self, update: Action) -> None:
        """``update``, of a window that has closed, is not made."""

    def update(self, action: Action) -> None:
        """At the home of a stage: apply the window's mean gradient to it, under the graphs that are alive."""

    def release(self, action: Action) -> None:
        """The backward ``action`` is done and will not be cancelled: its data may go."""

    def end_of_backwards(self, window: int, direction: int) -> None:
        """The last stage of ``direction`` has sent its last gradient of ``window``, whose update is still to come:
        time to report the loss."""

    def parameters(self, stage: int) -> Iterable[nn.Parameter]:
        """Those of ``stage`` that are trained."""

    def snapshot(self, action: Action) -> Any:
        """Whatever the forward ``action`` is going to change besides its output: random state, buffers."""

    def cancel(self, forwards: Sequence[Action], backwards: Sequence[Action], snapshots: Sequence[Any]) -> None:
        """Forget what is in flight.

        Args:
            forwards: those without a backward yet.
            backwards: those for a window that has not begun. Nothing else is in the sums of gradients then.
            snapshots: of before the first cancelled forwards, one for every direction that had any.
        """
