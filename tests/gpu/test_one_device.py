"""The oracle on the device is that on the CPU, to rounding."""

from __future__ import annotations

import pytest
import torch

from amdp_plugin.runtime.serial import SerialPipeline
from tests import devices
from tests.runtime.models import OPTIMIZERS, build_stages, data, loss
from tests.runtime.pipelines import Case, make_oracle, placed


@pytest.mark.parametrize("schedule", ["paci", "amdp"])
def test_the_oracle_is_that_of_the_cpu(schedule: str, record_property: pytest.RecordProperty) -> None:
    if not devices.on_gpu():
        pytest.skip("compares a GPU with the CPU")
    case = Case(schedule, 4, 4)
    found = make_oracle(case)
    found.train(placed(), 4)
    seeds = [100 + stage for stage in range(4)]
    expected = SerialPipeline(build_stages("plain", 4), OPTIMIZERS["sgd"], loss, case.make(), seeds=seeds)
    expected.train(data(), 4)
    largest = 0.0
    for stage, other in zip(found.stages, expected.stages, strict=True):
        for value, wanted in zip(stage.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(value.cpu(), wanted, rtol=1e-4, atol=1e-5)
            largest = max(largest, float((value.cpu() - wanted).abs().max().detach()))
    record_property("largest difference", f"{largest:.1e}")
