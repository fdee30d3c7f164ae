"""The comparison as a picture, and as a trace to open in Perfetto (ui.perfetto.dev)."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..plan.action import BACKWARD, FORWARD, UPDATE, Action
from ..plan.picture import BAR_HEIGHT, DOTS_PER_INCH, IDLE, SHADES
from ..runtime.timeline import RUN, Event
from .measured import Run
from .recording import RankRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 12.0
CURVES_HEIGHT, INCHES_PER_RANK, REST_HEIGHT = 3.6, 0.3, 1.6
"""Inches of the panels and of titles and axes between them."""
COLOURS = ("#555555", "#d1631b", "#2f6db5", "#3a8f5a", "#8a4fa3", "#b8860b")
"""Of the runs; they begin again after the last. The first is the baseline's."""
SMOOTHING = 10
"""Steps of the moving average of the training loss."""
SHOWN_STEPS = 3
"""Steps of the slowest run that the stretch of the timeline is long."""
GAP_BETWEEN_RUNS = 0.6
"""Free space between the ranks of two runs, in ranks."""
CATEGORIES = {FORWARD: "forward", BACKWARD: "backward", UPDATE: "update"}
MICROSECONDS = 1e6


def picture(runs: Sequence[Run]) -> bytes:
    """A PNG file's bytes: loss over tokens, loss over seconds, and a stretch of every rank's timeline."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = sum(len(run.records) for run in runs) + GAP_BETWEEN_RUNS * (len(runs) - 1)
    timeline_height = 0.5 + lines * INCHES_PER_RANK
    size = (WIDTH, CURVES_HEIGHT + timeline_height + REST_HEIGHT)
    figure = Figure(figsize=size, dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2, height_ratios=(CURVES_HEIGHT, timeline_height))
    over_tokens = figure.add_subplot(grid[0, 0])
    over_seconds = figure.add_subplot(grid[0, 1], sharey=over_tokens)
    _draw_losses(over_tokens, runs, over="tokens")
    _draw_losses(over_seconds, runs, over="seconds")
    _draw_timeline(figure, figure.add_subplot(grid[1, :]), runs)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def _draw_losses(axes: Axes, runs: Sequence[Run], over: str) -> None:
    for run, colour in zip(runs, _colours(runs), strict=True):
        steps = [step for step in run.first.steps if step.loss is not None]
        losses = [step.loss for step in steps if step.loss is not None]
        start = run.first.steps[0].start
        each = run.first.steps[-1].tokens or run.first.steps[-1].samples
        across = [step.step * each if over == "tokens" else step.end - start for step in steps]
        axes.plot(across, losses, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(across, _smooth(losses), color=colour, linewidth=1.8, label=f"{run.label}, training")
        held_out = [
            (evaluation.step * each if over == "tokens" else evaluation.end - start, evaluation.loss)
            for evaluation in run.first.evaluations
            if evaluation.loss is not None
        ]
        if held_out:
            places, values = zip(*held_out, strict=True)
            style: dict[str, Any] = {"linestyle": "none", "marker": "o", "markersize": 6, "markeredgecolor": "white"}
            axes.plot(places, values, color=colour, label=f"{run.label}, validation", zorder=4, **style)
    tokens = "tokens" if runs[0].first.steps[-1].tokens else "samples"
    title, label = f"loss over {tokens}", tokens
    if over == "seconds":
        title, label = "loss over seconds, evaluations included", "seconds since the first step began"
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(label, fontsize=9)
    axes.set_ylabel("loss", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(color="#eeeeee")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)


def _smooth(losses: Sequence[float]) -> list[float]:
    """Mean of up to the latest ``SMOOTHING`` values."""
    parts = [losses[max(0, end - SMOOTHING) : end] for end in range(1, len(losses) + 1)]
    return [sum(part) / len(part) for part in parts]


def _draw_timeline(figure: Figure, axes: Axes, runs: Sequence[Run]) -> None:
    length = SHOWN_STEPS * max(run.seconds_per_step for run in runs)
    line, ticks = 0.0, []
    for run in runs:
        start = _undisturbed(run)
        for record in run.records:
            ticks.append((line, f"{run.label}  rank {record.rank}"))
            _draw_rank(axes, record, line, start, length)
            line += 1
        line += GAP_BETWEEN_RUNS
    axes.set_xlim(0, length * 1e3)
    axes.set_ylim(line - GAP_BETWEEN_RUNS - 0.5, -0.5)
    axes.set_yticks([place for place, _ in ticks], [label for _, label in ticks])
    axes.tick_params(labelsize=8, length=3)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_xlabel("milliseconds", fontsize=9)
    axes.set_title("a stretch of the measured timelines, as long for all", fontsize=10, loc="left")
    _add_legend(axes)


def _draw_rank(axes: Axes, record: RankRecord, line: float, start: float, length: float) -> None:
    axes.broken_barh([(0, length * 1e3)], (line - BAR_HEIGHT / 2, BAR_HEIGHT), facecolors=IDLE, linewidth=0, zorder=1)
    for event in record.events:
        if event.phase != RUN or event.end < start or event.start > start + length:
            continue
        action = Action.parse(event.name)
        shades = SHADES[action.kind]
        colour = shades[action.window(record.micro_batches) % len(shades)]
        span = ((event.start - start) * 1e3, (event.end - event.start) * 1e3)
        edge: dict[str, Any] = {"edgecolors": "white", "linewidth": 0.4}
        axes.broken_barh([span], (line - BAR_HEIGHT / 2, BAR_HEIGHT), facecolors=colour, zorder=2, **edge)


def _add_legend(axes: Axes) -> None:
    from matplotlib.patches import Patch

    handles = [
        Patch(facecolor=SHADES[FORWARD][1], label="forward"),
        Patch(facecolor=SHADES[BACKWARD][1], label="backward (shade: step)"),
        Patch(facecolor=SHADES[UPDATE][0], label="update"),
        Patch(facecolor=IDLE, edgecolor="#cccccc", label="waiting and everything else"),
    ]
    place: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0), "borderaxespad": 0.2}
    axes.legend(handles=handles, ncols=len(handles), fontsize=8, frameon=False, **place)


def _undisturbed(run: Run) -> float:
    """An instant two thirds through the run, from which on some steps follow each other."""
    intervals = run.intervals[0]
    last = max(1, len(intervals) - SHOWN_STEPS - 1)
    wanted = len(intervals) * 2 // 3
    places = [
        place
        for place in range(last)
        if intervals[min(place + SHOWN_STEPS, len(intervals) - 1)].step.step == intervals[place].step.step + SHOWN_STEPS
    ]
    return intervals[min(places or [0], key=lambda place: abs(place - wanted))].start


def _colours(runs: Sequence[Run]) -> list[str]:
    return [COLOURS[number % len(COLOURS)] for number in range(len(runs))]


def trace(runs: Sequence[Run]) -> str:
    """JSON in the Trace Event Format: one process a run, one track a rank, arrows for messages.

    Microseconds; every run begins at 0 with its first step.
    """
    events = [event for number, run in enumerate(runs) for event in _trace_events(run, number)]
    return json.dumps({"displayTimeUnit": "ms", "traceEvents": events})


def _trace_events(run: Run, process: int) -> Iterator[dict[str, Any]]:
    origin = min(record.steps[0].start for record in run.records)
    yield {"ph": "M", "pid": process, "name": "process_name", "args": {"name": f"{run.label} (measured)"}}
    for record in run.records:
        track = {"pid": process, "tid": record.rank}
        yield {**track, "ph": "M", "name": "thread_name", "args": {"name": f"rank {record.rank}, stage {record.stage}"}}
        yield {**track, "ph": "M", "name": "thread_sort_index", "args": {"sort_index": record.rank}}
        for event in record.events:
            kind = CATEGORIES[Action.parse(event.name).kind] if event.phase == RUN else event.phase
            name = event.name if event.phase == RUN else f"{event.phase} {event.name}"
            yield {**track, "ph": "X", "cat": kind, "name": name, **_span(event.start, event.end, origin)}
        for evaluation in record.evaluations:
            span = _span(evaluation.start, evaluation.end, origin)
            yield {**track, "ph": "X", "cat": "evaluation", "name": "evaluation", **span}
    stages = {record.stage: record.rank for record in run.one_replica()}
    for sent, received in run.messages():
        yield from _arrow(sent, received, stages, {"pid": process, "cat": "message", "name": received.name}, origin)


def _arrow(
    sent: Event, received: Event, ranks: dict[int, int], arrow: dict[str, Any], origin: float
) -> Iterator[dict[str, Any]]:
    sender, receiver = Action.parse(sent.name).stage, Action.parse(received.name).stage
    arrow = {**arrow, "id": f"{arrow['pid']}:{sent.name}>{received.name}"}
    # Just before its end: at the end itself the sender's next slice begins.
    yield {**arrow, "ph": "s", "tid": ranks[sender], "ts": (sent.end - origin) * MICROSECONDS - 1}
    yield {**arrow, "ph": "f", "bp": "e", "tid": ranks[receiver], "ts": (received.end - origin) * MICROSECONDS - 0.1}


def _span(start: float, end: float, origin: float) -> dict[str, float]:
    return {"ts": (start - origin) * MICROSECONDS, "dur": (end - start) * MICROSECONDS}
