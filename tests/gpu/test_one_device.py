"""The oracle on the device is that on the CPU, to rounding."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from amdp_plugin.plan.schedules import make
from amdp_plugin.runtime.serial import SerialPipeline
from tests import devices
from tests.runtime.models import OPTIMIZERS, build_stages, data, loss
from tests.runtime.pipelines import placed


def trained(schedule: str, device: torch.device, micro_batches: Iterator[tuple[Tensor, Tensor]]) -> SerialPipeline:
    """Without dropout: two devices draw different numbers."""
    stages = [stage.to(device).eval() for stage in build_stages("plain", 4)]
    pipeline = SerialPipeline(stages, OPTIMIZERS["sgd"], loss, make(schedule, 4, 4))
    pipeline.train(micro_batches, 4)
    return pipeline


@pytest.mark.parametrize("schedule", ["paci", "amdp"])
def test_the_oracle_is_that_of_the_cpu(schedule: str, record_property: pytest.RecordProperty) -> None:
    if not devices.on_gpu():
        pytest.skip("compares a GPU with the CPU")
    found = trained(schedule, devices.device(), placed())
    expected = trained(schedule, torch.device("cpu"), data())
    largest = 0.0
    for stage, other in zip(found.stages, expected.stages, strict=True):
        for value, wanted in zip(stage.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(value.cpu(), wanted, rtol=1e-4, atol=1e-5)
            largest = max(largest, float((value.cpu() - wanted).abs().max().detach()))
    record_property("largest difference", f"{largest:.1e}")
