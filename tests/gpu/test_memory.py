"""What is in flight takes the memory of the activations that the plan says, and little more."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from amdp_plugin.plan.costs import CostModel
from amdp_plugin.plan.planner import Planner
from amdp_plugin.plan.report import report
from tests import devices
from tests.processes import run_ranks
from tests.runtime import pipelines
from tests.runtime.pipelines import Case, make_executor

pytestmark = pytest.mark.skipif(not devices.on_gpu(), reason="the CPU does not tell what a process has allocated")
ROWS, WIDTH, DEPTH = 4096, 256, 8
WARM_UP, MEASURED = 2, 3
"""Windows."""
MORE = 4
"""Activations beside those in flight: of a message each way, and of what runs, forward and backward."""


class Wide(nn.Module):
    """Few weights, many activations."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def train(rank: int, case: Case) -> tuple[int, int]:
    """Bytes that one forward keeps, and the most beside weights and optimizer that a steady window takes."""
    pipelines.build_stages = lambda kind, stages, dtype: [Wide() for _ in range(stages)]  # type: ignore[assignment]
    device = devices.device()

    def feed() -> object:
        while True:
            yield torch.randn(ROWS, WIDTH, device=device), torch.randn(ROWS, WIDTH, device=device)

    executor, worker = make_executor(rank, case, feed())  # type: ignore[arg-type]
    for _ in range(WARM_UP):
        executor.run_window()
    executor.quiesce()
    torch.cuda.synchronize()
    base = torch.cuda.memory_allocated()
    output = worker.modules[rank](torch.randn(ROWS, WIDTH, device=device))
    kept = torch.cuda.memory_allocated() - base
    del output
    torch.cuda.reset_peak_memory_stats()
    for _ in range(MEASURED):
        executor.run_window()
    torch.cuda.synchronize()
    return kept, torch.cuda.max_memory_allocated() - base


@pytest.mark.parametrize("case", [Case("1f1b", 4, 8), Case("paci", 4, 8), Case("paci", 4, 2)], ids=lambda case: case[0])
def test_activations_in_flight(case: Case, record_property: pytest.RecordProperty) -> None:
    planned = report(Planner(case.make(), CostModel.relative(case.stages)), 1).peak_in_flight_by_rank
    found = run_ranks(case.stages, train, case)
    measured = [round(most / kept, 2) for kept, most in found]
    record_property("in flight, planned", str(list(planned)))
    record_property("in flight, measured", str(measured))
    for most, number in zip(measured, planned, strict=True):
        assert number - 1 <= most <= number + MORE
