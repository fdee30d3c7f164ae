"""Megatron's ``forward_backward_func`` that runs the program of a schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import schedules
from megatron.core.utils import get_model_config
from torch import Tensor, nn

from ..plan.schedule import Schedule
from ..runtime.agreement import Held, bound_collectives, clipping_line, memory_table
from ..runtime.executor import Executor
from ..runtime.pipeline import Pipeline, Site
from ..runtime.runnable import check_homes, check_runnable
from ..settings import Needs, ScheduleSettings, refusing
from .feedback import error_feedback
from .guests import ModelProvider, build_guests, build_replicas, sum_dtype
from .losses import WindowReports
from .optimizer import OptimizerSteps, stage_local
from .random_state import GENERATORS
from .refusals import check_common_decisions, check_options
from .tensor_ranks import TensorRanks
from .tied import is_tied, tied_embedding
from .tied_state import MegatronStates
from .worker import Call, ChunksWorker

stock_forward_backward_func = schedules.get_forward_backward_func
"""Megatron's own choice of a schedule, whatever stands in its place later."""

SHAPES_HINT = "give every micro-batch one shape, or set variable_seq_lengths (--variable-seq-lengths)"


class Resumed(NamedTuple):
    """What was loaded beside model and optimizer, until the pipeline takes it: see :meth:`.Pipeline.restart`."""

    random_states: list[Any] | None = None
    ahead: list[Tensor] | None = None
    means: list[Tensor] | None = None


class ScheduledForwardBackward:
    """Trains Megatron chunks under a schedule; called as Megatron calls its own.

    One call runs one window of this rank's program, the update in it included: ``optimizer.step()``, which the loop
    calls afterwards, hands out that update's result. After ``k`` calls every stage has had ``k`` updates, from the
    micro-batches that stock 1F1B would have used, but what a free-running schedule has forwarded ahead stays in flight
    between two calls. With ``forward_only`` it is Megatron's stock schedule, which nothing in flight is touched by;
    under error feedback it sees the plain iterate, which stays in the weights until the next call that trains.

    Args:
        settings: which schedule, and its options.

    Attributes:
        schedule: what is planned, as soon as the size of its windows is known.
        pipeline: what runs the program on this rank; there after the first training call.
        guests: the replicas here of other ranks' stages, by stage.
    """

    schedule: Schedule
    pipeline: Pipeline

    def __init__(self, settings: ScheduleSettings) -> None:
        self.settings = settings
        self.guests: dict[int, nn.Module] = {}
        self.notices: list[str] = []
        self._attached = self._started = False
        self._taken = ExitStack()
        """Gives back what belongs to the loop."""
        self._shape: tuple[Any, ...] = ()

    # For training loops

    def attach(
        self,
        model: nn.Module | Sequence[nn.Module],
        optimizer: Any,
        model_provider: ModelProvider | None = None,
        iteration: int = 0,
        random_states: list[Any] | None = None,
        num_microbatches: int | None = None,
        ahead: list[Tensor] | None = None,
        means: list[Tensor] | None = None,
    ) -> None:
        """Take over the stepping of ``optimizer``, once, before the first call.

        Args:
            model: this rank's chunk, under Megatron's ``DistributedDataParallel``; a list of one as well.
            optimizer: from ``get_megatron_optimizer``.
            model_provider: builds one stage; needed where ranks hold several, such as under ``amdp``.
            iteration: updates that the weights have had.
            random_states: what :meth:`random_states` returned when the checkpoint was written.
            num_microbatches: of a window, where that is known: what the schedule cannot work with is then refused here,
                else at the first call.
            ahead: what :meth:`ahead` returned when the checkpoint was written.
            means: what :meth:`means` returned then.

        Raises:
            ValueError: for anything that the schedule cannot work with.
        """
        self._chunk = only(model, "model chunk")
        self._optimizer, self._provider = optimizer, model_provider
        self._config = get_model_config(self._chunk)
        if not hasattr(self._chunk, "zero_grad_buffer"):
            raise ValueError("the model must be under Megatron's DistributedDataParallel, whose buffers hold gradients")
        self._group = parallel_state.get_pipeline_model_parallel_group()
        self._num_stages, self._rank = self._group.size(), self._group.rank()
        self._clipping, self._fp16 = float(optimizer.config.clip_grad), bool(self._config.fp16)
        self._tied = self._num_stages > 1 and is_tied(self._chunk)
        self._iteration, self._resumed = iteration, Resumed(random_states, ahead, means)
        if num_microbatches is not None:
            with refusing():
                self.schedule = self._check(self._make_schedule(num_microbatches))
        self._steps = OptimizerSteps(optimizer, self._chunk)
        self._taken.callback(self._steps.release)
        self._attached = True

    def detach(self) -> None:
        """End what is in flight, and give the optimizer back to the loop."""
        self.quiesce()
        self._taken.close()
        self._attached = self._started = False

    def quiesce(self) -> None:
        """Cancel what is in flight, between two calls: every stage is at one version then, and random states are those
        from before. With error feedback the weights are the plain iterate, until the next call. All ranks of the
        pipeline must call it; do so before a checkpoint is written."""
        if self._started:
            self.pipeline.rest()

    def random_states(self) -> list[Any]:
        """What each of this rank's streams of random numbers would draw next, for a checkpoint."""
        if self._started:
            return self.pipeline.random_streams.states()
        return self._resumed.random_states or [GENERATORS.get()]

    def ahead(self) -> list[Tensor] | None:
        """What this rank's stage computes with under error feedback, for a checkpoint, whose weights are the plain
        iterate; ``None`` without. Data-parallel replicas have the same."""
        return self.pipeline.feedback.ahead() if self._started else self._resumed.ahead

    def means(self) -> list[Tensor] | None:
        """Running means of the updates of what this rank steps, for a checkpoint; ``None`` under schedules that keep
        none. Data-parallel replicas may have other parts."""
        return self.pipeline.extrapolation.means() if self._started else self._resumed.means

    def restart(
        self, iteration: int, random_states: list[Any] | None = None, ahead: list[Tensor] | None = None,
        means: list[Tensor] | None = None,
    ) -> None:  # fmt: skip
        """Weights and optimizer were loaded from the checkpoint of ``iteration``: give an iterator that begins where
        that stands."""
        self._iteration, self._resumed = iteration, Resumed(random_states, ahead, means)
        if self._started:
            self.executor.quiesce(updates=False)
            self._go_on()

    @property
    def executor(self) -> Executor:
        """Runs the program; has ``largest_gap``, ``peak_in_flight`` and the ``timeline``."""
        return self.pipeline.executor

    @property
    def updates_meet(self) -> bool:
        """Whether all stages update at one point."""
        return self.schedule.updates_meet

    @property
    def windows_late(self) -> int:
        """Calls that an update comes after its window, at most."""
        return self.pipeline.windows_late if self._started else 0

    @property
    def reads_data(self) -> bool:
        """Whether this rank runs a first or last stage in any direction, and so needs a data iterator."""
        placement = self.schedule.placement
        return any(placement.is_end(self._rank, direction) for direction in range(placement.directions))

    def __call__(
        self,
        *,
        forward_step_func: Callable[..., Any],
        data_iterator: Any,
        model: Any,
        num_microbatches: int,
        forward_only: bool = False,
        **others: Any,
    ) -> list[Any]:
        """One window, or an evaluation. Arguments and result are those of Megatron's schedules: what the job's loss
        function reported of every micro-batch, in their order, on the last pipeline rank; elsewhere an empty list.

        Raises:
            StopIteration: when the data ends before the window does, on every rank.
            PipelineStallError: when a peer is gone or late.
        """
        arguments = dict(forward_step_func=forward_step_func, data_iterator=data_iterator, model=model, **others)
        if forward_only:
            with self.pipeline.watch.guard("evaluation", None) if self._started else nullcontext():
                if self._started:
                    self.pipeline.settle()
                stock = stock_forward_backward_func()
                return stock(num_microbatches=num_microbatches, forward_only=True, **arguments)
        if not self._attached:
            raise ValueError("attach(model, optimizer) comes before the first call with forward_only=False")
        if only(model, "model chunk") is not self._chunk:
            raise ValueError("this is another model than the one that attach() was given")
        if others.get("adjust_tensor_shapes_fn") is not None:
            raise ValueError("adjust_tensor_shapes_fn cannot be used: stages send whole activations as they come")
        reduction: dict[str, Any] = {key: others[key] for key in ("pg_collection", "force_all_reduce") if key in others}
        iterator = only(data_iterator, "data iterator")
        self._call = Call(forward_step_func, iterator, bool(others.get("collect_non_loss_data")), reduction)
        self._prepare(num_microbatches, tuple(others.get(key) for key in ("seq_length", "micro_batch_size")))
        with self._timed():
            for action in self.pipeline.open_window():
                self.executor.execute(action)
            losses = self._reports.of_window(self.executor.window)
            self.pipeline.close_window()
        return losses

    # How

    def _prepare(self, micro_batches: int, shape: tuple[Any, ...]) -> None:
        """Make the pipeline at the first call; make it anew for windows of another size, or for other shapes."""
        if not self._started:
            self._make(micro_batches)
        elif shape != self._shape and self.pipeline.channels is not None:
            self.executor.quiesce()
            self.pipeline.channels.forget_shapes()
        if micro_batches != self.pipeline.schedule.micro_batches:
            self._resize(micro_batches)
        self._started, self._shape = True, shape

    def _make(self, micro_batches: int) -> None:
        self.schedule = self._check(self._make_schedule(micro_batches))
        self.settings = self.settings.kept(self.schedule)
        costs, everywhere = self.settings.costs(self._num_stages), lambda micro_batch: True
        self.pipeline = Pipeline(self.schedule, costs, self._site(), self._pull, GENERATORS, everywhere)
        bound_collectives(_groups(self._group), self.settings.timeout_seconds)
        self._tensor_ranks = TensorRanks(self.pipeline.watch, self.settings.timeout_seconds)
        schedule = self.pipeline.schedule
        self.guests = build_guests(self._provider, self._chunk, self._rank, schedule.placement)
        replicas, held = build_replicas(self._chunk, self._rank, self.guests, schedule)
        feedback, states = error_feedback(self._optimizer, self._chunk), MegatronStates(self._optimizer)
        self.pipeline.hold(replicas, held, feedback, states)
        if not self.updates_meet:
            self._taken.enter_context(stage_local(self._optimizer))
        if not self.schedule.flush:
            self._taken.callback(setattr, self._config, "barrier_with_L1_time", self._config.barrier_with_L1_time)
            self._config.barrier_with_L1_time = False
        self._start(self._iteration)
        self._go_on()

    def _go_on(self) -> None:
        """From what was loaded."""
        self.pipeline.restart(self._iteration, *self._resumed)
        self._resumed = Resumed()

    def _resize(self, micro_batches: int) -> None:
        before, window = self.pipeline.schedule.micro_batches, self.executor.window
        self.schedule = self._check(self._make_schedule(micro_batches))
        self.executor.quiesce()
        self.pipeline.feed.renumber(window * before, window * micro_batches)
        self.pipeline.replan(self.schedule)
        self._start(window)

    def _start(self, window: int) -> None:
        """Start the program, and print what to expect on rank 0."""
        schedule = self.pipeline.schedule
        chunks = {self._rank: self._chunk, **self.guests}
        self._reports = WindowReports(self.pipeline)
        worker = ChunksWorker(
            self.pipeline, chunks, self._rank, self._steps, lambda: self._call, self._reports.collect,
            self._tensor_ranks,
        )  # fmt: skip
        self.pipeline.start(worker, window, chunks.values(), self._steps.decides)
        lines = [clipping_line(self._clipping, schedule), *self.notices]
        if self.pipeline.holds_more:
            parked = self.pipeline.most_parked
            guests, (plain, extrapolated) = list(self.guests.values()), self.pipeline.bytes_kept()
            buffers = self.pipeline.exchange_buffers()
            held = Held([self._chunk], guests, sum_dtype(self._chunk), buffers, plain, parked, extrapolated)
            lines += memory_table(held, self._group, self._site().device)
        if dist.get_rank() == 0:
            print("\n".join([self.pipeline.planned.to_text(), *lines]), flush=True)

    def _make_schedule(self, micro_batches: int) -> Schedule:
        tied = tied_embedding(self._num_stages, self._tied)
        needs = Needs(norm=self._clipping > 0, exact=self._fp16, tied=tied)
        return self.settings.make(self._num_stages, micro_batches, needs)

    def _check(self, schedule: Schedule) -> Schedule:
        check_runnable(schedule)
        check_homes(schedule)
        check_options(self.settings, schedule, [self._config, self._chunk.ddp_config, self._optimizer.config])
        check_common_decisions(self.settings, schedule, self._tied, self._fp16)
        self.settings.costs(self._num_stages)
        return schedule

    def _site(self) -> Site:
        device = next(self._chunk.parameters()).device
        ranks = dist.get_process_group_ranks(self._group)
        return Site(
            self._rank, ranks, self._group, device, self.settings.timeout_seconds,
            bool(self._config.variable_seq_lengths), SHAPES_HINT,
        )  # fmt: skip

    def _pull(self) -> Any:
        return self._call.pull()

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """As Megatron's schedules time themselves."""
        timers = self._config.timers
        if timers is not None:
            timers("forward-backward", log_level=1).start(barrier=self._config.barrier_with_L1_time)
        try:
            yield
        finally:
            if timers is not None:
                timers("forward-backward").stop()


def only(given: Any, what: str) -> Any:
    """The one that there is, of a list or alone.

    Raises:
        ValueError: for a list of several, as interleaved virtual stages have them.
    """
    if not isinstance(given, list | tuple):
        return given
    if len(given) != 1:
        raise ValueError(f"each rank has one {what}, got {len(given)}: interleaved virtual stages are not supported")
    return given[0]


def _groups(pipeline: dist.ProcessGroup) -> list[dist.ProcessGroup]:
    """The process groups that Megatron uses while it trains."""
    return [
        pipeline,
        parallel_state.get_model_parallel_group(),
        parallel_state.get_tensor_model_parallel_group(),
        parallel_state.get_data_parallel_group(with_context_parallel=True),
        parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True),
    ]
