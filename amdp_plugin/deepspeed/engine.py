"""A DeepSpeed ``PipelineEngine`` that runs the program of a schedule."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.utils import clip_grad_norm_

from ..plan.action import Action
from ..plan.schedule import Schedule
from ..runtime.agreement import Held, bound_collectives, clipping_line, memory_table
from ..runtime.executor import Executor
from ..runtime.pipeline import Pipeline, Site
from ..runtime.replica import Guest
from ..settings import check_loss_scale
from .checkpoint import AHEAD, MEANS, RANDOM_STATE, load_beside, save_beside
from .config import read_settings
from .feedback import error_feedback
from .guests import build_replicas, sum_dtype
from .instructions import RunAction, WindowSchedule
from .losses import summed, together, warn_of_broken
from .meeting import StageGrid, clip_by_whole_norm, decided_by, groups_of, make_stage_local, needs
from .random_state import GENERATORS
from .sums import stage_squares
from .tied_state import EngineStates
from .worker import EngineWorker

SHAPES_HINT = (
    "build the PipelineModule with dynamic_shape=True (or, under a schedule that flushes, call "
    "reset_activation_shape() between two batches)"
)


class ScheduledPipelineEngine(PipelineEngine):
    """Trains a ``PipelineModule`` under the schedule that ``"pipeline": {"schedule": ...}`` names.

    ``train_batch``, ``eval_batch``, ``save_checkpoint`` and ``load_checkpoint`` are DeepSpeed's. One call of
    ``train_batch`` runs one window of this rank's program: after ``k`` calls every stage has had ``k``
    updates, from the micro-batches that stock 1F1B would have used, but what a free-running schedule has
    forwarded ahead stays in flight between two calls.

    Where a schedule runs in several directions, this rank holds guests beside its own stage: replicas of stages
    whose optimizer lives on another rank.

    Attributes:
        pipeline: what runs the program on this rank.
        guests: the replicas here of other ranks' stages, by stage.
    """

    pipeline: Pipeline
    guests: dict[int, PipelineModule]
    # DeepSpeed's, which has no types
    pipe_buffers: dict[str, list[Any]]
    num_pipe_buffers: int
    is_pipe_parallel: bool
    total_loss: Any
    total_additional_losses: Any
    # Read and set while DeepSpeed's own __init__ runs
    _acting: int | None = None
    _loader: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        settings = read_settings(self._config.pipeline)
        assert settings is not None, "entry.initialize selects this engine by the key"
        self.settings = settings
        # Stages exchange whole activations; DeepSpeed would cut them over tensor-parallel ranks by default.
        self.is_pipe_partitioned = self.is_grad_partitioned = False
        self.pipe_buffers["losses"] = []
        self._window: list[Action] = []
        self._reported: dict[tuple[int, int], torch.Tensor] = {}
        self._evaluating = False
        self._loading: Any = None
        costs = settings.costs(self.num_stages)
        self.pipeline = Pipeline(self._make_schedule(self.micro_batches), costs, self._site(), self._pull, GENERATORS)
        self.settings = settings.kept(self.pipeline.schedule)
        bound_collectives(groups_of(self.grid), settings.timeout_seconds)
        self.guests, replicas, held = build_replicas(self, self.pipeline.schedule)
        self.pipeline.hold(replicas, held, error_feedback(self, settings), EngineStates(self))
        if self._loader is not None:
            super().set_dataloader(self._loader)  # again: now it is known who reads
        self._start()
        self._norm_grid = self.mpu if self.pipeline.schedule.updates_meet else StageGrid(self.mpu)
        if self._norm_grid is not self.mpu:
            make_stage_local(self.optimizer, self._norm_grid)

    @property
    def executor(self) -> Executor:
        """Runs the program; has ``largest_gap``, ``peak_in_flight`` and the ``timeline``."""
        return self.pipeline.executor

    # What users call

    def train_batch(self, data_iter: Iterator[Any] | None = None) -> Any:
        """One window: ``gradient_accumulation_steps`` micro-batches are backwarded and the stage updated.

        Returns:
            The mean loss of the window's micro-batches, averaged over data-parallel replicas.

        Raises:
            StopIteration: when the data ends before the window does. It is raised on every rank, at the same
                window, with every stage at the same version; the micro-batches of the incomplete window are
                kept, and come first when there is a new iterator.
            PipelineStallError: when a peer is gone or late.
        """
        if data_iter is not None:
            self.set_dataiterator(data_iter)
        if not torch.is_grad_enabled():
            raise RuntimeError("train_batch() requires gradients enabled. Use eval_batch() instead.")
        self._window = self.pipeline.open_window()
        with self._acting_as(self.stage_id):
            loss = super().train_batch()
        self.pipeline.close_window()
        self._write_events()
        return loss

    def eval_batch(self, data_iter: Iterator[Any], *args: Any, **kwargs: Any) -> Any:
        """DeepSpeed's ``eval_batch``, on the weights after the latest update; with error feedback on the plain iterate,
        which stays in the weights until the next window. Training goes on afterwards as if it had not been called:
        what is in flight stays, and it draws no random numbers. Where decisions are relayed, stages would be at
        different updates: there it is cancelled first, as for a checkpoint."""
        with self.pipeline.watch.guard("evaluation", None):
            self.pipeline.settle()
            with self._aside(), self._acting_as(self.stage_id):
                return super().eval_batch(data_iter, *args, **kwargs)

    def save_checkpoint(self, save_dir: str, tag: Any = None, *args: Any, **kwargs: Any) -> Any:
        """DeepSpeed's checkpoint, which stock 1F1B loads too, with the random state of every rank beside it, and, with
        error feedback, what every stage computed with: the checkpoint itself holds the plain iterate. Likewise the
        running means of updates that a schedule may keep.

        What is in flight is cancelled first and forwarded anew afterwards, so that a run resumed from the
        checkpoint equals this one as it goes on, bit for bit.
        """
        self.pipeline.rest()
        saved = super().save_checkpoint(save_dir, tag, *args, **kwargs)
        tag = f"global_step{self.global_steps}" if tag is None else tag
        directory = Path(save_dir) / str(tag)
        save_beside(RANDOM_STATE, self.pipeline.random_streams.states(), directory, self.global_rank)
        ahead = self.pipeline.feedback.ahead()
        if ahead is not None and self._first_replica() == self.global_rank:
            save_beside(AHEAD, ahead, directory, self.global_rank)
        if (means := self.pipeline.extrapolation.means()) is not None:
            save_beside(MEANS, means, directory, self.global_rank)
        return saved

    def load_checkpoint(self, load_dir: str, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """DeepSpeed's ``load_checkpoint``. Data that was read ahead is dropped: give an iterator that begins where
        the checkpoint stands. Where there is none, what this engine holds stays as it is."""
        self.executor.quiesce()
        path, state = super().load_checkpoint(load_dir, *args, **kwargs)
        if path is None:
            return path, state
        directory = Path(path).parent
        states = load_beside(RANDOM_STATE, directory, self.global_rank)
        ahead = load_beside(AHEAD, directory, self._first_replica())
        means = load_beside(MEANS, directory, self.global_rank)
        self.pipeline.restart(self.global_steps, states, ahead, means)
        return path, state

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """As in DeepSpeed. The window gets another size, so the pipeline starts anew with the new program."""
        size, rest = divmod(train_batch_size, self.train_micro_batch_size_per_gpu() * self.dp_world_size)
        # Refused, where it makes no window, before anything changes; what does not divide DeepSpeed refuses.
        schedule = self._make_schedule(self.micro_batches if rest else size)
        self.executor.quiesce()
        before = self.global_steps * self.micro_batches
        super().set_train_batch_size(train_batch_size)
        self.pipeline.feed.renumber(before, self.global_steps * self.micro_batches)
        self.pipeline.replan(schedule)
        self._start()

    def reset_activation_shape(self) -> None:
        """As in DeepSpeed, on all ranks, when the shapes of the activations are going to change."""
        super().reset_activation_shape()
        self.executor.quiesce()
        if self.pipeline.channels is not None:
            self.pipeline.channels.forget_shapes()

    def is_first_stage(self) -> bool:
        """Whether the first stage is here, in any direction: then this rank needs data."""
        return 0 in self._stages_here()

    def is_last_stage(self) -> bool:
        """Whether the last stage is here, in any direction: then this rank needs data."""
        return self.num_stages - 1 in self._stages_here()

    def set_dataloader(self, loader: Any) -> None:
        """As in DeepSpeed; this rank reads it where a first or last stage is here."""
        self._loader = loader
        super().set_dataloader(loader)

    def exchange_buffers(self) -> Iterable[torch.Tensor]:
        """The memory that replicas exchange gradients and weights through on this rank."""
        return self.pipeline.exchange_buffers()

    def other_gradients(self) -> Iterable[torch.Tensor]:
        """The sums of gradients of this rank's guests, and of windows that wait for their update."""
        replicas = self.pipeline.replicas.values()
        guests = (replica.gradients for replica in replicas if isinstance(replica, Guest))
        return (*guests, *self.pipeline.parked_gradients())

    def other_weights(self) -> Iterable[torch.Tensor]:
        """Versions that the schedule uses, and the plain iterate, where they are kept beside the weights."""
        return self.pipeline.other_weights()

    # What DeepSpeed calls

    def _train_schedule(self) -> WindowSchedule:
        buffers = self._num_buffers(self.executor.schedule)
        return WindowSchedule(self._window, buffers, self.micro_batches, self.num_stages, self.stage_id)

    def _exec_run_action(self, action: Action) -> None:
        self.executor.execute(action)

    def _aggregate_total_loss(self) -> Any:
        """The loss of the window, which the last stages reported after their last backwards."""
        self.pipeline.watch.hand_over()
        additional = self.module.get_additional_losses() or {}
        total = torch.zeros(2 + len(additional))
        for direction, row in enumerate(self.executor.schedule.placement.ranks):
            if row[-1] == self.stage_id:
                values = self._reported.pop((self.executor.window, direction))
            else:
                assert self.pipeline.channels is not None
                values = self.pipeline.channels.receive_report(row[-1], len(total), direction)
            total += values.to(torch.float32)
        total = self.pipeline.watch.timeline.device.to_device(total)
        self.dp_group_loss, loss = total[0], total[1]
        if additional:
            self.agg_additional_losses = dict(zip(additional, total[2:], strict=True))
        return loss

    def _next_batch(self) -> Any:
        return super()._next_batch() if self._evaluating else self._loading

    def clip_fp32_gradients(self) -> None:
        parameters, limit = list(self.module.parameters()), self.gradient_clipping()
        schedule = self.executor.schedule
        if schedule.updates_meet and not schedule.flush:
            clip_by_whole_norm(parameters, limit, self.mpu, self.device)
        else:
            clip_grad_norm_(parameters, limit, mpu=self._norm_grid)

    def _start_timers(self, timer_names: Any) -> None:
        """Timers that run already go on: DeepSpeed 0.19.8 starts those of a backward twice on all stages but the
        last, and its timers refuse that (stock 1F1B fails there with ``wall_clock_breakdown``)."""
        super()._start_timers([name for name in timer_names if not getattr(self.timers(name), "started_", False)])

    # What the worker calls

    def load(self, batch: Any, buffer_id: int) -> None:
        """Put a micro-batch into a pipeline buffer: its input on the first stage, its label on the last."""
        self._loading = batch
        self._exec_load_micro_batch(buffer_id)
        self._loading = None

    def present_loss_scale(self) -> float:
        """That of a backward that begins now: DeepSpeed 0.19.8 scales the loss with ZeRO alone."""
        scales = self.fp16_enabled() and isinstance(self.optimizer, ZeROOptimizer)
        return float(self.optimizer.loss_scale) if scales else 1.0

    def tell(self, update: Action) -> None:
        """The gradient of a window is whole and reduced: tell the other stages what they decide by."""
        if self.pipeline.decisions is not None:
            self.pipeline.decisions.tell(update, stage_squares(self, self._norm_grid))

    @contextmanager
    def deciding(self, update: Action) -> Iterator[None]:
        """Let this update go by the norm, and the overflow, that the schedule's decisions say."""
        decisions = self.pipeline.decisions
        if decisions is None:
            yield
            return
        with decisions.update(update) as answers, decided_by(answers, self.optimizer, self._norm_grid):
            yield

    def report_losses(self, window: int, direction: int) -> None:
        """On the last stage of ``direction``: average its losses as DeepSpeed does, and have them sent to all ranks."""
        numbers = self.executor.schedule.micro_batches_of(window, direction)
        losses, watch = self.pipeline.losses.take(numbers), self.pipeline.watch
        self.total_loss, self.total_additional_losses = summed(losses)
        aside = self._acting_as(self.num_stages - 1), self._without_broadcast()
        with torch.no_grad(), aside[0], aside[1], watch.guard("averaging the losses", None):
            loss = super()._aggregate_total_loss()
        reported = [self.dp_group_loss, loss, *(self.agg_additional_losses or {}).values()]

        def report(values: torch.Tensor) -> None:
            warn_of_broken(numbers, values[len(reported) :], self.num_stages - 1)
            self._reported[window, direction] = values = values[: len(reported)].clone()
            for rank in range(self.num_stages):
                if rank != self.stage_id:
                    assert self.pipeline.channels is not None
                    self.pipeline.channels.send_report(rank, values, direction)

        watch.bring(together(reported, losses), "reporting the losses", report)

    # How

    @contextmanager
    def _acting_as(self, stage: int) -> Iterator[None]:
        """Let DeepSpeed's instructions take this engine for that of ``stage`` alone."""
        before, self._acting = self._acting, stage
        try:
            yield
        finally:
            self._acting = before

    def _first_replica(self) -> int:
        """Of this rank's data-parallel replicas, which hold the same weights."""
        return min(dist.get_process_group_ranks(self.grid.get_data_parallel_group()))

    def _stages_here(self) -> Iterable[int]:
        if self._acting is not None:
            return (self._acting,)
        return (self.stage_id, *self.__dict__.get("guests", ()))

    def _make_schedule(self, micro_batches: int) -> Schedule:
        wanted = needs(self.module, self.gradient_clipping(), self.fp16_enabled())
        schedule = self.settings.make(self.num_stages, micro_batches, wanted)
        if self.fp16_enabled():
            check_loss_scale(schedule, '"fp16"', '"bf16"')
        return schedule

    def _num_buffers(self, schedule: Schedule) -> int:
        """The most micro-batches that are in flight on the home stage at once."""
        directions = sum(row[self.stage_id] == self.stage_id for row in schedule.placement.ranks)
        return directions * schedule.in_flight[self.stage_id]

    def _site(self) -> Site:
        ranks = [self.grid.stage_to_global(stage) for stage in range(self.num_stages)]
        group, device = self.grid.get_pipe_parallel_group(), torch.device(self.device)
        timeout = self.settings.timeout_seconds
        return Site(self.stage_id, ranks, group, device, timeout, self.dynamic_shape, SHAPES_HINT)

    def _start(self) -> None:
        """Start the program for the present window size, and print what to expect on rank 0, as DeepSpeed prints the
        stages (its logger keeps silent below warnings)."""
        schedule = self.pipeline.schedule
        worker = EngineWorker(self, schedule, self._num_buffers(schedule))
        decides = self.gradient_clipping() > 0 or self.fp16_enabled()
        self.pipeline.start(worker, self.global_steps, [self.module, *self.guests.values()], decides)
        lines = [clipping_line(self.gradient_clipping(), schedule)]
        if self.pipeline.holds_more:
            parked = self.pipeline.most_parked
            guests, (plain, extrapolated) = list(self.guests.values()), self.pipeline.bytes_kept()
            held = Held(
                [self.module], guests, sum_dtype(self.optimizer), self.exchange_buffers(), plain, parked, extrapolated
            )
            lines += memory_table(held, self.grid.get_pipe_parallel_group(), self.device)
        if self.global_rank == 0:
            print("\n".join([self.pipeline.planned.to_text(), *lines]), flush=True)

    def _pull(self) -> Any:
        if self.data_iterator is None and self.batch_fn is None:  # batch_fn may get it from other ranks
            raise ValueError("there is no data: pass train_batch(data_iter=...), or training_data to initialize()")
        return super()._next_batch()

    @contextmanager
    def _without_broadcast(self) -> Iterator[None]:
        """DeepSpeed's aggregation ends in a broadcast for which all stages meet; reports replace it."""
        pipe_parallel, self.is_pipe_parallel = self.is_pipe_parallel, False
        try:
            yield
        finally:
            self.is_pipe_parallel = pipe_parallel

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Let stock code use the pipeline's buffers without touching what is in flight."""
        buffers, count = self.pipe_buffers, self.num_pipe_buffers
        self.pipe_buffers, self.num_pipe_buffers = {key: [] for key in buffers}, 0
        self._evaluating = True
        try:
            yield
        finally:
            self._evaluating = False
            self.pipe_buffers, self.num_pipe_buffers = buffers, count

    def _write_events(self) -> None:
        if self.global_rank == 0 and self.monitor.enabled:
            totals = self.executor.timeline.totals
            share = totals.wait / max(totals.wait + totals.run, 1e-9)
            self.monitor.write_events(
                [
                    ("Train/Pipeline/largest_gap", self.executor.largest_gap, self.global_samples),
                    ("Train/Pipeline/waiting_share", share, self.global_samples),
                ]
            )

    _INSTRUCTION_MAP = {**PipelineEngine._INSTRUCTION_MAP, RunAction: _exec_run_action}  # noqa: RUF012
