"""A rank's executor on plain PyTorch stages, as the tests of the runtime use it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from amdp_plugin.plan.scheduler import Scheduler
from amdp_plugin.plan.schedules import make
from amdp_plugin.runtime.channels import Channels
from amdp_plugin.runtime.executor import Executor
from amdp_plugin.runtime.serial import SerialPipeline
from amdp_plugin.runtime.stage import StageWorker
from amdp_plugin.runtime.transport import Transport
from amdp_plugin.runtime.watch import Watch

from .models import OPTIMIZERS, build_stages, data, loss


class Case(NamedTuple):
    """One training job: the same on every rank and in the oracle."""

    schedule: str
    stages: int
    micro_batches: int
    kind: str = "plain"
    optimizer: str = "sgd"
    dtype: torch.dtype = torch.float32
    options: tuple[tuple[str, Any], ...] = ()

    def make(self) -> Any:
        return make(self.schedule, self.stages, self.micro_batches, **dict(self.options))


def make_channels(rank: int, stages: int, timeout_seconds: float = 30, **chosen: Any) -> tuple[Channels, Watch]:
    watch = Watch(rank, timeout_seconds)
    transport = Transport(range(stages), (), torch.device("cpu"), timeout_seconds)
    return Channels(transport, watch, keep_sent=stages + 1, **chosen), watch


def make_executor(
    rank: int, case: Case, feed: Iterator[Any] | None = None, timeout_seconds: float = 30
) -> tuple[Executor, StageWorker]:
    """Rank ``rank`` of ``case``; ``feed`` are its micro-batches, endless by default."""
    channels, watch = make_channels(rank, case.stages, timeout_seconds)
    module = build_stages(case.kind, case.stages, case.dtype)[rank]
    first, last = rank == 0, rank == case.stages - 1
    worker = StageWorker(
        module,
        OPTIMIZERS[case.optimizer](list(module.parameters())),
        case.micro_batches,
        loss if last else None,
        (data(case.dtype) if feed is None else feed) if first or last else None,
    )
    torch.manual_seed(100 + rank)
    return Executor(Scheduler(case.make()), rank, worker, channels, watch), worker


def make_oracle(case: Case) -> SerialPipeline:
    """The same job in one process."""
    return SerialPipeline(
        build_stages(case.kind, case.stages, case.dtype),
        OPTIMIZERS[case.optimizer],
        loss,
        case.make(),
        seeds=[100 + stage for stage in range(case.stages)],
    )


def result(executor: Executor, worker: StageWorker) -> dict[str, Any]:
    """What a rank ends with, for :func:`assert_equals_oracle`."""
    executor.quiesce()
    return {
        "weights": {key: value.clone() for key, value in worker.module.state_dict().items()},
        "random": torch.get_rng_state(),
        "losses": dict(worker.losses),
        "gap": executor.largest_gap,
        "peak": executor.peak_in_flight,
    }


def assert_equals_oracle(found: list[dict[str, Any]], oracle: SerialPipeline) -> None:
    """Weights, random state and measured gap of every stage, bit for bit."""
    for stage, end in enumerate(found):
        for key, value in oracle.stages[stage].state_dict().items():
            assert torch.equal(end["weights"][key], value), f"stage {stage}: {key}"
        assert torch.equal(end["random"], oracle.random_states[stage]), f"stage {stage}: random state"
        gaps = [used.backward - used.forward for (s, _), used in oracle.used.items() if s == stage]
        assert end["gap"] == max(gaps), f"stage {stage}: gap"
