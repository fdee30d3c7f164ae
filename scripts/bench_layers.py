"""Layers of known duration for ``bench_pipeline.py``: some compute, some only take their time."""

import time
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

BATCH, HIDDEN = 1024, 256
"""Rows and columns of the activations of layers that compute: what a small transformer has in a micro-batch."""
TINY = 8
CALIBRATION_PASSES = 15


class TakeTime(torch.autograd.Function):
    """Does nothing, for a while."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward_seconds: float, backward_seconds: float) -> Tensor:
        """Return ``x`` after ``forward_seconds``."""
        ctx.seconds = backward_seconds
        time.sleep(forward_seconds)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient after ``backward_seconds``."""
        time.sleep(ctx.seconds)
        return gradients[0], None, None


class SleepLayer(nn.Module):
    """A stage on a device of its own, emulated: (batch, 8) -> (batch, 8), with 8 weights."""

    def __init__(self, forward_seconds: float, backward_seconds: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(TINY))
        self.seconds = forward_seconds, backward_seconds

    def forward(self, x: Tensor) -> Tensor:
        """Scale, then sleep: the backward sleeps first."""
        result: Tensor = TakeTime.apply(x * self.weight, *self.seconds)
        return result


class MatmulLayer(nn.Module):
    """(batch, hidden) -> (batch, hidden); the backward takes about two forwards, on the first stage too."""

    def __init__(self, hidden: int = HIDDEN) -> None:
        super().__init__()
        # In front of the product, so that the first layer of all computes the gradient of its input like the others.
        self.shift = nn.Parameter(torch.zeros(hidden))
        self.linear = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """One product and a nonlinearity that keeps the size of the activations."""
        result: Tensor = torch.relu(self.linear(x + self.shift)) + 0.5 * x
        return result


class MatmulLayers(nn.Sequential):
    """``count`` of them in a row."""

    def __init__(self, count: int) -> None:
        super().__init__(*(MatmulLayer() for _ in range(count)))


def layers_for(forward_seconds: float) -> int:
    """How many :class:`MatmulLayer` have a forward of about ``forward_seconds`` on one thread of this machine."""
    layer, x = MatmulLayer(), torch.randn(BATCH, HIDDEN)
    seconds = []
    for _ in range(CALIBRATION_PASSES):
        start = time.perf_counter()
        layer(x)
        seconds.append(time.perf_counter() - start)
    return max(1, round(forward_seconds / median(seconds)))


def mean_square(output: Tensor, label: Tensor) -> Tensor:
    """A loss: mean squared distance."""
    return (output - label).square().mean()
