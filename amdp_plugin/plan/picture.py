"""A predicted run as a picture: time from left to right, a line a rank. Needs matplotlib."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from .action import BACKWARD, FORWARD, REDUCE, UPDATE
from .costs import TICKS_PER_SECOND
from .placement import Placement
from .report import Report
from .timing import Timing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHADES = {
    FORWARD: ("#2f6db5", "#5f95d0", "#9cc2ea"),
    BACKWARD: ("#d1631b", "#e78a47", "#f5b98b"),
    UPDATE: ("#222222",),
}
"""Colours of the kinds, by window; they begin again after the last."""
LEGEND_SHADE = 1
DARK_SHADES = 2
"""How many of the shades take white text."""
IDLE = "#f2f2f2"
BAR_HEIGHT = 0.84
EDGE = 0.3
"""Points of the white line around a bar."""

DOTS_PER_INCH = 130
POINTS_PER_INCH = 72
INCHES_PER_RANK = 0.36
NARROWEST, WIDEST = 9.0, 26.0
"""Inches of the picture. Between these it is as wide as its micro-batch numbers need."""
INCHES_PER_FORWARD = 0.16
MARGINS = (0.6, 0.3, 0.68, 0.8)
"""Inches left, right, above (title) and below (axis, legend)."""
SMALLEST_TEXT, LARGEST_TEXT = 4.5, 8.0
"""Points."""
INCHES_PER_LETTER = 0.055
DIGIT_WIDTH = 0.66
"""Width of a digit with its share of the margin, in text sizes."""


class Bar(NamedTuple):
    """One action as drawn; times in forwards of one stage."""

    rank: int
    kind: str
    number: int
    window: int
    start: float
    length: float


def png(timing: Timing, report: Report) -> bytes:
    """The picture as a PNG file's bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    unit = TICKS_PER_SECOND * sum(timing.costs.forward) / timing.costs.num_stages
    bars = list(_bars(timing, unit))
    end = max((bar.start + bar.length for bar in bars), default=1.0)
    ranks = len(timing.spans)
    left, right, above, below = MARGINS
    labels = _rank_labels(timing.program.schedule.placement)
    left += max(map(len, labels)) * INCHES_PER_LETTER
    width = min(WIDEST, max(NARROWEST, left + right + end * INCHES_PER_FORWARD))
    height = above + below + ranks * INCHES_PER_RANK
    figure = Figure(figsize=(width, height), dpi=DOTS_PER_INCH)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((left / width, below / height, 1 - (left + right) / width, 1 - (above + below) / height))
    _draw_bars(axes, bars, ranks)
    axes.set_xlim(0, end)
    axes.set_ylim(ranks - 0.5, -0.5)
    _draw_numbers(axes, bars, (width - left - right) / end)
    _draw_updates(axes, bars)
    _label(axes, report, labels)
    _add_legend(figure, bars)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def _bars(timing: Timing, unit: float) -> Iterator[Bar]:
    micro_batches = timing.program.schedule.micro_batches
    for rank, (row, spans) in enumerate(zip(timing.program.rows, timing.spans, strict=True)):
        for action, (start, end) in zip(row, spans, strict=True):
            window = action.window(micro_batches)
            yield Bar(rank, action.kind, action.index, window, start / unit, (end - start) / unit)


def _draw_bars(axes: Axes, bars: Sequence[Bar], ranks: int) -> None:
    for rank in range(ranks):
        last = max((bar.start + bar.length for bar in bars if bar.rank == rank), default=0.0)
        axes.broken_barh([(0, last)], (rank - BAR_HEIGHT / 2, BAR_HEIGHT), facecolors=IDLE, linewidth=0, zorder=1)
    groups: dict[tuple[int, str], list[Bar]] = {}
    for bar in bars:
        if bar.length and bar.kind in SHADES:
            groups.setdefault((bar.rank, _colour(bar)), []).append(bar)
    for (rank, colour), group in groups.items():
        spans = [(bar.start, bar.length) for bar in group]
        line: dict[str, Any] = {"edgecolors": "white", "linewidth": EDGE}
        axes.broken_barh(spans, (rank - BAR_HEIGHT / 2, BAR_HEIGHT), facecolors=colour, zorder=2, **line)


def _colour(bar: Bar) -> str:
    shades = SHADES[bar.kind]
    return shades[bar.window % len(shades)]


def _draw_numbers(axes: Axes, bars: Sequence[Bar], inches_per_unit: float) -> None:
    """Micro-batch numbers, in one size for all forwards and one for all backwards, where they can be read."""
    for kind in (FORWARD, BACKWARD):
        shown = [bar for bar in bars if bar.kind == kind]
        if not shown:
            continue
        widths = (bar.length * inches_per_unit * POINTS_PER_INCH / len(str(bar.number)) for bar in shown)
        size = min(LARGEST_TEXT, min(widths) / DIGIT_WIDTH)
        if size < SMALLEST_TEXT:
            continue
        for bar in shown:
            dark = bar.window % len(SHADES[kind]) < DARK_SHADES
            place: dict[str, Any] = {"ha": "center", "va": "center_baseline", "fontsize": size, "zorder": 3}
            middle = bar.start + bar.length / 2
            axes.text(middle, bar.rank, str(bar.number), color="white" if dark else "#222222", **place)


def _draw_updates(axes: Axes, bars: Sequence[Bar]) -> None:
    """A triangle above the line where an update ends, a ring where a reduction does."""
    for kind, marker, face in ((UPDATE, "v", "#222222"), (REDUCE, "o", "white")):
        ends = [(bar.start + bar.length, bar.rank - BAR_HEIGHT / 2) for bar in bars if bar.kind == kind]
        if ends:
            times, heights = zip(*ends, strict=True)
            style: dict[str, Any] = {"s": 20, "linewidths": 0.6, "edgecolors": "#222222", "zorder": 4}
            axes.scatter(times, heights, marker=marker, facecolors=face, clip_on=False, **style)


def _rank_labels(placement: Placement) -> list[str]:
    """Every rank's number and, where it holds several stages, those: its home first."""
    if all(len(stages) == 1 for stages in placement.stages):
        return [str(rank) for rank in range(placement.num_ranks)]
    held = [sorted(stages, key=lambda s: placement.home(s) != rank) for rank, stages in enumerate(placement.stages)]
    return [f"{rank}:  {' '.join(map(str, stages))}" for rank, stages in enumerate(held)]


def _label(axes: Axes, report: Report, rank_labels: list[str]) -> None:
    gap = f"{report.max_version_gap} update{'' if report.max_version_gap == 1 else 's'}"
    options = "".join(f", {name} = {value}" for name, value in report.options.items() if value)
    axes.set_title(
        f"{report.schedule}: {report.stages} stages on {report.ranks} ranks, "
        f"windows of {report.micro_batches} micro-batches{options}\n"
        f"utilization {report.utilization:.3f} in the steady state   largest gap {gap}",
        fontsize=10,
        loc="left",
        pad=10,
    )
    axes.set_xlabel("time, in forwards of one stage", fontsize=9)
    axes.set_ylabel("rank" if rank_labels[0] == "0" else "rank:  its stages, home first", fontsize=9)
    axes.set_yticks(range(report.ranks), rank_labels)
    axes.tick_params(labelsize=8, length=3)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _add_legend(figure: Figure, bars: Sequence[Bar]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    kinds = {bar.kind for bar in bars}
    mark: dict[str, Any] = {"linestyle": "none", "markeredgecolor": "#222222", "markersize": 5}
    handles: list[Any] = [
        Patch(facecolor=SHADES[FORWARD][LEGEND_SHADE], label="forward"),
        Patch(facecolor=SHADES[BACKWARD][LEGEND_SHADE], label="backward (shade: window)"),
        Patch(facecolor=IDLE, edgecolor="#cccccc", label="idle"),
        Line2D([], [], marker="v", color="#222222", label="update", **mark),
    ]
    if REDUCE in kinds:
        handles.append(Line2D([], [], marker="o", color="white", label="reduce", **mark))
    place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (MARGINS[0] / figure.get_figwidth(), 0)}
    figure.legend(handles=handles, ncols=len(handles), fontsize=8, frameon=False, borderpad=0.2, **place)
