"""Records a job from outside: what every rank did and waited for, for stock engines and ours alike.

    python -m amdp_plugin --record DIR script.py ...

Times are those of the host. On the CPU they are what the work took; a GPU works on after the host has gone on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

from deepspeed.runtime.pipe import schedule as stock
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import Tensor

from ..compare.memory import peak_bytes
from ..compare.recorder import KEPT_EVENTS, Journal, Output, timed
from ..compare.recording import OURS, STOCK, Memory, RankRecord
from ..plan.action import BACKWARD, FORWARD, UPDATE, Action
from ..runtime.device import Mark, device_of
from ..runtime.timeline import RUN, WAIT, Timeline
from .engine import ScheduledPipelineEngine
from .memory import gauge

RECORDED_METHODS = ("train_batch", "eval_batch", "save_checkpoint", "load_checkpoint")


class Recorder:
    """Records one engine.

    Args:
        engine: a ``PipelineEngine``, stock or ours.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.journal = Journal()
        self._tokens: int | None = None
        self._memory: list[Memory] = []
        self.busy = False
        """Whether a call is being recorded."""
        self._stock: StockTimeline | None = None
        if isinstance(engine, ScheduledPipelineEngine):
            self.timeline = engine.executor.timeline
            self.timeline.keep(KEPT_EVENTS)
        else:
            self._stock = StockTimeline(engine)
            self.timeline = self._stock.timeline
        stages = {engine.stage_id: engine.module, **getattr(engine, "guests", {})}
        if 0 in stages:
            stages[0].register_forward_pre_hook(self._count_tokens)

    @property
    def rank(self) -> int:
        """The engine's global rank."""
        return int(self._engine.global_rank)

    def call(self, name: str, function: Callable[[], Any]) -> Any:
        """Record one call of the engine's method ``name``. What it calls is part of it."""
        self.busy = True
        try:
            return self._train(function) if name == "train_batch" else self._aside(name, function)
        finally:
            self.busy = False

    def record(self) -> RankRecord:
        """Everything until now."""
        ours = self._stock is None
        executor: Any = self._engine.executor if ours else self._stock
        self.timeline.settle()
        totals, kept = self.timeline.totals, self._memory
        return RankRecord(
            rank=self._engine.global_rank,
            stage=self._engine.stage_id,
            engine=OURS if ours else STOCK,
            schedule=executor.schedule.name if ours else "1f1b",
            options=dict(executor.schedule.options) if ours else {},
            stages=self._engine.num_stages,
            micro_batches=self._engine.micro_batches,
            steps=self.journal.steps,
            evaluations=self.journal.evaluations,
            events=list(self.timeline.events),
            run_seconds=totals.run,
            wait_seconds=totals.wait,
            peak_in_flight=executor.peak_in_flight,
            largest_gap=executor.largest_gap if ours else 0,
            planned_costs=executor.planner.costs if ours else None,
            clock=self.timeline.device.clock,
            memory=replace(Memory.largest(kept), peak=peak_bytes(self._engine.device)) if kept else None,
        )

    def _train(self, function: Callable[[], Any]) -> Any:
        engine = self._engine
        late = 0 if self._stock else engine.pipeline.windows_late
        with (
            self._stock.recording() if self._stock else nullcontext(),
            gauge(engine, self._memory) if self.journal.measures_next(late) else nullcontext(),
        ):
            loss, span = timed(function)
        tokens = None if self._tokens is None else self._tokens * engine.micro_batches * engine.grid.data_parallel_size
        self.journal.step(engine.global_steps, span, loss, engine.train_batch_size(), tokens)
        return loss

    def _aside(self, name: str, function: Callable[[], Any]) -> Any:
        result, span = timed(function)
        self.journal.interrupt(name)
        if name == "eval_batch":
            loss = result[0] if isinstance(result, tuple) else result
            self.journal.evaluation(self._engine.global_steps, span, loss)
        return result

    def _count_tokens(self, module: Any, arguments: tuple[Any, ...]) -> None:
        """Token identifiers are the first input of integers, alone or in a tuple."""
        inputs = arguments[0] if isinstance(arguments[0], tuple) else arguments
        whole = [tensor for tensor in inputs if isinstance(tensor, Tensor) and not tensor.is_floating_point()]
        if module.training and whole:
            self._tokens = whole[0].numel()


class StockTimeline:
    """The instructions of a stock engine as events named like ours.

    Attributes:
        timeline: the events.
        peak_in_flight: the most micro-batches that were forwarded and not yet backwarded.
    """

    def __init__(self, engine: Any) -> None:
        self.timeline = Timeline(KEPT_EVENTS, device_of(engine.device))
        self.peak_in_flight = 0
        self._stage = engine.stage_id
        self._counts: dict[type, int] = {}
        self._recording = False
        self._began: Mark | None = None
        # The engine looks its instructions up through itself, so that this one engine can have its own.
        engine._INSTRUCTION_MAP = {kind: self._wrap(kind, run) for kind, run in engine._INSTRUCTION_MAP.items()}
        engine._aggregate_total_loss = self._wrap_loss(engine._aggregate_total_loss)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Within it instructions are recorded; those of evaluations, outside, are not."""
        self._recording = True
        try:
            yield
        finally:
            self._recording = False

    def _wrap(self, kind: type, run: Callable[..., None]) -> Callable[..., None]:
        if kind in _BEFORE:
            return self._wrap_before(run)
        if kind not in _EVENTS:
            return run
        shift, letter, phase = _EVENTS[kind]

        @wraps(run)
        def recorded(engine: Any, **arguments: Any) -> None:
            if not self._recording:
                return run(engine, **arguments)
            index = self._counts.get(kind, 0)
            self._counts[kind] = index + 1
            began, self._began = self._began, None
            with self.timeline.span(str(Action(self._stage + shift, letter, index)), phase, began):
                run(engine, **arguments)
            in_flight = self._counts.get(stock.ForwardPass, 0) - self._counts.get(stock.BackwardPass, 0)
            self.peak_in_flight = max(self.peak_in_flight, in_flight)

        return recorded

    def _wrap_before(self, run: Callable[..., None]) -> Callable[..., None]:
        """Loading counts as part of the forward that follows, reducing as part of the update, as with ours."""

        @wraps(run)
        def recorded(engine: Any, **arguments: Any) -> None:
            if self._recording and self._began is None:
                self._began = self.timeline.device.mark()
            run(engine, **arguments)

        return recorded

    def _wrap_loss(self, aggregate: Callable[[], Any]) -> Callable[[], Any]:
        """All stages wait for the last one's loss at the end of a step."""

        @wraps(aggregate)
        def recorded() -> Any:
            with self.timeline.span("loss", WAIT):
                return aggregate()

        return recorded


_BEFORE = {stock.LoadMicroBatch, stock.ReduceTiedGrads, stock.ReduceGrads}
_EVENTS: dict[type, tuple[int, str, str]] = {
    stock.ForwardPass: (0, FORWARD, RUN),
    stock.BackwardPass: (0, BACKWARD, RUN),
    stock.OptimizerStep: (0, UPDATE, RUN),
    stock.RecvActivation: (0, FORWARD, WAIT),
    stock.RecvGrad: (0, BACKWARD, WAIT),
    stock.SendActivation: (1, FORWARD, WAIT),
    stock.SendGrad: (-1, BACKWARD, WAIT),
}
"""For every instruction the action that it is, or that its message is for: the stage (counted from the engine's) and
the kind; and the phase."""


def record_to(directory: Path) -> None:
    """Record every pipeline engine of this process, and write ``directory/rank<r>.json`` every minute and at exit.

    Where a job makes several engines, the file is that of the one which trained last.
    """
    output = Output(directory)

    def wrap(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def recorded(engine: Any, *args: Any, **kwargs: Any) -> Any:
            recorder = _recorder_of(engine)
            if recorder.busy:
                return method(engine, *args, **kwargs)
            result = recorder.call(name, lambda: method(engine, *args, **kwargs))
            if name == "train_batch":
                output.stepped(recorder)
            return result

        return recorded

    for kind in (PipelineEngine, ScheduledPipelineEngine):
        for name in RECORDED_METHODS:
            if kind is PipelineEngine or name in vars(kind):
                setattr(kind, name, wrap(name, getattr(kind, name)))


def _recorder_of(engine: Any) -> Recorder:
    """The recorder of ``engine``, which keeps it."""
    if not hasattr(engine, "amdp_recorder"):
        engine.amdp_recorder = Recorder(engine)
    recorder: Recorder = engine.amdp_recorder
    return recorder
