"""What the ranks of these tests do: real Megatron chunks, DDP and optimizers, and the oracle of the same job."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import megatron_on_cpu

megatron_on_cpu.install()

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from amdp_plugin.megatron import forward_backward_func
from amdp_plugin.megatron.hook import ScheduledForwardBackward
from amdp_plugin.megatron.stage_view import StageGroup, acting_as
from amdp_plugin.runtime.serial import SerialPipeline
from amdp_plugin.settings import read_schedule
from tests.processes import run_ranks

SEQUENCE, VOCABULARY, ROWS = 8, 32, 2
ADAM = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8}
WEIGHT_DECAY = 0.1


@dataclass(frozen=True)
class Job:
    """One training job.

    Args:
        schedule: as users write it; ``None`` for stock Megatron.
        pipeline: stages.
        micro_batches: of a window.
        tensor, data: ranks of a stage.
        clip: limit of the norm of gradients; 0 for none.
        model: more of ``TransformerConfig``.
        optimizer: more of ``OptimizerConfig``.
        ddp: more of ``DistributedDataParallelConfig``.
    """

    schedule: Any
    pipeline: int = 2
    micro_batches: int = 4
    tensor: int = 1
    data: int = 1
    bf16: bool = False
    tied: bool = False
    clip: float = 0.0
    model: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    ddp: dict[str, Any] = field(default_factory=dict)

    @property
    def world(self) -> int:
        return self.pipeline * self.tensor * self.data

    def config(self) -> TransformerConfig:
        dtype = torch.bfloat16 if self.bf16 else torch.float32
        values: dict[str, Any] = dict(
            num_layers=self.pipeline,
            hidden_size=16,
            num_attention_heads=2,
            use_cpu_initialization=True,
            attention_dropout=0.0,
            hidden_dropout=0.0,
            pipeline_model_parallel_size=self.pipeline,
            tensor_model_parallel_size=self.tensor,
            pipeline_dtype=dtype,
            params_dtype=dtype,
            bf16=self.bf16,
            bias_dropout_fusion=False,
            bias_activation_fusion=False,
            masked_softmax_fusion=False,
            persist_layer_norm=False,
            gradient_accumulation_fusion=False,
            deallocate_pipeline_outputs=True,
        )
        return TransformerConfig(**{**values, **self.model})

    def provider(self, pre_process: bool, post_process: bool, vp_stage: Any = None, config: Any = None,
                 pg_collection: Any = None) -> GPTModel:  # fmt: skip
        """One stage, whose weights depend on the stage alone."""
        stage = parallel_state.get_pipeline_model_parallel_rank()
        torch.manual_seed(5 if self.tied and post_process else 5 + stage)
        return GPTModel(
            config or self.config(),
            get_gpt_layer_local_spec(),
            vocab_size=VOCABULARY,
            max_sequence_length=SEQUENCE,
            pre_process=pre_process,
            post_process=post_process,
            share_embeddings_and_output_weights=self.tied,
            pg_collection=pg_collection,
        )

    def data_from(self, first: int = 0, replica: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """``(tokens, labels)``, int64 [ROWS, SEQUENCE]; micro-batch ``i`` of a replica depends on those two alone."""
        index = first
        while True:
            generator = torch.Generator().manual_seed(1000 + index * self.data + replica)
            tokens = torch.randint(VOCABULARY, (ROWS, SEQUENCE + 1), generator=generator)
            yield tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
            index += 1


MASK = torch.triu(torch.ones(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool), 1)
POSITIONS = torch.arange(SEQUENCE).expand(ROWS, -1)


def forward_step(iterator: Any, model: Any) -> tuple[Tensor, Any]:
    """A job's own: only the first and the last stage read."""
    first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
    tokens, labels = next(iterator) if first or last else (None, None)
    output = model(tokens, POSITIONS, MASK, labels=labels if last else None)
    return output, report


def report(output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    loss = output.float().mean()
    return loss, {"lm loss": loss.detach().clone()}


class Trainer:
    """A training loop of one's own on megatron-core, on one rank."""

    def __init__(self, rank: int, job: Job, iteration: int = 0) -> None:
        self.job, self.iteration = job, iteration
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=job.tensor, pipeline_model_parallel_size=job.pipeline
        )
        self.stage = parallel_state.get_pipeline_model_parallel_rank()
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        config = job.config()
        module: Any = job.provider(self.stage == 0, self.stage == job.pipeline - 1, config=config)
        wrapped = Float16Module(config, module) if job.bf16 else module
        ddp = DistributedDataParallelConfig(**{"grad_reduce_in_fp32": job.bf16, **job.ddp})
        self.bare, self.chunk = module, DistributedDataParallel(config, ddp, wrapped)
        settings: dict[str, Any] = dict(
            optimizer="adam", lr=ADAM["lr"], adam_beta1=0.9, adam_beta2=0.95, weight_decay=WEIGHT_DECAY,
            clip_grad=job.clip, bf16=job.bf16, params_dtype=config.params_dtype,
        )  # fmt: skip
        self.optimizer = get_megatron_optimizer(OptimizerConfig(**{**settings, **job.optimizer}), [self.chunk])
        config.finalize_model_grads_func = finalize_model_grads
        config.grad_scale_func = self.optimizer.scale_loss
        if ddp.overlap_grad_reduce:
            config.no_sync_func = self.chunk.no_sync
        self.function: Any = get_forward_backward_func()
        self.replica = parallel_state.get_data_parallel_rank()
        self.losses: list[list[float]] = []
        torch.manual_seed(100 + self.stage)
        if job.schedule is not None:
            self.function = forward_backward_func(job.schedule)
            self.function.attach([self.chunk], self.optimizer, job.provider, iteration=iteration)
        self.data = job.data_from(iteration * job.micro_batches, self.replica)

    @property
    def hook(self) -> ScheduledForwardBackward:
        hook: ScheduledForwardBackward = self.function
        return hook

    def train(self, iterations: int) -> None:
        for _ in range(iterations):
            self.chunk.zero_grad_buffer()
            self.optimizer.zero_grad()
            losses = self.run(self.data)
            success, norm, _ = self.optimizer.step()
            assert success
            self.norm = norm
            self.iteration += 1
            if self.stage == self.job.pipeline - 1:
                self.losses.append([float(each["lm loss"]) for each in losses])
            else:
                assert losses == []

    def run(self, data: Iterator[Any], **more: Any) -> Any:
        """One call of the schedule."""
        return self.function(
            forward_step_func=forward_step, data_iterator=data, model=[self.chunk],
            num_microbatches=self.job.micro_batches, seq_length=SEQUENCE, micro_batch_size=ROWS, decoder_seq_length=None,
            **{"forward_only": False, **more},
        )  # fmt: skip

    def result(self) -> dict[str, Any]:
        """Everything that another run of the same job must equal."""
        ours = self.job.schedule is not None
        if ours:
            self.hook.quiesce()
        guests = {stage: _copies(guest) for stage, guest in (self.hook.guests if ours else {}).items()}
        return {
            "weights": {self.stage: _copies(self.bare), **guests},
            "losses": self.losses,
            "random": self.hook.random_states() if ours else None,
            "cpu": torch.get_rng_state(),
            "gap": self.hook.executor.largest_gap if ours else 0,
            "norm": self.norm,
        }


def train(rank: int, job: Job, iterations: int = 4) -> dict[str, Any]:
    """A rank's whole run."""
    trainer = Trainer(rank, job)
    trainer.train(iterations)
    return trainer.result()


def _copies(module: nn.Module) -> list[Tensor]:
    """Parameters of a module, cast or not, in their order."""
    return [parameter.detach().clone() for parameter in module.parameters()]


# The oracle


class OracleStage(nn.Module):
    """A bare stage as the serial pipeline calls it; the last one hands itself and its input to the loss."""

    def __init__(self, job: Job, stage: int) -> None:
        super().__init__()
        self.job, self.stage, self.last = job, stage, job.pipeline - 1
        groups = copy.copy(ProcessGroupCollection.use_mpu_process_groups())
        groups.pp, groups.embd, groups.pos_embd = StageGroup(stage, job.pipeline), None, None
        with acting_as(stage):
            module: Any = job.provider(stage == 0, stage == self.last, config=job.config(), pg_collection=groups)
        self.module = module.bfloat16() if job.bf16 else module

    def __deepcopy__(self, memo: Any) -> OracleStage:
        """Megatron's modules hold process groups, which cannot be copied: built anew, with the same weights."""
        return OracleStage(self.job, self.stage)

    def forward(self, value: Tensor) -> Any:
        return (self, value) if self.stage == self.last else self.run(value, None)

    def run(self, value: Tensor, labels: Tensor | None) -> Tensor:
        with acting_as(self.stage):
            self.module.set_input_tensor([None if self.stage == 0 else value])
            output: Tensor = self.module(value if self.stage == 0 else None, POSITIONS, MASK, labels=labels)
            return output


def oracle_loss(output: tuple[OracleStage, Tensor], labels: Tensor) -> Tensor:
    stage, value = output
    return stage.run(value, labels).float().mean()


def make_adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """As Megatron's without a scheduler, which would take the decay from biases and norms."""
    return torch.optim.AdamW(parameters, weight_decay=WEIGHT_DECAY, **ADAM)


def run_oracle(rank: int, job: Job, iterations: int, before_step: Any) -> dict[str, Any]:
    """The same job in one process: weights of every replica, losses of every window, random states, versions."""
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    settings = read_schedule(job.schedule, "the test")
    schedule = settings.make(job.pipeline, job.micro_batches, meet=job.clip > 0 or job.tied)
    pipeline = SerialPipeline(
        [OracleStage(job, stage) for stage in range(job.pipeline)],
        make_adam,
        oracle_loss,
        schedule,
        seeds=[100 + stage for stage in range(job.pipeline)],
        master_dtype=torch.float32 if job.bf16 else None,
        before_step=before_step,
    )
    losses = pipeline.train(job.data_from(), iterations)
    placement = schedule.placement
    return {
        "weights": [
            {stage: _copies(pipeline.replica(stage, rank)) for stage in placement.stages[rank]}
            for rank in range(schedule.num_ranks)
        ],
        "losses": losses,
        "random": pipeline.random_states,
        "gap": max(used.backward - used.forward for used in pipeline.used.values()),
    }


def nothing(parameters: Any) -> None:
    """No clipping."""


def oracle(job: Job, iterations: int = 4, before_step: Any = nothing) -> dict[str, Any]:
    """:func:`run_oracle` in a process of its own: Megatron's parallel state is one a process."""
    result: dict[str, Any] = run_ranks(1, run_oracle, job, iterations, before_step)[0]
    return result
