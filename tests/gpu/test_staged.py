"""Ranks on GPUs equal the oracle bit for bit, though some are late and buffers that wait for use hold no numbers."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from amdp_plugin.plan.action import FORWARD
from amdp_plugin.runtime.channels import BufferPool
from amdp_plugin.runtime.device import device_of
from amdp_plugin.runtime.timeline import Timeline
from amdp_plugin.runtime.transport import Transport
from amdp_plugin.runtime.watch import PipelineStallError, Watch
from tests import devices
from tests.processes import run_ranks
from tests.runtime.pipelines import Case, assert_equals_oracle, make_executor, make_oracle, placed, result

FEEDBACK = ("compensation", "error_feedback")
RELAYED, LATEST = ("decisions", "relayed"), ("decisions", "latest")
CASES = {
    "1f1b": Case("1f1b", 2, 4),
    "paci": Case("paci", 2, 2),
    "paci, tuples": Case("paci", 4, 2, "tuples"),
    "amdp, two stages": Case("amdp", 2, 2),
    "amdp": Case("amdp", 4, 4),
    "latest": Case("paci", 2, 4, "counting", "adamw", options=(LATEST,), clipping=0.05),
    "relayed, error feedback": Case("paci", 4, 2, "tuples", "adamw", options=(RELAYED, FEEDBACK), clipping=0.05),
    "amdp, latest, error feedback": Case("amdp", 4, 8, options=(LATEST, FEEDBACK), clipping=0.05),
    "tied": Case("paci", 3, 1, "counting", "adamw", tied=((0, 2),)),
    "tied, relayed": Case("paci", 2, 1, "plain", "adamw", options=(RELAYED,), clipping=0.05, tied=((0, 1),)),
    "pipedream-2bw": Case("pipedream-2bw", 2, 2, "tuples", "adamw"),
    "pipemare": Case("pipemare", 3, 1, "recomputed", options=(("correction_decay", 0.3), ("rescale_steps", 2))),
    "xpipe": Case("xpipe", 3, 2, "tuples", "adamw"),
}


class PoisonedPool(BufferPool):
    """What is received before it has come is not a number."""

    def get(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        buffer = super().get(shape, dtype)
        return buffer.fill_(float("nan")) if dtype.is_floating_point else buffer


def train_late(rank: int, case: Case, windows: int) -> dict[str, Any]:
    executor, worker = make_executor(rank, case)
    assert executor._channels is not None
    executor._channels._pool = PoisonedPool(devices.device())
    chance = random.Random(rank)
    for _ in range(windows):
        for action in executor.open_window():
            time.sleep(chance.random() * 0.005)
            if devices.on_gpu():
                torch.cuda._sleep(chance.randrange(2_000_000))  # cycles: the device, too, is late
                if devices.over_nccl():
                    torch.cuda.synchronize()  # as a layer, or an allocator's retry, may at any action
            executor.execute(action)
        executor.close_window()
    return result(executor, worker)


@pytest.mark.parametrize("name", CASES)
def test_late_ranks_equal_the_oracle(name: str) -> None:
    case = CASES[name]
    if devices.chosen() == "nccl" and torch.cuda.device_count() < case.stages:
        pytest.skip(f"needs {case.stages} GPUs, there are {torch.cuda.device_count()}")
    found = run_ranks(case.stages, train_late, case, 5)
    oracle = make_oracle(case)
    oracle.train(placed(case.dtype), 5)
    assert_equals_oracle(found, oracle)


TEN_SECONDS = 20_000_000_000
"""Cycles, about."""


def send_while_the_device_is_held(rank: int) -> tuple[str, float]:
    device = devices.device()
    watch = Watch(rank, 1, Timeline(device=device_of(device)))
    watch.in_first_window = False
    transport = Transport(range(2), (), device, watch)
    value = torch.ones(4, device=device)
    if rank == 1:
        return "", 0
    torch.cuda._sleep(TEN_SECONDS)
    began = time.monotonic()
    try:
        transport.send(value, 1, FORWARD)
    except PipelineStallError as error:
        return str(error), time.monotonic() - began
    return "no error", time.monotonic() - began


@pytest.mark.skipif(not devices.on_gpu(), reason="needs a device that can be late: --device cuda or nccl")
def test_a_message_that_cannot_be_computed_is_an_error() -> None:
    (message, seconds), _ = run_ranks(2, send_while_the_device_is_held)
    assert "computing what is sent to rank 1 did not complete within 1 s" in message
    assert seconds < 5
