"""A predicted run as a Chrome trace, to open in Perfetto (ui.perfetto.dev)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from .action import UPDATE
from .schedule import Place
from .simulate import in_flight
from .timing import Span, Timing

TICKS_PER_MICROSECOND = 1000
CATEGORIES = {"F": "forward", "B": "backward", "R": "reduce", "U": "update"}
HEAD_START = 1
"""Nanoseconds before its end at which an action's message leaves: at the end itself the next action begins."""

Event = dict[str, Any]


def chrome_trace(timing: Timing) -> str:
    """JSON in the Trace Event Format: a track a rank, arrows for messages, counters for what is in flight and for
    versions. Timestamps are microseconds of the cost model's time."""
    events = [*_tracks(timing), *_slices(timing), *_arrows(timing), *_counters(timing)]
    return json.dumps({"displayTimeUnit": "ms", "traceEvents": events})


def _tracks(timing: Timing) -> Iterator[Event]:
    yield {"ph": "M", "pid": 0, "name": "process_name", "args": {"name": f"{timing.program.schedule.name} (planned)"}}
    for rank in range(len(timing.spans)):
        yield {"ph": "M", "pid": 0, "tid": rank, "name": "thread_name", "args": {"name": f"rank {rank}"}}
        yield {"ph": "M", "pid": 0, "tid": rank, "name": "thread_sort_index", "args": {"sort_index": rank}}


def _slices(timing: Timing) -> Iterator[Event]:
    micro_batches = timing.program.schedule.micro_batches
    for rank, (row, spans) in enumerate(zip(timing.program.rows, timing.spans, strict=True)):
        for action, (start, end) in zip(row, spans, strict=True):
            yield {
                "ph": "X",
                "pid": 0,
                "tid": rank,
                "ts": _microseconds(start),
                "dur": _microseconds(end - start),
                "name": str(action),
                "cat": CATEGORIES[action.kind],
                "args": {"stage": action.stage, "window": action.window(micro_batches)},
            }


def _arrows(timing: Timing) -> Iterator[Event]:
    schedule = timing.program.schedule
    spans: dict[Place, Span] = {
        (rank, action): span
        for rank, row in enumerate(timing.program.rows)
        for action, span in zip(row, timing.spans[rank], strict=True)
    }
    for (rank, action), (_, end) in spans.items():
        target = schedule.message(rank, action)
        if target is None or target not in spans:
            continue
        arrow = {"pid": 0, "cat": "message", "name": f"{action} to {target[1]}", "id": f"{action}>{target[1]}"}
        yield {**arrow, "ph": "s", "tid": rank, "ts": _microseconds(end - HEAD_START)}
        yield {**arrow, "ph": "f", "bp": "e", "tid": target[0], "ts": _microseconds(spans[target][0])}


def _counters(timing: Timing) -> Iterator[Event]:
    sharing = timing.program.schedule.sharing
    for rank, (row, spans) in enumerate(zip(timing.program.rows, timing.spans, strict=True)):
        version = dict.fromkeys(sharing.units[rank], 0)
        flying = 0
        for action, count, (_, end) in zip(row, in_flight(timing.program, rank), spans, strict=True):
            counter = {"ph": "C", "pid": 0, "ts": _microseconds(end)}
            if count != flying:
                flying = count
                yield {**counter, "name": f"in flight, rank {rank}", "args": {"micro-batches": count}}
            if action.kind == UPDATE:
                version[action.stage] += 1
                shown = {sharing.called(unit): updates for unit, updates in version.items()}
                yield {**counter, "name": f"version, rank {rank}", "args": shown}


def _microseconds(ticks: int) -> float:
    return ticks / TICKS_PER_MICROSECOND
