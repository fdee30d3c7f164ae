"""The losses of micro-batches as DeepSpeed has them, and their sums."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from deepspeed.utils import logger
from torch import Tensor

MicroBatchLoss = tuple[Any, dict[str, Tensor] | None]
"""The loss, and the additional losses by name where the module has some."""


def summed(losses: Sequence[MicroBatchLoss]) -> MicroBatchLoss:
    """Their sums, in the order of stock: micro-batch by micro-batch, from zero."""
    first, additional = losses[0]
    total = sum((loss for loss, _ in losses[1:]), start=first)
    if additional is None:
        return total, None
    extras = [extra for _, extra in losses[1:] if extra is not None]
    return total, {name: sum((extra[name] for extra in extras), start=value) for name, value in additional.items()}


def warn_of_broken(micro_batches: range, losses: Sequence[MicroBatchLoss], stage: int) -> None:
    """Name the micro-batches whose loss is not finite. Every look waits for the device, where that is a GPU."""
    for number, (loss, _) in zip(micro_batches, losses, strict=True):
        if not math.isfinite(float(loss)):
            logger.warning(f"the loss of micro-batch {number} is {float(loss)} (stage {stage})")
