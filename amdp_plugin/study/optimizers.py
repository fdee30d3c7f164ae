"""The optimizers of a study, each with a learning rate that warms up and then falls as a cosine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

BETAS, WEIGHT_DECAY = (0.9, 0.95), 0.1
MUON_MOMENTUM, MUON_OVER_ADAMW = 0.95, 20.0
"""Muon steps hidden matrices alone; whatever else a stage has is AdamW's, with that much smaller a learning rate."""
LAST_RATE = 0.1
"""Of the learning rate, at the end."""


def rate(step: int, steps: int, warm_up: int) -> float:
    """The factor of the learning rate at ``step``, counted from 0."""
    if step < warm_up:
        return (step + 1) / warm_up
    done = (step - warm_up) / max(1, steps - warm_up)
    return LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


class Joined(torch.optim.Optimizer):
    """Several optimizers that step as one."""

    def __init__(self, parts: Iterable[torch.optim.Optimizer]) -> None:
        self.parts = list(parts)
        groups = [group for part in self.parts for group in part.param_groups]
        super().__init__([parameter for group in groups for parameter in group["params"]], {})
        self.param_groups = groups  # the parts' own, so that a learning rate set here is theirs

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step all parts."""
        for part in self.parts:
            part.step()


def adamw(parameters: list[nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
    """AdamW."""
    return torch.optim.AdamW(parameters, lr=learning_rate, betas=BETAS, weight_decay=WEIGHT_DECAY, foreach=True)


def muon(parameters: list[nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
    """Muon on hidden matrices, AdamW on the rest. A matrix that is far taller than wide is taken for an embedding or
    an output, which Muon is not for."""
    hidden = [each for each in parameters if each.ndim == 2 and max(each.shape) <= 8 * min(each.shape)]
    chosen = {id(each) for each in hidden}
    others = [each for each in parameters if id(each) not in chosen]
    parts: list[torch.optim.Optimizer] = []
    if hidden:
        parts.append(torch.optim.Muon(hidden, lr=learning_rate, momentum=MUON_MOMENTUM, weight_decay=WEIGHT_DECAY))
    if others:
        parts.append(adamw(others, learning_rate / MUON_OVER_ADAMW))
    return Joined(parts)


def sgd(parameters: list[nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
    """SGD with momentum 0.9."""
    return torch.optim.SGD(parameters, lr=learning_rate, momentum=0.9)


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter], float], torch.optim.Optimizer]] = {
    "adamw": adamw, "muon": muon, "sgd": sgd,
}  # fmt: skip
DEFAULT_RATES = {"adamw": (1e-3,), "muon": (2e-2,), "sgd": (1e-1,)}

