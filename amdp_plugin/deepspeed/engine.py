"""A DeepSpeed ``PipelineEngine`` that runs the program of a schedule."""

from __future__ import annotations

import atexit
import math
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.utils import clip_grad_norm_
from deepspeed.utils import logger

from ..plan.action import Action
from ..plan.report import report
from ..plan.scheduler import Scheduler
from ..runtime.channels import Channels
from ..runtime.executor import Executor
from ..runtime.feed import Feed
from ..runtime.transport import Transport
from ..runtime.watch import PipelineStallError, Watch
from .checkpoint import load_random_state, save_random_state
from .config import read_settings
from .losses import MicroBatchLoss, WindowLosses
from .schedule import RunAction, WindowSchedule
from .stage_local import StageGrid, bound_collectives, make_stage_local
from .worker import EngineWorker


class ScheduledPipelineEngine(PipelineEngine):
    """Trains a ``PipelineModule`` under the schedule that ``"pipeline": {"schedule": ...}`` names.

    ``train_batch``, ``eval_batch``, ``save_checkpoint`` and ``load_checkpoint`` are DeepSpeed's. One call of
    ``train_batch`` runs one window of this rank's program: after ``k`` calls every stage has had ``k``
    updates, from the micro-batches that stock 1F1B would have used, but what a free-running schedule has
    forwarded ahead stays in flight between two calls.

    Attributes:
        executor: runs the program; has ``largest_gap``, ``peak_in_flight`` and the ``timeline``.
    """

    executor: Executor
    # DeepSpeed's, which has no types
    pipe_buffers: dict[str, list[Any]]
    num_pipe_buffers: int
    is_pipe_parallel: bool
    total_loss: Any
    total_additional_losses: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        settings = read_settings(self._config.pipeline)
        assert settings is not None, "entry.initialize selects this engine by the key"
        self.settings = settings
        # Stages exchange whole activations; DeepSpeed would cut them over tensor-parallel ranks by default.
        self.is_pipe_partitioned = self.is_grad_partitioned = False
        self.window_losses = WindowLosses()
        self.pipe_buffers["losses"] = []
        self._window: list[Action] = []
        self._loss_of_window: Any = None
        self._evaluating = False
        self._loading: Any = None
        self._feed = Feed(self._pull)
        self._watch = Watch(self.stage_id, settings.timeout_seconds)
        self._channels: Channels | None = None
        self._build_executor()
        # Where a flush makes the stages wait for one another anyway, norms are the whole model's, as in stock.
        self._norm_grid = self.mpu if self.executor.schedule.flush else StageGrid(self.mpu)
        if self._norm_grid is not self.mpu:
            make_stage_local(self.optimizer, self._norm_grid)
        bound_collectives(self.grid, settings.timeout_seconds)
        atexit.register(_close, weakref.ref(self))

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
        self.module.train()
        self._window = list(self.executor.open_window())
        loss = super().train_batch()
        self.executor.close_window()
        self._write_events()
        return loss

    def eval_batch(self, data_iter: Iterator[Any], *args: Any, **kwargs: Any) -> Any:
        """DeepSpeed's ``eval_batch``, on the weights after the latest update. Training goes on afterwards as if
        it had not been called: what is in flight stays, and it draws no random numbers."""
        with self._aside(), self._watch.guard("evaluation", None):
            return super().eval_batch(data_iter, *args, **kwargs)

    def save_checkpoint(self, save_dir: str, tag: Any = None, **kwargs: Any) -> Any:
        """DeepSpeed's checkpoint, which stock 1F1B loads too, with the random state of every rank beside it.

        What is in flight is cancelled first and forwarded anew afterwards, so that a run resumed from the
        checkpoint equals this one as it goes on, bit for bit.
        """
        self.executor.quiesce()
        saved = super().save_checkpoint(save_dir, tag=tag, **kwargs)
        save_random_state(save_dir, tag or f"global_step{self.global_steps}", self.global_rank)
        return saved

    def load_checkpoint(self, load_dir: str, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """DeepSpeed's ``load_checkpoint``. Data that was read ahead is dropped: give an iterator that begins where
        the checkpoint stands."""
        self.executor.quiesce()
        path, state = super().load_checkpoint(load_dir, *args, **kwargs)
        if path is not None:
            load_random_state(path, self.global_rank)
        self.executor.restart(self.global_steps)
        self._feed.restart(self.global_steps * self.micro_batches)
        return path, state

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """As in DeepSpeed. The window gets another size, so the pipeline starts anew with the new program."""
        self.executor.quiesce()
        super().set_train_batch_size(train_batch_size)
        self._feed.renumber(self.global_steps * self.micro_batches)
        self._build_executor()

    def reset_activation_shape(self) -> None:
        """As in DeepSpeed, on all ranks, when the shapes of the activations are going to change."""
        super().reset_activation_shape()
        self.executor.quiesce()
        if self._channels is not None:
            self._channels.forget_shapes()

    # What DeepSpeed calls

    def _train_schedule(self) -> WindowSchedule:
        schedule = self.executor.schedule
        in_flight = schedule.in_flight[self.stage_id]
        return WindowSchedule(self._window, in_flight, self.micro_batches, self.num_stages, self.stage_id)

    def _exec_run_action(self, action: Action) -> None:
        self.executor.execute(action)

    def _aggregate_total_loss(self) -> Any:
        """The loss of the window. The last stage reported it before its update, so that this waits for nobody."""
        if self.is_last_stage():
            return self._loss_of_window
        assert self._channels is not None
        additional = self.module.get_additional_losses() or {}
        values = self._channels.receive_report(self.num_stages - 1, 2 + len(additional))
        losses = values.to(self.device, torch.float32)
        self.dp_group_loss, loss = losses[0], losses[1]
        if additional:
            self.agg_additional_losses = dict(zip(additional, losses[2:], strict=True))
        return loss

    def _next_batch(self) -> Any:
        return super()._next_batch() if self._evaluating else self._loading

    def clip_fp32_gradients(self) -> None:
        clip_grad_norm_(parameters=self.module.parameters(), max_norm=self.gradient_clipping(), mpu=self._norm_grid)

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

    def report_losses(self, window: int) -> None:
        """On the last stage: average the losses of ``window`` as DeepSpeed does, and send them to the other stages."""
        numbers = range(window * self.micro_batches, (window + 1) * self.micro_batches)
        losses = self.window_losses.take(numbers)
        self._sum_losses(losses)
        with torch.no_grad(), self._without_broadcast(), self._watch.guard("averaging the losses", None):
            self._loss_of_window = super()._aggregate_total_loss()
        additional = list((self.agg_additional_losses or {}).values())
        values = torch.stack([self.dp_group_loss, self._loss_of_window, *additional]).to("cpu", torch.float64)
        if not torch.isfinite(values).all():
            self._name_broken(numbers, losses)
        for rank in range(self.num_stages - 1):
            assert self._channels is not None
            self._channels.send_report(rank, values)

    # How

    def _build_executor(self) -> None:
        """Plan, prove, announce and wire up the program for the present window size."""
        schedule = self.settings.make(self.num_stages, self.micro_batches)
        scheduler = Scheduler(schedule)
        planned = report(scheduler, windows=1)
        keep_sent = max(schedule.in_flight) + 1
        if self._channels is not None:
            self._channels.keep_sent = keep_sent
        elif self.num_stages > 1:
            links = [(rank, peer) for rank, peers in enumerate(schedule.placement.neighbours) for peer in peers]
            ranks = [self.grid.stage_to_global(stage) for stage in range(self.num_stages)]
            transport = Transport(ranks, links, torch.device(self.device), self.settings.timeout_seconds)
            self._channels = Channels(transport, self._watch, keep_sent, self.dynamic_shape)
        worker = EngineWorker(self, self._feed, schedule.in_flight[self.stage_id])
        self.executor = Executor(scheduler, self.stage_id, worker, self._channels, self._watch)
        self.executor.restart(self.global_steps)
        if self.global_rank == 0:
            # Printed, as DeepSpeed prints the stages: its logger keeps silent below warnings.
            print(f"{planned.to_text()}\n{self._clipping()}", flush=True)

    def _clipping(self) -> str:
        if self.gradient_clipping() <= 0:
            return "gradient clipping: off"
        scope = "the whole model, as in stock" if self.executor.schedule.flush else "each stage by its own norm"
        return f"gradient clipping: {scope}, at {self.gradient_clipping()}"

    def _pull(self) -> Any:
        if self.data_iterator is None:
            raise ValueError("there is no data: pass train_batch(data_iter=...), or training_data to initialize()")
        return super()._next_batch()

    def _sum_losses(self, losses: Sequence[MicroBatchLoss]) -> None:
        """Sum in the order of stock: micro-batch by micro-batch, from zero."""
        self.total_loss = sum((loss for loss, _ in losses[1:]), start=losses[0][0])
        first = losses[0][1]
        if first is not None:
            self.total_additional_losses = {
                name: sum((extra[name] for _, extra in losses[1:] if extra), start=first[name]) for name in first
            }

    def _name_broken(self, numbers: range, losses: Sequence[MicroBatchLoss]) -> None:
        """Say whose loss is not finite. Done only when the sum is not: on a GPU each look waits for the device."""
        for number, (loss, _) in zip(numbers, losses, strict=True):
            if not math.isfinite(float(loss)):
                logger.warning(f"the loss of micro-batch {number} is {float(loss)} (stage {self.stage_id})")

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
        buffers, count, micro_offset = self.pipe_buffers, self.num_pipe_buffers, self.module.micro_offset
        self.pipe_buffers, self.num_pipe_buffers = {key: [] for key in buffers}, 0
        self._evaluating = True
        try:
            yield
        finally:
            self._evaluating = False
            self.pipe_buffers, self.num_pipe_buffers, self.module.micro_offset = buffers, count, micro_offset

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


def _close(reference: weakref.ref[ScheduledPipelineEngine]) -> None:
    """See this rank's last messages out before the process ends, where all ended well."""
    engine = reference()
    if engine is not None:
        with suppress(PipelineStallError):
            engine.executor.quiesce()
