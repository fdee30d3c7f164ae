"""The comparison as a trace to open in Perfetto (ui.perfetto.dev)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from ..plan.action import BACKWARD, FORWARD, REDUCE, UPDATE, Action
from ..runtime.timeline import RUN
from .measured import Message, Run

CATEGORIES = {FORWARD: "forward", BACKWARD: "backward", REDUCE: "reduce", UPDATE: "update"}
MICROSECONDS = 1e6


def trace(runs: Sequence[Run]) -> str:
    """JSON in the Trace Event Format: one process a run, one track a rank, arrows for messages.

    Microseconds; every run begins at 0 with its first step.
    """
    events = [event for number, run in enumerate(runs) for event in _trace_events(run, number)]
    return json.dumps({"displayTimeUnit": "ms", "traceEvents": events})


def _trace_events(run: Run, process: int) -> Iterator[dict[str, Any]]:
    origin = min(record.steps[0].start for record in run.records)
    stages = run.schedule().placement.stages
    yield {"ph": "M", "pid": process, "name": "process_name", "args": {"name": f"{run.label} (measured)"}}
    for record in run.records:
        track = {"pid": process, "tid": record.rank}
        held = " ".join(map(str, stages[record.stage]))
        yield {**track, "ph": "M", "name": "thread_name", "args": {"name": f"rank {record.rank}, stage {held}"}}
        yield {**track, "ph": "M", "name": "thread_sort_index", "args": {"sort_index": record.rank}}
        for event in record.events:
            kind = CATEGORIES[Action.parse(event.name).kind] if event.phase == RUN else event.phase
            name = event.name if event.phase == RUN else f"{event.phase} {event.name}"
            yield {**track, "ph": "X", "cat": kind, "name": name, **_span(event.start, event.end, origin)}
        for evaluation in record.evaluations:
            span = _span(evaluation.start, evaluation.end, origin)
            yield {**track, "ph": "X", "cat": "evaluation", "name": "evaluation", **span}
    for message in run.messages():
        yield from _arrow(message, process, origin)


def _arrow(message: Message, process: int, origin: float) -> Iterator[dict[str, Any]]:
    sent, wait = message.sent, message.wait
    arrow = {"pid": process, "cat": "message", "name": wait.name, "id": f"{process}:{sent.name}>{wait.name}"}
    # Just before its end: at the end itself the sender's next slice begins.
    yield {**arrow, "ph": "s", "tid": message.sender, "ts": (sent.end - origin) * MICROSECONDS - 1}
    yield {**arrow, "ph": "f", "bp": "e", "tid": message.receiver, "ts": (wait.end - origin) * MICROSECONDS - 0.1}


def _span(start: float, end: float, origin: float) -> dict[str, float]:
    return {"ts": (start - origin) * MICROSECONDS, "dur": (end - start) * MICROSECONDS}
