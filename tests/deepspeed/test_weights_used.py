"""Which weights the delayed backward uses: the latest, and not those of its forward. Compared with a closed form."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import deepspeed
import pytest
import torch
from deepspeed.pipe import PipelineModule
from torch import Tensor, nn

import amdp_plugin
from amdp_plugin.deepspeed import worker
from tests.processes import run_ranks

RATE, STEPS = 0.3, 5
FIRST = (0.9, 1.2, 0.7)
INPUTS = torch.tensor([1.0, -0.5, 0.8, 1.3, -1.1, 0.6])
LABELS = torch.tensor([0.2, 0.4, -0.3, 0.9, 0.1, -0.7])


class Factor(nn.Module):
    """Multiplies by its one weight."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([value]))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Weights(NamedTuple):
    """Of three stages."""

    a: float
    b: float
    c: float


def by_hand(latest: bool) -> Weights:
    """``STEPS`` updates of paci with three stages and windows of one: stage ``s`` forwards micro-batch ``m`` with
    version ``max(0, m - (2 - s))``, and backwards it when it has version ``m``."""
    versions = [Weights(*FIRST)]
    for m in range(STEPS):
        x, label = float(INPUTS[m]), float(LABELS[m])
        now = versions[m]
        a, b = versions[max(0, m - 2)].a, versions[max(0, m - 1)].b
        y = now.c * b * a * x
        gradient = 2 * (y - label)
        gradient_c = gradient * b * a * x
        gradient_b = gradient * now.c * a * x
        gradient_a = gradient * now.c * (now.b if latest else b) * x
        steps = zip(now, (gradient_a, gradient_b, gradient_c), strict=True)
        versions.append(Weights(*(weight - RATE * slope for weight, slope in steps)))
    return versions[STEPS]


def squared_error(output: Tensor, label: Tensor) -> Tensor:
    return ((output - label) ** 2).mean()


def train(rank: int, options: dict[str, Any], stash: bool) -> float:
    """The weight of this rank after ``STEPS`` updates; with ``stash``, autograd keeps what a graph has saved."""
    deepspeed.init_distributed("gloo")
    module = PipelineModule([Factor(value) for value in FIRST], num_stages=3, loss_fn=squared_error)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "pipeline": {"schedule": "paci"},
    }
    optimizer = torch.optim.SGD(module.parameters(), lr=RATE, **options)
    engine, *_ = amdp_plugin.initialize(model=module, config=config, optimizer=optimizer)
    batches = iter([(x.view(1), label.view(1)) for x, label in zip(INPUTS, LABELS, strict=True)] * 2)
    if stash:
        worker.live_update = lambda parameters: nullcontext()
    with torch.autograd.graph.allow_mutation_on_saved_tensors() if stash else nullcontext():
        for _ in range(STEPS):
            engine.train_batch(batches)
    return float(next(module.parameters()))


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}], ids=str)
def test_backward_uses_the_latest_weights(options: dict[str, Any]) -> None:
    found = run_ranks(3, train, options, False)
    assert found == pytest.approx(by_hand(latest=True), rel=1e-5)
    assert found[0] != pytest.approx(by_hand(latest=False).a, rel=1e-2)


def test_closed_form_tells_stashed_weights_apart() -> None:
    """Were the weights of the forward kept, the same run would give the other closed form."""
    assert run_ranks(3, train, {}, True) == pytest.approx(by_hand(latest=False), rel=1e-5)
