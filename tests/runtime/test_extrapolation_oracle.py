"""Extrapolated weights in the oracle: by hand, and against a simulation that knows of no program and no optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from amdp_plugin.plan.costs import CostModel
from amdp_plugin.plan.schedules import make
from amdp_plugin.runtime.serial import SerialPipeline

from .test_compensation import half_rate, linear_stages, numbers, squares, total, vectors
from .test_serial import Scale

D, K = 0.3, 5
"""Of PipeMare, in these tests."""


def test_pipemare_by_hand() -> None:
    """Two stages, windows of one, SGD with a rate of 1/2, y = w1 * w0 * input, loss = y. Stage 0 has a gap of one, so
    gamma is D = 1/4; stage 1 has none. Micro-batches 1, 2, 1: the second is forwarded by stage 0 before its first
    update, and the third before its second.

    | | activation | gradients of w0, w1 | w0, w1 | delta of stage 0 |
    |---|---|---|---|---|
    | start | | | 1, 2 | 0 |
    | 1 | 1 * 1 = 1 | 2 * 1, 1 | 0, 1.5 | 3/4 * -1 |
    | 2 | 1 * 2 = 2 | 1.5 * 2, 2 | -1.5, 0.5 | 1/4 * -3/4 + 3/4 * -1.5 |
    | 1 | 0 * 1 = 0 | 0.5 * 1, 0 | -1.75, 0.5 | |

    That the backward went back cannot be seen on the first stage, whose input has no gradient.
    """
    stages = [Scale(1.0), Scale(2.0)]
    schedule = make("pipemare", 2, 1, correction_decay=0.25, rescale_steps=0)
    oracle = SerialPipeline(stages, half_rate, total, schedule)
    oracle.train(numbers([1.0, 2.0, 1.0]), 3)
    assert [stage.weight.item() for stage in stages] == [-1.75, 0.5]


def test_a_backward_of_pipemare_by_hand() -> None:
    """Three stages, of which the first learns nothing but what its input's gradient was: that of stage 1's weight.

    Stage 1 forwards its second micro-batch with w = 1, then steps by -1/2 * 1 to 1/2, so that delta is
    3/4 * -1/2 = -3/8 (its gap is one, D = 1/4), and backwards it with 1/2 + 3/8 = 7/8.
    """
    seen: list[float] = []
    stages = [Watched(seen), Scale(1.0), Still()]
    schedule = make("pipemare", 3, 1, correction_decay=0.25, rescale_steps=0)
    oracle = SerialPipeline(stages, half_rate, total, schedule)
    oracle.train(numbers([1.0, 1.0]), 2)
    assert seen == [1.0, 0.875]


def test_rescaled_rates_by_hand() -> None:
    """Stage 0 of three, windows of one: tau = 2. Its updates are of a gradient of 1 and a rate of 1/2, divided by
    2 ** (1 - k / 2)."""
    stages = [Scale(1.0), Still(), Still()]
    oracle = SerialPipeline(stages, half_rate, total, make("pipemare", 3, 1, rescale_steps=2))
    steps = [1.0]
    for _ in range(3):
        oracle.train(numbers([1.0]), 1)
        steps.append(stages[0].weight.item())
    taken = [before - after for before, after in pairwise(steps)]
    assert taken == pytest.approx([0.5 / 2, 0.5 / 2**0.5, 0.5])
    assert [group["lr"] for group in oracle.optimizers[0].param_groups] == [0.5]


def test_a_prediction_by_hand() -> None:
    """Two stages, windows of one, SGD with momentum 1/2 and a rate of 1/2; the gradient of stage 0 is its input.

    The weight goes 1, 1/2 (momentum 1), -1/4 (momentum 3/2), ... Its second and third micro-batches are forwarded one
    version behind: with what it has, without a momentum, and with 1/2 - 1/2 * 1.
    """
    seen: list[float] = []
    stages = [Scale(1.0), Still(seen)]
    oracle = SerialPipeline(stages, momentum, total, make("spectrain", 2, 1))
    oracle.train(numbers([1.0, 1.0, 1.0]), 3)
    assert seen == [1.0, 1.0, 0.0]


def momentum(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.5, momentum=0.5)


class Still(nn.Module):
    """Hands on what it gets, and keeps it; its weight has no effect."""

    def __init__(self, seen: list[float] | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.seen = [] if seen is None else seen

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.item())
        return x + 0 * self.weight


class Watched(nn.Module):
    """Keeps the gradients of its output."""

    def __init__(self, seen: list[float]) -> None:
        super().__init__()
        self.weight, self.seen = nn.Parameter(torch.zeros((), dtype=torch.float64)), seen

    def forward(self, x: Tensor) -> Tensor:
        output = x + 0 * self.weight
        output.register_hook(lambda gradient: self.seen.append(gradient.item()))
        return output


SHAPES = [(2, 1), (4, 1), (5, 1), (3, 2), (4, 4), (5, 3)]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(("stages", "size"), SHAPES)
@pytest.mark.parametrize("name", ["pipemare", "spectrain", "xpipe"])
def test_against_a_simulation_of_delay(name: str, stages: int, size: int, optimizer: str) -> None:
    windows, modules = 7, linear_stages(stages)
    expected = simulate(name, modules, size, windows, optimizer)
    options = {"correction_decay": D, "rescale_steps": K} if name == "pipemare" else {}
    costs = CostModel.relative(stages, backward_ratio=1.0)
    schedule = make(name, stages, size, **options)
    SerialPipeline(modules, OPTIMIZERS[optimizer], squares, schedule, costs=costs).train(vectors(), windows)
    for module, weight in zip(modules, expected, strict=True):
        torch.testing.assert_close(module.weight.detach(), weight, rtol=1e-10, atol=1e-14)
    plain = linear_stages(stages)
    SerialPipeline(plain, OPTIMIZERS[optimizer], squares, make("paci", stages, size)).train(vectors(), windows)
    same = torch.allclose(plain[0].weight, modules[0].weight, rtol=1e-6)
    assert same == (name == "pipemare" and stages == 2), "of two stages the first alone has a gap, and hands on nothing"


RATE, DECAY = {"sgd": 0.05, "adamw": 0.01}, 0.3
OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=RATE["sgd"], momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=RATE["adamw"], weight_decay=DECAY),
}


@dataclass
class Hand:
    """An optimizer of one weight, written out."""

    name: str
    weight: Tensor
    steps: int = 0
    first: Tensor | float = 0.0
    second: Tensor | float = 0.0

    def step(self, gradient: Tensor, rate: float) -> None:
        self.steps += 1
        if self.name == "sgd":
            self.first = 0.9 * self.first + gradient
        else:
            self.first, self.second = 0.9 * self.first + 0.1 * gradient, 0.999 * self.second + 0.001 * gradient**2
            self.weight = self.weight - rate * DECAY * self.weight
        self.weight = self.weight - rate * self.smooth()

    def smooth(self) -> Tensor | float:
        if self.name == "sgd" or not self.steps:
            return self.first
        unbiased = self.second / (1 - 0.999**self.steps)
        return self.first / (1 - 0.9**self.steps) / (unbiased**0.5 + 1e-8)


@dataclass
class Delayed:
    """A linear stage: the versions that it has had, their smooth directions, and the running mean of its updates."""

    name: str
    stage: int
    stages: int
    size: int
    hand: Hand

    def __post_init__(self) -> None:
        self.versions = [(self.hand.weight, self.hand.smooth())]
        self.mean: Tensor | float = 0.0
        self.gradient: Tensor | float = 0.0

    @property
    def lead(self) -> int:
        """SpecTrain's and XPipe's formula of a backward (of a window's first), under backwards as long as forwards."""
        return (self.size - 1 + self.stage // 2) // self.size

    def version(self, number: int) -> int:
        """PACI: micro-batch ``number`` is forwarded when ``number - (N - s) + 1`` have been backwarded."""
        return max(0, number - (self.stages - self.stage) + 1) // self.size

    def forward(self, number: int) -> Tensor:
        window = number // self.size
        version = self.version(window * self.size if self.name == "xpipe" else number)
        weight, smooth = self.versions[version]
        ahead = 0 if self.name == "pipemare" else window + self.lead - version
        return weight - ahead * RATE[self.hand.name] * smooth

    def backward(self, number: int) -> Tensor:
        window = number // self.size
        weight, smooth = self.versions[window]
        if self.name == "pipemare":
            return weight - (window - self.version(number)) * self.mean
        return weight - self.lead * RATE[self.hand.name] * smooth

    def update(self, window: int) -> None:
        late = self.stages - 1 - self.stage
        power = 1 - min(window / K, 1) if self.name == "pipemare" else 0
        before = self.hand.weight
        self.hand.step(self.gradient, RATE[self.hand.name] / max(1, late / self.size) ** power)
        if late:
            gamma = D ** (1 / -(-late // self.size))
            self.mean = gamma * self.mean + (1 - gamma) * (self.hand.weight - before)
        self.versions.append((self.hand.weight, self.hand.smooth()))
        self.gradient = 0.0


def simulate(name: str, modules: list[nn.Linear], size: int, windows: int, optimizer: str) -> list[Tensor]:
    """The weights of every stage at the end."""
    count = len(modules)
    chain = [
        Delayed(name, stage, count, size, Hand(optimizer, module.weight.detach().clone()))
        for stage, module in enumerate(modules)
    ]
    data: Iterator[tuple[Tensor, Tensor]] = vectors()
    for number in range(windows * size):
        value, label = next(data)
        inputs = []
        for stage in chain:
            inputs.append(value)
            value = value @ stage.forward(number).T
        gradient = 2 * (value - label) / value.numel() / size
        for stage, given in zip(reversed(chain), reversed(inputs), strict=True):
            stage.gradient = stage.gradient + gradient.T @ given
            gradient = gradient @ stage.backward(number)
            if number % size == size - 1:
                stage.update(number // size)
    return [stage.hand.weight for stage in chain]
