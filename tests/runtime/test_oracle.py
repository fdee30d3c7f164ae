"""Several processes compute, bit for bit, what the serial oracle computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from amdp_plugin.plan.schedules import make
from amdp_plugin.plan.scheduler import Scheduler
from amdp_plugin.runtime.channels import Channels
from amdp_plugin.runtime.executor import Executor
from amdp_plugin.runtime.serial import SerialPipeline
from amdp_plugin.runtime.stage import StageWorker
from amdp_plugin.runtime.transport import Transport
from amdp_plugin.runtime.watch import Watch
from tests.processes import run_ranks

from .models import OPTIMIZERS, build_stages, data, loss


def make_executor(rank: int, name: str, stages: int, size: int, kind: str, optimizer: str, dtype: torch.dtype, count: int | None = None) -> tuple[Executor, StageWorker]:
    schedule = make(name, stages, size)
    watch = Watch(rank, timeout_seconds=30)
    channels = Channels(Transport(range(stages), (), torch.device("cpu"), 30), watch, keep_sent=stages + 1)
    module = build_stages(kind, stages, dtype)[rank]
    last = rank == stages - 1
    feed = data(dtype, count) if rank == 0 or last else None
    worker = StageWorker(module, OPTIMIZERS[optimizer](list(module.parameters())), size, loss if last else None, feed)
    torch.manual_seed(100 + rank)
    return Executor(Scheduler(schedule), rank, worker, channels, watch), worker


def train(rank: int, windows: int, *case: Any) -> dict[str, Any]:
    executor, worker = make_executor(rank, *case)
    for _ in range(windows):
        executor.run_window()
    executor.quiesce()
    return {
        "weights": {key: value.clone() for key, value in worker.module.state_dict().items()},
        "losses": worker.losses,
        "random": torch.get_rng_state(),
        "gap": executor.largest_gap,
        "peak": executor.peak_in_flight,
    }


@pytest.mark.parametrize("kind", ["plain", "recomputed", "tuples"])
@pytest.mark.parametrize(("stages", "size"), [(2, 1), (2, 2), (2, 4), (3, 2), (3, 4), (4, 2), (4, 4), (4, 6)])
@pytest.mark.parametrize("name", ["gpipe", "1f1b", "paci"])
def test_processes_equal_the_oracle(name: str, stages: int, size: int, kind: str) -> None:
    optimizer = {2: "sgd", 3: "adamw", 4: "fused"}[stages]
    check(name, stages, size, kind, optimizer, torch.float32)


@pytest.mark.parametrize("name", ["1f1b", "paci"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "fused"])
def test_every_optimizer_and_bf16(name: str, optimizer: str) -> None:
    check(name, 3, 2, "plain", optimizer, torch.bfloat16)


def check(name: str, stages: int, size: int, kind: str, optimizer: str, dtype: torch.dtype) -> None:
    windows = 5
    found = run_ranks(stages, train, windows, name, stages, size, kind, optimizer, dtype)
    schedule = make(name, stages, size)
    seeds = [100 + stage for stage in range(stages)]
    oracle = SerialPipeline(build_stages(kind, stages, dtype), OPTIMIZERS[optimizer], loss, schedule, seeds=seeds)
    oracle.train(data(dtype), windows)
    for stage, result in enumerate(found):
        for key, value in oracle.stages[stage].state_dict().items():
            assert torch.equal(result["weights"][key], value), f"stage {stage}: {key}"
        assert torch.equal(result["random"], oracle._random[stage]), f"stage {stage}: random state"
        gaps = [used.backward - used.forward for (s, _), used in oracle.used.items() if s == stage]
        assert result["gap"] == max(gaps)
