"""The comparison as a picture: losses, a stretch of the timelines, memory."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..plan.action import BACKWARD, FORWARD, REDUCE, UPDATE, Action
from ..plan.picture import BAR_HEIGHT, DOTS_PER_INCH, IDLE, SHADES
from ..runtime.timeline import RUN
from .measured import Run
from .recording import Memory, RankRecord
from .table import readable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.patches import Patch

WIDTH = 12.0
CURVES_HEIGHT, INCHES_PER_RANK, REST_HEIGHT, MEMORY_REST_HEIGHT = 3.6, 0.3, 1.6, 0.4
"""Inches of the panels and of titles and axes between them."""
COLOURS = ("#555555", "#d1631b", "#2f6db5", "#3a8f5a", "#8a4fa3", "#b8860b")
"""Of the runs; they begin again after the last. The first is the baseline's."""
SMOOTHING = 10
"""Steps of the moving average of the training loss."""
SHOWN_STEPS = 3
"""Steps of the slowest run that the stretch of the timeline is long."""
GAP_BETWEEN_RUNS = 0.6
"""Free space between the ranks of two runs, in ranks."""
ACTION_SHADES = {**SHADES, REDUCE: ("#8a8a8a",)}
MEMORY_COLOURS = {
    "weights": "#3b4a5a", "gradients": "#7f97ad", "optimizer_state": "#bccbd8", "exchange": "#d9a441",
}  # fmt: skip
LABELLED_SHARE = 0.08
"""Of the longest memory bar, from which on a part of a bar has room for its size."""


def picture(runs: Sequence[Run]) -> bytes:
    """A PNG file's bytes: loss over tokens, loss over seconds, a stretch of every rank's timeline, and what the fullest
    rank of each run keeps in memory."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = sum(len(run.records) for run in runs) + GAP_BETWEEN_RUNS * (len(runs) - 1)
    timeline_height = 0.5 + lines * INCHES_PER_RANK
    memory = [(run.label, max(kept, key=lambda each: each.kept)) for run in runs if (kept := list(_measured(run)))]
    heights = [CURVES_HEIGHT, timeline_height, *([len(memory) * INCHES_PER_RANK] if memory else [])]
    rest = REST_HEIGHT + (MEMORY_REST_HEIGHT if memory else 0.0)
    figure = Figure(figsize=(WIDTH, sum(heights) + rest), dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)
    over_tokens = figure.add_subplot(grid[0, 0])
    over_seconds = figure.add_subplot(grid[0, 1], sharey=over_tokens)
    _draw_losses(over_tokens, runs, over="tokens")
    _draw_losses(over_seconds, runs, over="seconds")
    _draw_timeline(figure.add_subplot(grid[1, :]), runs)
    if memory:
        _draw_memory(figure.add_subplot(grid[2, :]), memory)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def _draw_losses(axes: Axes, runs: Sequence[Run], over: str) -> None:
    for run, colour in zip(runs, _colours(runs), strict=True):
        told = [(step, loss) for step, loss in zip(run.first.steps, run.losses, strict=False) if loss is not None]
        losses = [loss for _, loss in told]
        start = run.first.steps[0].start
        each = run.first.steps[-1].tokens or run.first.steps[-1].samples
        across = [step.step * each if over == "tokens" else step.end - start for step, _ in told]
        axes.plot(across, losses, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(across, _smooth(losses), color=colour, linewidth=1.8, label=f"{run.label}, training")
        held_out = [
            (evaluation.step * each if over == "tokens" else evaluation.end - start, evaluation.loss)
            for evaluation in run.evaluations
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


def _draw_timeline(axes: Axes, runs: Sequence[Run]) -> None:
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
    kinds = {Action.parse(event.name).kind for run in runs for event in run.first.events if event.phase == RUN}
    _add_legend(axes, _timeline_patches(reduces=REDUCE in kinds))


def _draw_rank(axes: Axes, record: RankRecord, line: float, start: float, length: float) -> None:
    axes.broken_barh([(0, length * 1e3)], (line - BAR_HEIGHT / 2, BAR_HEIGHT), facecolors=IDLE, linewidth=0, zorder=1)
    for event in record.events:
        if event.phase != RUN or event.end < start or event.start > start + length:
            continue
        action = Action.parse(event.name)
        shades = ACTION_SHADES[action.kind]
        colour = shades[action.window(record.micro_batches) % len(shades)]
        span = ((event.start - start) * 1e3, (event.end - event.start) * 1e3)
        edge: dict[str, Any] = {"edgecolors": "white", "linewidth": 0.4}
        axes.broken_barh([span], (line - BAR_HEIGHT / 2, BAR_HEIGHT), facecolors=colour, zorder=2, **edge)


def _timeline_patches(reduces: bool) -> list[Patch]:
    from matplotlib.patches import Patch

    return [
        Patch(facecolor=SHADES[FORWARD][1], label="forward"),
        Patch(facecolor=SHADES[BACKWARD][1], label="backward (shade: step)"),
        *([Patch(facecolor=ACTION_SHADES[REDUCE][0], label="reduce")] if reduces else []),
        Patch(facecolor=SHADES[UPDATE][0], label="update"),
        Patch(facecolor=IDLE, edgecolor="#cccccc", label="waiting and everything else"),
    ]


def _add_legend(axes: Axes, handles: Sequence[Patch]) -> None:
    place: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0), "borderaxespad": 0.2}
    axes.legend(handles=handles, ncols=len(handles), fontsize=8, frameon=False, **place)


def _measured(run: Run) -> Iterator[Memory]:
    return (memory for memory in run.memory_by_rank if memory)


def _draw_memory(axes: Axes, bars: Sequence[tuple[str, Memory]]) -> None:
    """A bar for every run: its fullest rank."""
    from matplotlib.patches import Patch

    longest = max(memory.kept for _, memory in bars)
    for line, (_, memory) in enumerate(bars):
        start = 0
        for name, colour in MEMORY_COLOURS.items():
            size = getattr(memory, name)
            axes.barh(line, size, BAR_HEIGHT, start, color=colour, edgecolor="white", linewidth=0.4)
            if size > LABELLED_SHARE * longest:
                place: dict[str, Any] = {"ha": "center", "va": "center_baseline", "fontsize": 8}
                dark = name == "weights"
                axes.text(start + size / 2, line, readable(size), color="white" if dark else "#222222", **place)
            start += size
        axes.text(start + longest / 100, line, readable(start), ha="left", va="center_baseline", fontsize=8)
    axes.set_xlim(0, longest * (1 + LABELLED_SHARE))
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.set_yticks(range(len(bars)), [label for label, _ in bars])
    axes.set_xticks([])
    axes.tick_params(labelsize=8, length=0)
    axes.spines[:].set_visible(False)
    axes.set_title("memory of the fullest rank, without activations", fontsize=10, loc="left")
    patches = [Patch(facecolor=colour, label=name.replace("_", " ")) for name, colour in MEMORY_COLOURS.items()]
    _add_legend(axes, patches)


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
