"""Small stages whose every part matters to a schedule: dropout, tuples, recomputation."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WIDTH, ROWS = 6, 3


class Plain(nn.Module):
    """Linear, normalisation, dropout, and a residual, so that weights are saved by several kinds of node."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.dropout = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(torch.tanh(self.linear(self.norm(x))))


class Recomputed(Plain):
    """The same, with its activations recomputed in the backward."""

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


class Pair(nn.Module):
    """Takes a tensor or a tuple, returns a tuple: activations, an integer mask that passes through, a second path."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.side = Plain(), nn.Linear(WIDTH, WIDTH)

    def forward(self, value: Tensor | tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        x, mask, side = value if isinstance(value, tuple) else (value, (value > 0).all(-1, keepdim=True), value)
        return self.main(x) * mask, mask, torch.tanh(self.side(side)) + x


class Counting(Plain):
    """Every forward changes a buffer that the next one uses (as a running mean would be)."""

    def __init__(self) -> None:
        super().__init__()
        self.mean: Tensor
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
        return super().forward(x - self.mean.clone())


KINDS = {"plain": Plain, "recomputed": Recomputed, "tuples": Pair, "counting": Counting}


def build_stages(kind: str, num_stages: int, dtype: torch.dtype = torch.float32) -> list[nn.Module]:
    """The same stages with the same weights wherever they are built."""
    generator = torch.get_rng_state()
    torch.manual_seed(5)
    stages = [KINDS[kind]().to(dtype) for _ in range(num_stages)]
    torch.set_rng_state(generator)
    return stages


def shared(stage: nn.Module) -> nn.Parameter:
    """The weight that stages share, where they do."""
    return next(parameter for parameter in stage.parameters() if parameter.shape == (WIDTH, WIDTH))


def loss(output: Tensor | tuple[Tensor, ...], label: Tensor) -> Tensor:
    """Mean squared error of all floating-point outputs."""
    outputs = (output,) if isinstance(output, Tensor) else output
    return sum(((out - label) ** 2).mean() for out in outputs if out.is_floating_point())


def data(dtype: torch.dtype = torch.float32, count: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """``(input, label)`` micro-batches, [ROWS, WIDTH] each; micro-batch ``i`` depends on ``i`` alone."""
    index = 0
    while count is None or index < count:
        generator = torch.Generator().manual_seed(1000 + index)
        x, y = torch.randn(2, ROWS, WIDTH, generator=generator)
        yield x.to(dtype), y.to(dtype)
        index += 1


def make_sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def make_adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.02, foreach=True)


def make_fused_adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.02, fused=True)


OPTIMIZERS = {"sgd": make_sgd, "adamw": make_adamw, "fused": make_fused_adamw}
