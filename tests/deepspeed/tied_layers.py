"""A model whose first and last stage share a weight, as DeepSpeed ties layers, and the same in the oracle."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from deepspeed.pipe import PipelineModule, TiedLayerSpec
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import amdp_plugin
from amdp_plugin.plan.sharing import Tied
from amdp_plugin.runtime.serial import SerialPipeline
from amdp_plugin.settings import Needs, read_schedule
from tests import devices
from tests.runtime.models import OPTIMIZERS, WIDTH, Plain, Recomputed, loss
from tests.runtime.pipelines import assert_same_random, placed

from .jobs import Job, configuration, finish, stream


class Words(nn.Module):
    """One matrix, used as it is in front and transposed at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, WIDTH * WIDTH).view(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight)


class RecomputedWords(Words):
    """In front; DeepSpeed does not recompute what runs through a ``forward_fn``."""

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


def head(words: Words, x: Tensor) -> Tensor:
    return x @ words.weight.T


class Last(nn.Module):
    """The last stage in the oracle: a middle layer and the head."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.middle, self.words = middle, Words()

    def forward(self, x: Tensor) -> Tensor:
        return head(self.words, self.middle(x))


def middles(stages: int, kind: type[Plain] = Plain) -> list[Plain]:
    torch.manual_seed(5)
    return [kind() for _ in range(stages)]


def make_tied_engine(rank: int, job: Job, dropout: bool = True) -> Any:
    """Words in front, a layer a stage, and the same words as the head."""
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(devices.backend())
    inner = middles(job.stages)
    for layer in inner:
        layer.dropout.p = 0.2 if dropout else 0.0
    layers = [TiedLayerSpec("words", Words), *inner, TiedLayerSpec("words", Words, forward_fn=head)]
    settings = {"loss_fn": loss, "partition_method": "type:Plain", **job.module}
    module = PipelineModule(layers, num_stages=job.stages, **settings)
    assert module.parts == [0, *range(2, job.stages + 1), job.stages + 2]
    optimizer = OPTIMIZERS[str(job.optimizer)](list(module.parameters()))
    engine, *_ = amdp_plugin.initialize(model=module, config=configuration(job), optimizer=optimizer)
    torch.manual_seed(100 + (engine.stage_id if job.alike else rank))
    return engine


def train_tied(rank: int, job: Job, dropout: bool = True) -> dict[str, Any]:
    engine = make_tied_engine(rank, job, dropout)
    batches = stream(engine, job)
    return finish(engine, [float(engine.train_batch(batches)) for _ in range(job.windows)])


def oracle_of_tied(
    job: Job, parts: tuple[int, ...], recomputed: bool = False, dropout: bool = True, **options: Any
) -> tuple[SerialPipeline, list[float]]:
    """The oracle, trained for so many windows at a time, with nothing in flight between them."""
    inner = middles(job.stages, Recomputed if recomputed else Plain)
    for layer in inner:
        layer.dropout.p = 0.2 if dropout else 0.0
    front = RecomputedWords() if recomputed else Words()
    stages: list[Any] = [nn.Sequential(front, inner[0]), *inner[1:-1], Last(inner[-1])]
    stages = [stage.to(devices.device(), job.dtype) for stage in stages]
    tied: Tied = ((0, job.stages - 1),)
    schedule = read_schedule(job.schedule, "here").make(job.stages, job.size, Needs(tied=tied))
    pipeline = SerialPipeline(
        stages, OPTIMIZERS[str(job.optimizer)], loss, schedule,
        seeds=[100 + stage for stage in range(job.stages)],
        tied=[[(0, stages[0][0].weight), (job.stages - 1, stages[-1].words.weight)]],
        **options,
    )  # fmt: skip
    batches = placed(job.dtype)
    return pipeline, [loss for windows in parts for loss in pipeline.train(batches, windows)]


def assert_equals_oracle(found: list[dict[str, Any]], pipeline: SerialPipeline, losses: list[float]) -> None:
    """Bit for bit, on all ranks; both ends hold one value of the words."""
    last = len(pipeline.stages) - 1
    for result in found:
        stage = result["stage"]
        module: Any = pipeline.stages[stage]
        ours = dict(result["weights"][stage])
        if stage in (0, last):
            words, rest = (module[0], module[1]) if stage == 0 else (module.words, module.middle)
            assert torch.equal(ours.pop("tied_modules.words.weight"), words.weight.cpu()), f"stage {stage}: words"
        else:
            rest = module
        for key, value, expected in zip(ours, ours.values(), rest.state_dict().values(), strict=True):
            assert torch.equal(value, expected.cpu()), f"stage {stage}: {key}"
        assert result["losses"] == losses, f"stage {stage}"
        assert_same_random(result["random"], pipeline.random_states[stage], f"stage {stage}")
        gap = max(used.backward - used.forward for (each, _), used in pipeline.used.items() if each == stage)
        assert result["gap"] == gap


def words(result: dict[str, Any]) -> Tensor:
    """Of one end."""
    return result["weights"][result["stage"]]["tied_modules.words.weight"]
