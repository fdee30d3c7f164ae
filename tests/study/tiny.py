"""A problem that trains in no time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from amdp_plugin.study.problem import Problem

WIDTH = 4


def squares(seed: int) -> Problem:
    """Four layers that learn to square."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(3)]
        layers.append(nn.Linear(WIDTH, WIDTH))  # type: ignore[arg-type]
        return Problem(layers, nn.functional.mse_loss, draw(seed), [next(draw(99)) for _ in range(2)], 8)


def draw(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        x = torch.randn(8, WIDTH, generator=generator)
        yield x, x * x
