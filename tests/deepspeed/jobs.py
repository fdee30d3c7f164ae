"""What the ranks of these tests do: real DeepSpeed engines, and the oracle of the same job."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import deepspeed
import deepspeed.comm.mori  # these three are imported with the first engine
import deepspeed.module_inject.auto_ep_config
import deepspeed.module_inject.auto_ep_layer
import deepspeed.runtime.zero.muon.muon_optimizer  # with it half of torch's compiler, which ZeRO and bf16 import
import torch
from deepspeed.comm.torch import build_shm_op
from deepspeed.pipe import PipelineModule
from torch import Tensor, nn

import amdp_plugin
import amdp_plugin.deepspeed.entry
from amdp_plugin.deepspeed.random_state import GENERATORS
from amdp_plugin.runtime.serial import SerialPipeline
from amdp_plugin.settings import read_schedule
from tests import devices
from tests.processes import run_ranks
from tests.runtime.models import KINDS, OPTIMIZERS, ROWS, Plain, Recomputed, data, loss
from tests.runtime.pipelines import assert_same_random, largest_gap, placed

# What every rank would do anew: build (the first time ever) and load an extension, try which others would build.
build_shm_op()


class Masked(nn.Module):
    """Takes a tensor or a tuple, returns a tuple: activations, and an integer mask that passes through."""

    def __init__(self, main: Callable[[], nn.Module] = Plain) -> None:
        super().__init__()
        self.main = main()

    def forward(self, value: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, mask = value if isinstance(value, tuple) else (value, (value > 0).all(-1, keepdim=True).long() + 1)
        return self.main(x) * mask, mask


class TwoPaths(nn.Module):
    """Two floating-point tensors from stage to stage, which DeepSpeed backwards one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.side = Plain(), nn.Linear(6, 6)

    def forward(self, value: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, side = value if isinstance(value, tuple) else (value, value)
        return self.main(x), torch.tanh(self.side(side)) + x


class Exact(nn.Module):
    """Without dropout, row by row: micro-batches may be put together or cut apart."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x))


LAYERS: dict[str, Callable[[], nn.Module]] = {
    **KINDS,
    "masked": Masked,
    "masked, recomputed": lambda: Masked(Recomputed),
    "two paths": TwoPaths,
    "exact": Exact,
}


@dataclass(frozen=True)
class Job:
    """One training job.

    Attributes:
        schedule: the ``schedule`` section; ``None`` for stock DeepSpeed.
        optimizer: a name in ``OPTIMIZERS``, given as an object; the config's own where it is ``None``.
        config: more of the DeepSpeed configuration.
        module: more arguments of ``PipelineModule``.
        replicas: data-parallel replicas.
        alike: whether all replicas get the same micro-batches and random numbers.
    """

    schedule: Any
    stages: int = 2
    size: int = 2
    kind: str = "plain"
    layers_per_stage: int = 1
    optimizer: str | None = "sgd"
    config: dict[str, Any] = field(default_factory=dict)
    module: dict[str, Any] = field(default_factory=dict)
    windows: int = 5
    replicas: int = 1
    alike: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def world(self) -> int:
        return self.stages * self.replicas

    @property
    def stock(self) -> Job:
        return replace(self, schedule=None)


def configuration(job: Job) -> dict[str, Any]:
    """The DeepSpeed configuration of ``job``."""
    config = {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_accumulation_steps": job.size,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        **copy.deepcopy(job.config),
    }
    config = {key: value for key, value in config.items() if value is not None}
    if job.schedule is not None:
        config["pipeline"] = {**config.get("pipeline", {}), "schedule": job.schedule}
    return config


def build_layers(job: Job) -> list[nn.Module]:
    """The same layers with the same weights wherever they are built."""
    torch.manual_seed(5)
    return [LAYERS[job.kind]().to(job.dtype) for _ in range(job.stages * job.layers_per_stage)]


def make_engine(rank: int, job: Job, **arguments: Any) -> Any:
    """The engine of ``job`` on this rank, with the rank's own random state."""
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(devices.backend())
    settings = {"loss_fn": loss, "partition_method": "uniform", "num_stages": job.stages, **job.module}
    module = PipelineModule(build_layers(job), **settings)
    parameters = list(module.parameters())
    optimizer = OPTIMIZERS[job.optimizer](parameters) if job.optimizer else None
    engine, *_ = amdp_plugin.initialize(
        model=module, config=configuration(job), optimizer=optimizer, model_parameters=parameters, **arguments
    )
    torch.manual_seed(100 + (engine.stage_id if job.alike else rank))
    return engine


def weights(engine: Any) -> dict[int, dict[str, Tensor]]:
    """A copy of this rank's stages, the engine's own first."""
    modules = {engine.stage_id: engine.module, **getattr(engine, "guests", {})}
    return {
        stage: {key: value.detach().to("cpu", copy=True) for key, value in module.state_dict().items()}
        for stage, module in modules.items()
    }


def plain(engine: Any) -> list[Tensor]:
    """What the engine's optimizer goes on from, in the dtype of the weights."""
    engine.pipeline.put_plain()
    seen = [parameter.detach().to("cpu", copy=True) for parameter in engine.module.parameters()]
    engine.pipeline.put_ahead()
    return seen


def random_states(engine: Any) -> list[tuple[Tensor, ...]]:
    """What this rank's streams of random numbers would draw next, on the CPU and the device."""
    pipeline = getattr(engine, "pipeline", None)
    return list(map(devices.drawn_from, pipeline.random_streams.states() if pipeline else [GENERATORS.get()]))


def stream(engine: Any, job: Job, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """This replica's micro-batches: number ``i`` of replica ``r`` is number ``i * replicas + r`` of all."""
    if job.alike:
        return itertools.islice(data(job.dtype), start, None)
    replica = engine.grid.get_data_parallel_rank()
    return itertools.islice(data(job.dtype), start * job.replicas + replica, None, job.replicas)


def finish(engine: Any, losses: list[float]) -> dict[str, Any]:
    """What the tests compare, with nothing in flight."""
    executor = getattr(engine, "executor", None)
    if executor is not None:
        executor.quiesce()
    return {
        "plain": plain(engine) if executor else [],
        "weights": weights(engine),  # what it computes with, also after an evaluation
        "losses": losses,
        "random": random_states(engine),
        "learning_rate": engine.get_lr(),
        "gap": executor.largest_gap if executor else 0,
        "engine": type(engine).__name__,
        "steps": engine.global_steps,
        "stage": engine.stage_id,
    }


def train(rank: int, job: Job) -> dict[str, Any]:
    """Train ``job.windows`` windows."""
    engine = make_engine(rank, job)
    batches = stream(engine, job)
    return finish(engine, [float(engine.train_batch(batches)) for _ in range(job.windows)])


def run(job: Job) -> list[dict[str, Any]]:
    """:func:`train` on all ranks of ``job``."""
    return run_ranks(job.world, train, job)


def oracle(
    job: Job,
    make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
    **options: Any,
) -> tuple[SerialPipeline, list[float]]:
    """The oracle of ``job``, trained, and the losses of its windows."""
    pipeline = make_oracle(job, make_optimizer, **options)
    return pipeline, pipeline.train(placed(job.dtype), job.windows)


def make_oracle(
    job: Job,
    make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
    **options: Any,
) -> SerialPipeline:
    """The oracle of ``job``, from its first weights."""
    layers = [layer.to(devices.device()) for layer in build_layers(job)]
    parts = [layers[start : start + job.layers_per_stage] for start in range(0, len(layers), job.layers_per_stage)]
    settings = read_schedule(job.schedule, "the oracle")
    schedule, costs = settings.make(job.stages, job.size), settings.costs(job.stages)
    seeds = [100 + stage for stage in range(job.stages)]
    chosen = make_optimizer or OPTIMIZERS[str(job.optimizer)]
    stages = [nn.Sequential(*part) for part in parts]
    return SerialPipeline(stages, chosen, loss, schedule, costs=costs, seeds=seeds, **options)


def assert_same_weights(left: dict[str, Tensor], right: dict[str, Tensor], where: str) -> None:
    """Bit for bit, in the order of the stage's tensors (their names differ between the oracle and DeepSpeed)."""
    assert len(left) == len(right)
    for key, one, other in zip(left, left.values(), right.values(), strict=True):
        other = other.cpu()
        assert torch.equal(one, other), f"{where}: {key} differs by up to {(one - other).abs().max()}"


def assert_same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Two runs agree bit for bit: weights, losses, learning rates and random states."""
    for rank, (left, right) in enumerate(zip(found, expected, strict=True)):
        assert left["losses"] == right["losses"], f"rank {rank}"
        assert left["learning_rate"] == right["learning_rate"], f"rank {rank}"
        assert left["steps"] == right["steps"], f"rank {rank}"
        assert left["weights"].keys() == right["weights"].keys()
        for stage, weights in left["weights"].items():
            assert_same_weights(weights, right["weights"][stage], f"rank {rank}, stage {stage}")
        assert_same_random(left["random"], right["random"], f"rank {rank}")


def assert_equals_oracle(found: list[dict[str, Any]], pipeline: SerialPipeline, losses: list[float] | None) -> None:
    """A run without replicas, or with replicas that are alike, agrees bit for bit with the oracle, and measured the
    gap that it had."""
    placement = pipeline.schedule.placement
    for result in found:
        rank = result["stage"]
        assert sorted(result["weights"]) == list(placement.stages[rank])
        for stage, weights in result["weights"].items():
            expected = pipeline.replica(stage, rank).state_dict()
            assert_same_weights(weights, expected, f"rank {rank}, stage {stage}")
        for value, master in zip(result["plain"], pipeline.plain(rank), strict=True):
            assert torch.equal(value, master.to(value)), f"rank {rank}: plain iterate"
        assert_same_random(result["random"], pipeline.random_states[rank], f"rank {rank}")
        assert result["gap"] == largest_gap(pipeline, rank)
        if losses is not None:
            assert result["losses"] == losses, f"rank {rank}"
