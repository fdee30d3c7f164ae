"""Error feedback in the oracle: by hand, as it was published, and against a simulation that knows of no program."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from amdp_plugin.plan.schedules import make
from amdp_plugin.runtime.serial import MakeOptimizer, SerialPipeline

from .test_serial import Scale

FEEDBACK = {"compensation": "error_feedback"}


def test_by_hand() -> None:
    """Two stages, windows of one, SGD with a rate of 1/2, y = x1 * x0 * input, loss = y; r = (2 - 1) / 1.

    Micro-batches 1, 2, 1. Stage 0 forwards the second with its first weights, the third after one update.

    | | activation | gradients | z0, z1 | x0, x1 |
    |---|---|---|---|---|
    | start | | | 1, 2 | 1, 2 |
    | 1 | 1 * 1 = 1 | 2 * 1, 1 | 0, 1.5 | 0 - 1, 1.5 - 0.5 |
    | 2 | 1 * 2 = 2 | 1 * 2, 2 | -1, 0.5 | -1 - 1, 0.5 - 1 |
    | 1 | -1 * 1 = -1 | -0.5 * 1, -1 | -0.75, 1 | -0.75 + 0.25, 1 + 0.5 |
    """
    stages = [Scale(1.0), Scale(2.0)]
    oracle = SerialPipeline(stages, half_rate, total, make("paci", 2, 1, **FEEDBACK))
    oracle.train(numbers([1.0, 2.0, 1.0]), 3)
    assert [stage.weight.item() for stage in stages] == [-0.5, 1.5]
    assert [oracle.plain(stage)[0].item() for stage in range(2)] == [-0.75, 1.0]


@pytest.mark.parametrize(("strength", "expected"), [(0.5, 0.0 - 0.5), (2.0, 0.0 - 2.0)])
def test_strength_by_hand(strength: float, expected: float) -> None:
    """After one update from 1 to 0."""
    stages = [Scale(1.0), Scale(2.0)]
    SerialPipeline(stages, half_rate, total, make("paci", 2, 1, **FEEDBACK, strength=strength)).train(numbers([1.0]), 1)
    assert stages[0].weight.item() == expected


def test_without_it_a_stage_computes_with_what_its_optimizer_made() -> None:
    stages = [Scale(1.0), Scale(2.0)]
    oracle = SerialPipeline(stages, half_rate, total, make("paci", 2, 1))
    oracle.train(numbers([1.0]), 1)
    assert stages[0].weight.item() == oracle.plain(0)[0].item() == 0.0


def test_published_form() -> None:
    """Under a delay of one, x[t+1] = x[t] - 2 u[t] + u[t-1] with Adam's full steps u (arXiv 2606.30634).

    Stage 0 of two, windows of one: the gradient of step t is that at the weights of step t - 1. Stage 1 stands still.
    """
    rate, inputs = 0.1, [0.3, -1.2, 0.7, 2.0, -0.4, 1.1, 0.9, -0.6]
    x, mean, square, last = [1.0], 0.0, 0.0, 0.0
    for step, value in enumerate(inputs):
        gradient = 2 * (x[max(0, step - 1)] * value - 3.0) * value
        mean, square = 0.9 * mean + 0.1 * gradient, 0.99 * square + 0.01 * gradient**2
        unbiased = mean / (1 - 0.9 ** (step + 1)), square / (1 - 0.99 ** (step + 1))
        update = rate * unbiased[0] / (unbiased[1] ** 0.5 + 1e-8)
        x.append(x[-1] - 2 * update + last)
        last = update
    rates = iter([rate, 0.0])
    stages, schedule = [Scale(1.0), Scale(1.0)], make("paci", 2, 1, **FEEDBACK)
    oracle = SerialPipeline(
        stages,
        lambda parameters: torch.optim.Adam(parameters, lr=next(rates), betas=(0.9, 0.99)),
        lambda y, _: (y - 3.0).square().sum(),
        schedule,
    )
    oracle.train(numbers(inputs), len(inputs))
    learning, still = stages
    assert still.weight.item() == 1.0
    assert learning.weight.item() == pytest.approx(x[-1], rel=1e-13)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(("stages", "size", "strength"), [(2, 1, 1.0), (3, 2, 1.0), (4, 4, 0.7), (4, 1, 0.3)])
def test_against_a_simulation_of_delay(stages: int, size: int, strength: float, optimizer: str) -> None:
    windows = 6
    modules = linear_stages(stages)
    expected = simulate(modules, size, windows, strength * (stages - 1) / size, OPTIMIZERS[optimizer])
    schedule = make("paci", stages, size, **FEEDBACK, strength=strength)
    oracle = SerialPipeline(modules, OPTIMIZERS[optimizer], squares, schedule)
    oracle.train(vectors(), windows)
    for stage, (computing, plain) in enumerate(expected):
        torch.testing.assert_close(modules[stage].weight, computing, rtol=1e-12, atol=0)
        torch.testing.assert_close(oracle.plain(stage)[0], plain, rtol=1e-12, atol=0)
        assert not torch.allclose(computing, plain, rtol=1e-6)


def simulate(
    modules: list[nn.Linear], size: int, windows: int, ahead: float, make_optimizer: MakeOptimizer
) -> list[tuple[Tensor, Tensor]]:
    """What PACI means for linear stages, written out: the weights that each computes with at the end, and its plain
    iterate. No program and no module: stage ``s`` of ``N`` forwards micro-batch ``m`` when it has backwarded
    ``m - (N - s) + 1`` others, and backwards it when it has backwarded ``m``, with the weights that it then has."""
    count = len(modules)
    plain = [nn.Parameter(module.weight.detach().clone()) for module in modules]
    optimizers = [make_optimizer([weight]) for weight in plain]
    used = [[weight.detach().clone()] for weight in plain]
    for number, (value, label) in zip(range(windows * size), vectors(), strict=False):
        inputs, window = [], number // size
        for stage in range(count):
            version = max(0, number - (count - stage) + 1) // size
            inputs.append(value)
            value = value @ used[stage][version].T
        gradient = 2 * (value - label) / value.numel() / size
        for stage in reversed(range(count)):
            of_weight = gradient.T @ inputs[stage]
            plain[stage].grad = of_weight if number % size == 0 else plain[stage].grad + of_weight
            gradient = gradient @ used[stage][window]
            if number % size == size - 1:
                before = plain[stage].detach().clone()
                optimizers[stage].step()
                used[stage].append(plain[stage].detach() + ahead * (plain[stage].detach() - before))
    return [(weights[-1], weight.detach()) for weights, weight in zip(used, plain, strict=True)]


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.3),
}


def linear_stages(count: int) -> list[nn.Linear]:
    torch.manual_seed(3)
    return [nn.Linear(4, 4, bias=False, dtype=torch.float64) for _ in range(count)]


def vectors() -> Iterator[tuple[Tensor, Tensor]]:
    """``(input, label)``, [2, 4] each, without end."""
    generator = torch.Generator().manual_seed(4)
    while True:
        yield tuple(torch.randn(2, 2, 4, generator=generator, dtype=torch.float64))


def squares(output: Tensor, label: Tensor) -> Tensor:
    return (output - label).square().mean()


def half_rate(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.5)


def total(output: Tensor, _: None) -> Tensor:
    return output.sum()


def numbers(values: list[float]) -> Iterator[tuple[Tensor, None]]:
    return ((torch.tensor([value], dtype=torch.float64), None) for value in values)
