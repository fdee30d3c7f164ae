"""The serial oracle of a job on Megatron's chunks: the same stages, one process, no executor and no messages."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from amdp_plugin.megatron.stage_view import StageGroup, acting_as, bare
from amdp_plugin.megatron.tied import tied_embedding
from amdp_plugin.runtime.serial import SerialPipeline
from amdp_plugin.settings import Needs, read_schedule
from tests.devices import drawn_from
from tests.processes import run_ranks
from tests.runtime.pipelines import assert_same_random, largest_gap

from .jobs import Job, masked_report, report, run_model
from .training import assert_same_weights, copies, initialize

Phases = Sequence[tuple[int, int]]
"""(iterations, micro-batches of each)."""


class OracleStage(nn.Module):
    """A bare stage as the serial pipeline calls it; the last one hands itself and its input to the loss."""

    def __init__(self, job: Job, stage: int) -> None:
        super().__init__()
        self.job, self.stage, self.last = job, stage, job.pipeline - 1
        groups = copy.copy(ProcessGroupCollection.use_mpu_process_groups())
        groups.pp, groups.embd, groups.pos_embd = StageGroup(stage, job.pipeline), None, None
        with acting_as(stage):
            module: Any = job.provider(stage == 0, stage == self.last, config=job.config(), pg_collection=groups)
        self.module = module.bfloat16() if job.bf16 else module.half() if job.fp16 else module

    def __deepcopy__(self, memo: Any) -> OracleStage:
        """Megatron's modules hold process groups, which cannot be copied."""
        built = type(self)(self.job, self.stage)
        built.load_state_dict(self.state_dict())
        return built

    def forward(self, value: Tensor) -> Any:
        return (self, value) if self.stage == self.last else self.run(value, None)

    def run(self, value: Tensor, labels: Tensor | None) -> Tensor:
        with acting_as(self.stage):
            self.module.set_input_tensor([None if self.stage == 0 else value])
            return run_model(self.module, value if self.stage == 0 else None, labels)


def oracle_loss(output: tuple[OracleStage, Tensor], labels: Tensor) -> Tensor:
    stage, value = output
    losses = stage.run(value, labels)
    if stage.job.masked:
        total, number, _ = masked_report(labels, losses)
        return total / number
    return report(losses)[0]


def make_adam(job: Job, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """As Megatron's, without the scheduler that would take the decay from biases and norms."""
    chosen = job.optimizer_config()
    betas = chosen.adam_beta1, chosen.adam_beta2
    return torch.optim.AdamW(
        parameters, lr=chosen.lr, betas=betas, eps=chosen.adam_eps, weight_decay=chosen.weight_decay
    )


def run_oracle(
    rank: int, job: Job, phases: Phases, before_step: Any, loss: Any = oracle_loss, **more: Any
) -> dict[str, Any]:
    initialize(replace(job, pipeline=1, tensor=1))
    settings = read_schedule(job.schedule, "the test")
    needs = Needs(norm=job.clip > 0, exact=job.fp16, tied=tied_embedding(job.pipeline, job.tied))
    schedule = settings.make(job.pipeline, job.micro_batches, needs)
    stages = [OracleStage(job, stage) for stage in range(job.pipeline)]
    tied = []
    if job.tied:  # Megatron lets the last stage take it from the first when it builds them
        words, output = bare(stages[0]).embedding.word_embeddings.weight, bare(stages[-1]).output_layer.weight
        output.data.copy_(words)
        tied = [[(0, words), (job.pipeline - 1, output)]] if schedule.tied else []
    pipeline = SerialPipeline(
        stages,
        partial(make_adam, job),
        loss,
        schedule,
        costs=settings.costs(job.pipeline),
        seeds=[100 + stage for stage in range(job.pipeline)],
        master_dtype=torch.float32 if job.bf16 or job.fp16 else None,
        before_step=before_step,
        tied=tied,
        **{"measure": squares, "decide": partial(clip_by, job.clip), **more},
    )
    batches, losses = all_replicas(job), []
    for iterations, size in phases:
        if size != pipeline.schedule.micro_batches:
            pipeline.schedule = settings.make(job.pipeline, size, needs)
            pipeline.used.clear()
        first = pipeline.versions[0] * size
        pipeline.train(batches, iterations)
        own = [float(pipeline._losses[number]) for number in range(first, first + iterations * size)]
        losses += [own[start : start + size] for start in range(0, len(own), size)]
    placement, ranks = pipeline.schedule.placement, range(schedule.num_ranks)
    return {
        "weights": [
            {stage: copies(pipeline.replica(stage, rank)) for stage in placement.stages[rank]} for rank in ranks
        ],
        "plain": [[value.cpu() for value in pipeline.plain(stage)] for stage in range(job.pipeline)],
        "losses": losses,
        "random": pipeline.random_states,
        "gaps": [largest_gap(pipeline, rank) for rank in ranks],
    }


def squares(gradients: list[Tensor | None]) -> float:
    """The sum that stages tell each other."""
    return float(torch.stack([gradient.norm() for gradient in gradients if gradient is not None]).norm().square())


def clip_by(limit: float, parameters: list[nn.Parameter], total: float) -> None:
    """By the sum of squares that is known of all stages."""
    if limit:
        for parameter in parameters:
            parameter.grad.mul_(min(1.0, limit / (total**0.5 + 1e-6)))


def all_replicas(job: Job) -> Iterator[tuple[Tensor, Tensor]]:
    """Micro-batches with the rows of all data-parallel replicas, in one process."""
    if job.alike:
        yield from job.batches()
    for parts in zip(*(job.batches(replica=replica) for replica in range(job.data)), strict=True):
        tokens, labels = zip(*parts, strict=True)
        yield torch.cat(tokens), torch.cat(labels)


def nothing(parameters: Any) -> None:
    """No clipping."""


def oracle(job: Job, iterations: int = 4, before_step: Any = nothing, phases: Phases = ()) -> dict[str, Any]:
    """What the ranks of ``job`` must end with: ``weights`` of every stage on every pipeline rank, ``losses`` of every
    window's micro-batches, ``random`` states of every rank's directions, measured ``gaps`` of every rank.

    In a process of its own, since Megatron's parallel state is one a process.

    Args:
        phases: instead of ``iterations``: several parts, with nothing in flight between them, of windows of one size
            each; ``gaps`` are those with the last size.
    """
    chosen = phases or [(iterations, job.micro_batches)]
    result: dict[str, Any] = run_ranks(1, run_oracle, job, chosen, before_step)[0]
    return result


def assert_equals_oracle(found: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    """Bit for bit, home and guests of every rank, and its gap. Ranks of one stage may be several, if alike."""
    for rank, result in enumerate(found):
        stage = result["stage"]
        held = {**result["weights"], **result["guests"]}
        assert held.keys() == expected["weights"][stage].keys()
        for each, weights in held.items():
            assert_same_weights(weights, expected["weights"][stage][each], f"rank {rank}, stage {each}")
        own = result["plain"][: len(expected["plain"][stage])]  # the last stage's tied output layer is not its own
        plain = [master.to(value) for value, master in zip(own, expected["plain"][stage], strict=True)]
        assert_same_weights(own, plain, f"rank {rank}, plain iterate")
        assert_same_random(list(map(drawn_from, result["random"])), expected["random"][stage], f"rank {rank}")
        assert result["gap"] == expected["gaps"][stage], f"rank {rank}"
        assert result["losses"] == (expected["losses"] if stage == len(expected["weights"]) - 1 else [])
