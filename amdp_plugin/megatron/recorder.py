"""The steps, events and losses of one training job on one rank of Megatron, under its own schedule or ours."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from ..compare.memory import peak_bytes
from ..compare.recorder import KEPT_EVENTS, Journal, Output, timed
from ..compare.recording import OURS, STOCK, Memory, RankRecord
from ..runtime.timeline import WAIT, Event
from .hook import ScheduledForwardBackward, only
from .meetings import Meetings
from .memory import gauge
from .stock_timeline import StockTimeline


@dataclass(frozen=True)
class Window:
    """What one training call is for.

    Args:
        model: what it trains.
        micro_batches: their number.
        samples: of all micro-batches and replicas.
        tokens: likewise.
    """

    model: Any
    micro_batches: int
    samples: int
    tokens: int

    @classmethod
    def of(cls, arguments: Mapping[str, Any], replicas: int) -> Window:
        """As the arguments of Megatron's schedules have it."""
        micro_batches = arguments["num_microbatches"]
        samples = micro_batches * arguments["micro_batch_size"] * replicas
        return cls(arguments["model"], micro_batches, samples, samples * arguments["seq_length"])


class Recorder:
    """Records what one schedule trains.

    Args:
        hook: the schedule; ``None`` for Megatron's own.
        output: is told of every step.
    """

    def __init__(self, hook: ScheduledForwardBackward | None, output: Output) -> None:
        self._hook, self._output, self.rank = hook, output, dist.get_rank()
        pipeline = parallel_state.get_pipeline_model_parallel_group()
        self._stage, self._stages = pipeline.rank(), pipeline.size()
        self._replicas = parallel_state.get_data_parallel_world_size()
        self.journal = Journal()
        self.stock = StockTimeline(self._stage, self._stages) if hook is None else None
        self._meetings = Meetings(set(dist.get_process_group_ranks(pipeline)) - {self.rank})
        self._memory: list[Memory] = []
        self._window: Window
        self._start: float
        self._loss: Tensor | None

    def train(self, function: Callable[[], Any], arguments: Mapping[str, Any]) -> Any:
        """One training call."""
        self._window = Window.of(arguments, self._replicas)
        with self.stock.recording() if self.stock else nullcontext(), self._meetings.seen():
            reported, (self._start, end) = timed(function)
        self._loss = mean_loss(reported)
        if self._hook is not None:  # the update was in it
            timeline = self._hook.executor.timeline
            if timeline.events.maxlen != KEPT_EVENTS:
                timeline.keep(KEPT_EVENTS)
            self._end_step(end)
        return reported

    def update(self, optimizer: Any, function: Callable[[], Any]) -> Any:
        """The optimizer's step: within a training call of ours, after one of Megatron's."""
        measured = self.journal.measures_next(self._hook.windows_late if self._hook else 0)
        with (
            gauge(self._window.model, optimizer, self._hook, self._memory) if measured else nullcontext(),
            nullcontext() if self._hook else self._meetings.seen(),
        ):
            result, (_, end) = timed(function)
        if self.stock is not None:
            self.stock.end_update()
            self._end_step(end)
        return result

    def evaluate(self, function: Callable[[], Any]) -> Any:
        """One call with ``forward_only``."""
        reported, span = timed(function)
        self.journal.part_of_evaluation(span, mean_loss(reported))
        return reported

    def record(self) -> RankRecord:
        """Everything until now."""
        stock = self.stock
        executor: Any = stock or (self._hook and self._hook.executor)
        device = next(only(self._window.model, "model chunk").parameters()).device
        executor.timeline.settle()
        events, kept = list(self._meetings.cut_out(executor.timeline.events)), self._memory
        totals, met = executor.timeline.totals, _waited(events) - _waited(executor.timeline.events)
        return RankRecord(
            rank=self.rank,
            stage=self._stage,
            engine=STOCK if stock else OURS,
            schedule="1f1b" if stock else executor.schedule.name,
            options={} if stock else dict(executor.schedule.options),
            stages=self._stages,
            micro_batches=self._window.micro_batches,
            steps=self.journal.steps,
            evaluations=self.journal.evaluations,
            events=events,
            run_seconds=totals.run - met,
            wait_seconds=totals.wait + met,
            peak_in_flight=executor.peak_in_flight,
            largest_gap=0 if stock else executor.largest_gap,
            planned_costs=None if stock else executor.planner.costs,
            clock=executor.timeline.device.clock,
            memory=replace(Memory.largest(kept), peak=peak_bytes(device)) if kept else None,
        )

    def _end_step(self, end: float) -> None:
        number = self.journal.number + 1
        self.journal.step(number, (self._start, end), self._loss, self._window.samples, self._window.tokens)
        self._output.stepped(self)


def _waited(events: Iterable[Event]) -> float:
    return sum(event.end - event.start for event in events if event.phase == WAIT)


def mean_loss(reported: Sequence[Any]) -> Tensor | None:
    """The mean over micro-batches of what the job's loss function names first: a value each, or a sum and a count.

    Args:
        reported: what Megatron's schedules return: on the last stage a dictionary each, else nothing.
    """
    if not reported or not isinstance(reported[0], Mapping):
        return None
    named = [torch.as_tensor(next(iter(each.values()))).detach().double().view(-1) for each in reported]
    values = torch.stack(named)  # (micro-batches, 1 or 2)
    return values.mean() if values.shape[1] == 1 else values[:, 0].sum() / values[:, 1].sum()
