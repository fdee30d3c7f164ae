"""Records a job from outside: what every rank did and waited for, under stock Megatron and our schedules alike.

    python -m amdp_plugin.megatron --record DIR script.py ...

Times are those of the host. On the CPU they are what the work took; a GPU works on after the host has gone on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial, wraps
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from megatron.core import dist_checkpointing
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import schedules
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

from ..compare.recorder import Output
from ..plan.action import BACKWARD, FORWARD
from .hook import ScheduledForwardBackward
from .recorder import Recorder
from .stock_timeline import MESSAGES, StockTimeline

STOCK_SCHEDULES = ("forward_backward_pipelining_without_interleaving", "forward_backward_no_pipelining")
INTERLEAVED = "forward_backward_pipelining_with_interleaving"


def record_to(directory: Path) -> Output:
    """Record what this process trains, and write ``directory/rank<r>.json`` every minute and at exit.

    Call it before the training loop asks Megatron for its schedule; nothing else in a loop has to change. Where a job
    makes several schedules, the file is that of the one which trained last.

    Returns:
        What writes; its ``write`` does so at once.
    """
    process = _Process(Output(directory))
    for name in STOCK_SCHEDULES:
        _replace(schedules, name, process.wrap_schedule)
    _replace(schedules, INTERLEAVED, _refuse)
    _replace(schedules, "forward_step", partial(process.wrap_compute, FORWARD))
    _replace(schedules, "backward_step", partial(process.wrap_compute, BACKWARD))
    for name in MESSAGES:
        _replace(P2PCommunicator, name, partial(process.wrap_message, name))
    for kind in _with_subclasses(MegatronOptimizer):
        if "step" in vars(kind):
            _replace(kind, "step", process.wrap_step)
    _replace(ScheduledForwardBackward, "__call__", process.wrap_hook)
    for owner, name in (
        (ScheduledForwardBackward, "quiesce"),
        (dist_checkpointing, "save"),
        (dist_checkpointing, "load"),
    ):
        _replace(owner, name, partial(process.wrap_interruption, name))
    return process.output


class _Process:
    """The recorders of this process, and what leads Megatron's calls to them."""

    def __init__(self, output: Output) -> None:
        self.output = output
        self._of_hooks: WeakKeyDictionary[ScheduledForwardBackward, Recorder] = WeakKeyDictionary()
        self._of_stock: Recorder | None = None
        self._latest: Recorder | None = None
        self._is_called = False
        self._awaits_update = False

    def wrap_schedule(self, schedule: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(schedule)
        def recorded(**arguments: Any) -> Any:
            if self._is_called:  # ours evaluates with it
                return schedule(**arguments)
            self._of_stock = self._of_stock or Recorder(None, self.output)
            return self._call(self._of_stock, partial(schedule, **arguments), arguments)

        return recorded

    def wrap_hook(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def recorded(hook: ScheduledForwardBackward, **arguments: Any) -> Any:
            if hook not in self._of_hooks:
                self._of_hooks[hook] = Recorder(hook, self.output)
            return self._call(self._of_hooks[hook], partial(method, hook, **arguments), arguments)

        return recorded

    def wrap_step(self, step: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(step)
        def recorded(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            awaited, self._awaits_update = self._awaits_update, False  # a chained optimizer steps others
            run = partial(step, optimizer, *args, **kwargs)
            return self._latest.update(optimizer, run) if awaited and self._latest else run()

        return recorded

    def wrap_compute(self, kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def recorded(*args: Any, **kwargs: Any) -> Any:
            stock, run = self._recording_stock(), partial(function, *args, **kwargs)
            return stock.compute(kind, run) if stock else run()

        return recorded

    def wrap_message(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def recorded(*args: Any, **kwargs: Any) -> Any:
            stock, run = self._recording_stock(), partial(method, *args, **kwargs)
            return stock.communicate(name, run) if stock else run()

        return recorded

    def wrap_interruption(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def recorded(*args: Any, **kwargs: Any) -> Any:
            if self._latest is not None:
                self._latest.journal.interrupt(name)
            return function(*args, **kwargs)

        return recorded

    def _call(self, recorder: Recorder, function: Callable[[], Any], arguments: Mapping[str, Any]) -> Any:
        self._is_called = True
        try:
            if arguments.get("forward_only"):
                return recorder.evaluate(function)
            self._latest, self._awaits_update = recorder, True
            return recorder.train(function, arguments)
        finally:
            self._is_called = False

    def _recording_stock(self) -> StockTimeline | None:
        stock = self._of_stock and self._of_stock.stock
        return stock if stock and stock.is_recording else None


def _refuse(schedule: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(schedule)
    def refused(**arguments: Any) -> Any:
        raise ValueError("interleaved virtual stages cannot be recorded: leave out the virtual pipeline size")

    return refused


def _replace(owner: Any, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    setattr(owner, name, wrap(getattr(owner, name)))


def _with_subclasses(kind: type[Any]) -> Iterator[type[Any]]:
    yield kind
    for subclass in type.__subclasses__(kind):
        yield from _with_subclasses(subclass)
