"""How the ranks of these tests train: Megatron's DDP and optimizers in a loop of their own, and what that ends with."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from torch import Tensor, nn

from amdp_plugin.megatron import forward_backward_func
from amdp_plugin.megatron.hook import ScheduledForwardBackward
from amdp_plugin.megatron.random_state import GENERATORS
from tests.devices import drawn_from
from tests.processes import run_ranks

from .jobs import ROWS, SEQUENCE, Job, forward_step, masked_forward_step

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import megatron_on_cpu


def initialize(job: Job) -> None:
    """Megatron's process groups and seeds on this rank, a process that then knows Megatron alone."""
    megatron_on_cpu.install()
    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=job.tensor, pipeline_model_parallel_size=job.pipeline
        )
    tensor_parallel.model_parallel_cuda_manual_seed(1)


Beside = tuple[list[Any], list[Tensor] | None, list[Tensor] | None]
"""What a rank's checkpoint holds beside model and optimizer: its random states, what its stage computes with,
and running means of its updates."""


class Trainer:
    """A training loop of one's own on megatron-core, on one rank, with nothing in it that knows of schedules but
    ``attach``."""

    def __init__(self, rank: int, job: Job, **attached: Any) -> None:
        """``attached`` goes into ``attach``."""
        self.job, self.iteration = job, 0
        initialize(job)
        self.stage = parallel_state.get_pipeline_model_parallel_rank()
        self.is_last = self.stage == job.pipeline - 1
        config = job.config()
        self.config = config
        self.bare: Any = job.provider(self.stage == 0, self.is_last, config=config)
        wrapped = Float16Module(config, self.bare) if config.bf16 or config.fp16 else self.bare
        ddp = DistributedDataParallelConfig(**{"grad_reduce_in_fp32": job.bf16, **job.ddp})
        self.chunk = DistributedDataParallel(config, ddp, wrapped)
        self.optimizer = get_megatron_optimizer(job.optimizer_config(), [self.chunk])
        config.finalize_model_grads_func = finalize_model_grads
        config.grad_scale_func = self.optimizer.scale_loss
        if ddp.overlap_grad_reduce:
            config.no_sync_func = self.chunk.no_sync
        self.function: Any = get_forward_backward_func()
        self.losses: list[list[Any]] = []
        self.norms: list[float | None] = []
        torch.manual_seed(100 + self.stage)
        random.seed(100 + self.stage)
        if job.schedule is not None:
            self.attach(job.schedule, **attached)
        self.read_from(0)

    def attach(self, schedule: Any, **more: Any) -> None:
        """Train under ``schedule`` from now on."""
        self.function = forward_backward_func(schedule)
        chosen = {"model_provider": self.job.provider, "iteration": self.iteration, **more}
        self.function.attach([self.chunk], self.optimizer, **chosen)

    @property
    def is_scheduled(self) -> bool:
        """Whether the hook trains, and not stock."""
        return isinstance(self.function, ScheduledForwardBackward)

    @property
    def hook(self) -> ScheduledForwardBackward:
        hook: ScheduledForwardBackward = self.function
        return hook

    def random_states(self) -> list[Any]:
        """Of every direction on this rank."""
        return self.hook.random_states() if self.is_scheduled else [GENERATORS.get()]

    def beside(self) -> Beside:
        """Of this rank, with nothing in flight."""
        hook = self.hook if self.is_scheduled else None
        return self.random_states(), hook.ahead() if hook else None, hook.means() if hook else None

    def go_on_from(
        self, random_states: list[Any], ahead: list[Tensor] | None, means: list[Tensor] | None
    ) -> None:
        """A checkpoint of ``iteration`` has been loaded: losses and norms are those from there."""
        self.losses, self.norms = [], []
        self.read_from(self.iteration * self.job.micro_batches)
        if self.is_scheduled:
            self.hook.restart(self.iteration, random_states, ahead, means)
        else:
            GENERATORS.put(random_states[0])

    def read_from(self, micro_batch: int) -> None:
        """Let this replica's data begin there."""
        self.data = self.job.batches(micro_batch, parallel_state.get_data_parallel_rank())

    def train(self, iterations: int, **more: Any) -> None:
        """``more`` goes into the calls of the schedule."""
        for _ in range(iterations):
            self.chunk.zero_grad_buffer()
            self.optimizer.zero_grad()
            reported = self.run(**more)
            success, norm, _ = self.optimizer.step()
            self.norms.append(norm if success else None)
            self.iteration += 1
            assert self.is_last or reported == []
            if self.is_last:
                self.losses.append([each["lm loss"].tolist() for each in reported])

    def run(self, **more: Any) -> Any:
        """One call of the schedule."""
        arguments = dict(
            forward_step_func=masked_forward_step if self.job.masked else forward_step,
            data_iterator=self.data, model=[self.chunk],
            num_microbatches=self.job.micro_batches, seq_length=SEQUENCE, micro_batch_size=ROWS,
            decoder_seq_length=None, forward_only=False,
        )  # fmt: skip
        return self.function(**{**arguments, **more})

    def evaluate(self, first: int, **more: Any) -> list[float]:
        """The losses of the micro-batches of one window from ``first`` on, in evaluation mode."""
        self.chunk.eval()
        data = self.job.batches(first, parallel_state.get_data_parallel_rank())
        with torch.no_grad():
            reported = self.run(data_iterator=data, forward_only=True, **more)
        self.chunk.train()
        return [each["lm loss"].tolist() for each in reported]

    def result(self) -> dict[str, Any]:
        """Everything that another run of the same job must equal, with nothing in flight."""
        hook = self.hook if self.is_scheduled else None
        if hook is not None:
            hook.quiesce()
        plain = copies(self.bare)
        if hook is not None:
            hook.pipeline.put_ahead()
        return {
            "stage": self.stage,
            "replica": parallel_state.get_data_parallel_rank(),
            "plain": plain,
            "weights": {self.stage: copies(self.bare)},
            "guests": {stage: copies(guest) for stage, guest in (hook.guests if hook else {}).items()},
            "shards": [getattr(each, "partition_dim", -1) for each in self.bare.parameters()],
            "losses": self.losses,
            "norms": self.norms,
            "random": self.random_states(),
            "gap": hook.executor.largest_gap if hook else 0,
        }


def train(rank: int, job: Job, iterations: int = 4) -> dict[str, Any]:
    """A rank's whole run."""
    trainer = Trainer(rank, job)
    trainer.train(iterations)
    return trainer.result()


def run(job: Job, iterations: int = 4) -> list[dict[str, Any]]:
    """:func:`train` on all ranks of ``job``."""
    return run_ranks(job.world, train, job, iterations)


def copies(module: nn.Module) -> list[Tensor]:
    """Parameters of a module, cast or not, in their order."""
    return [parameter.detach().to("cpu", copy=True) for parameter in module.parameters()]


def assert_same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Two runs agree bit for bit: weights of each rank's own stage, losses, norms of gradients, random states."""
    for rank, (left, right) in enumerate(zip(found, expected, strict=True)):
        assert left["losses"] == right["losses"], f"rank {rank}"
        assert left["norms"] == right["norms"], f"rank {rank}"
        assert left["stage"] == right["stage"]
        stage = left["stage"]
        assert_same_weights(left["weights"][stage], right["weights"][stage], f"rank {rank}")
        assert len(left["random"]) == len(right["random"])
        for direction, (state, other) in enumerate(zip(left["random"], right["random"], strict=True)):
            assert same_state(state, other), f"rank {rank}, direction {direction}: random state"


def assert_same_weights(left: list[Tensor], right: list[Tensor], where: str) -> None:
    assert len(left) == len(right)
    for number, (one, other) in enumerate(zip(left, right, strict=True)):
        assert torch.equal(one, other), f"{where}: parameter {number} differs by up to {(one - other).abs().max()}"


def same_state(left: Any, right: Any) -> bool:
    """Of all generators: torch's, the tracker's of tensor-parallel regions, Python's."""
    return (
        all(map(torch.equal, drawn_from(left), drawn_from(right)))
        and left["tracker"].keys() == right["tracker"].keys()
        and all(torch.equal(state, right["tracker"][name]) for name, state in left["tracker"].items())
        and left["python"] == right["python"]
    )
