"""``amdp plan``: what a schedule gives and costs, before a run."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from enum import Enum
from math import inf
from pathlib import Path
from typing import Annotated, Any

import typer

from . import schedules
from .collection import uncollected
from .costs import CostModel
from .planner import Planner
from .render import text_grid
from .report import report
from .simulate import simulate

GRID_LINES = 400
EXIT_DEADLOCK = 1


class Format(str, Enum):
    """What ``amdp plan`` writes."""

    text = "text"
    json = "json"
    csv = "csv"
    png = "png"
    trace = "trace"


def plan(
    schedule: Annotated[str, typer.Option(help=f"Its name: {', '.join(schedules.BUILT_IN)}, or another package's.")],
    stages: Annotated[int, typer.Option(help="Stages of the pipeline.")],
    micro_batches: Annotated[int, typer.Option(help="Micro-batches of a window, that is, of one optimizer step.")],
    windows: Annotated[int, typer.Option(help="Windows to show.")] = 4,
    backward_ratio: Annotated[float, typer.Option(help="Time of a backward, in forwards.")] = 2.0,
    link_cost: Annotated[float, typer.Option(help="Time of a message between ranks, in forwards of one stage.")] = 0.0,
    stage_costs: Annotated[
        str | None, typer.Option(help="Time of every stage's forward, where they differ, as in 1,1,1,1.5.")
    ] = None,
    compensation: Annotated[
        str, typer.Option(help="What is done about gradients that are late: none or error_feedback.")
    ] = "none",
    strength: Annotated[float, typer.Option(help="Of error feedback, in units of the plan's own figure.")] = 1.0,
    flush_first: Annotated[int, typer.Option(help="Windows at the start of a job that end with a flush.")] = 0,
    decisions: Annotated[
        str, typer.Option(help="How stages decide what concerns all: auto, local, latest, relayed or meeting.")
    ] = "auto",
    tied: Annotated[
        list[str] | None, typer.Option(help="Stages that share a weight, as in 0,3 (for a further weight, again).")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="An option of the schedule's own, as key=value (for another, again).")
    ] = None,
    format: Annotated[Format, typer.Option(help="What to write.")] = Format.text,
    out: Annotated[Path | None, typer.Option(help="File to write to, instead of standard output.")] = None,
) -> int:
    """Print or draw a schedule: utilization, bubble, version gap, what is in flight, and the order of work."""
    if windows < 1:
        raise ValueError(f"--windows is at least 1, got {windows}")
    if not 0 < backward_ratio < inf:
        raise ValueError(f"--backward-ratio is above 0, got {backward_ratio}")
    if not 0 <= link_cost < inf:
        raise ValueError(f"--link-cost is at least 0, got {link_cost}")
    chosen = schedules.make(
        schedule, stages, micro_batches, compensation=compensation, strength=strength, flush_first=flush_first,
        decisions=decisions, tied=tuple(map(_read_stages, tied or ())), **_read_options(schedule, option or ()),
    )  # fmt: skip
    costs = CostModel.relative(
        stages, backward_ratio=backward_ratio, link_cost=link_cost, stage_costs=_read_costs(stage_costs or "")
    )
    with uncollected():
        content, deadlock_free = _content(Planner(chosen, costs), windows, format)
    _write(content, out)
    return 0 if deadlock_free else EXIT_DEADLOCK


def _read_costs(text: str) -> list[float]:
    try:
        return [float(cost) for cost in text.split(",")] if text else []
    except ValueError:
        raise ValueError(f"--stage-costs wants numbers, as in 1,1,1,1.5, got {text!r}") from None


def _read_stages(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(stage) for stage in text.split(","))
    except ValueError:
        raise ValueError(f"--tied wants numbers of stages, as in 0,3, got {text!r}") from None


def _read_options(schedule: str, settings: Sequence[str]) -> dict[str, Any]:
    chosen = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise ValueError(f"--option wants key=value, got {setting!r}")
        chosen[key.strip()] = schedules.read_option(schedule, key.strip(), value.strip())
    return chosen


def _content(planner: Planner, windows: int, format: Format) -> tuple[bytes, bool]:
    """What to write, and whether the schedule is free of deadlock (only judged where it is reported)."""
    program = planner.program(windows)
    if format is Format.csv:
        return program.to_csv().encode(), True
    timing = simulate(program, planner.costs)
    if format is Format.trace:
        from .trace import chrome_trace

        return f"{chrome_trace(timing)}\n".encode(), True
    found = report(planner, windows, on_devices=True)
    if format is Format.png:
        from .picture import png

        return png(timing, found), found.deadlock_free
    if format is Format.json:
        return f"{found.to_json()}\n".encode(), found.deadlock_free
    width = shutil.get_terminal_size((120, 40)).columns
    lines = [*found.to_text(width).splitlines(), "", *text_grid(program, timing=timing, width=width).splitlines()]
    if len(lines) > GRID_LINES:
        rest = f"... {len(lines) - GRID_LINES} more lines: see fewer --windows, or --format png, csv or trace"
        lines = [*lines[:GRID_LINES], rest]
    return "\n".join([*lines, ""]).encode(), found.deadlock_free


def _write(content: bytes, out: Path | None) -> None:
    if out is None:
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()
    else:
        out.write_bytes(content)
