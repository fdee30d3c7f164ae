"""The losses of micro-batches as DeepSpeed has them, and their sums."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
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


def together(reported: Sequence[Tensor], losses: Sequence[MicroBatchLoss]) -> Tensor:
    """What is reported of a window and then the losses of its micro-batches, in float64, to be brought to the host at
    once: a later look at one of them would wait for all that the device has been given since."""
    each = [*reported, *(loss for loss, _ in losses)]
    return torch.stack([value.detach().reshape(()).to(torch.float64) for value in each])


def warn_of_broken(micro_batches: Sequence[int], losses: Tensor, stage: int) -> None:
    """Name the micro-batches whose loss, of ``losses`` on the host, is not finite."""
    for number, loss in zip(micro_batches, losses.tolist(), strict=True):
        if not math.isfinite(loss):
            logger.warning(f"the loss of micro-batch {number} is {loss} (stage {stage})")
