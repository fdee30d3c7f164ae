"""The study as a picture: loss over tokens and over predicted time, every method at its best learning rate."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from ..plan.picture import DOTS_PER_INCH
from .summary import Row, mean_curve
from .trial import Outcome, Trial

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, ROW_HEIGHT, LEGEND_INCHES = 12.0, 3.8, 0.3
"""Inches: of the picture, of the panels of one optimizer, and of a line of the legend."""
COLOURS = ("#555555", "#d1631b", "#2f6db5", "#3a8f5a", "#8a4fa3", "#b8860b", "#7a2e2e", "#2e7a78")
"""Of the variants; they begin again after the last. The first is the reference's."""
SHOWN = 0.6
"""The share of a run, from its end, that the axis of the loss is made for: the beginning falls far."""


def picture(outcomes: Mapping[Trial, Outcome], rows: Sequence[Row]) -> bytes:
    """A PNG file's bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    optimizers = list(dict.fromkeys(row.optimizer for row in rows))
    variants = list(dict.fromkeys(row.variant for row in rows))
    figure = Figure(figsize=(WIDTH, ROW_HEIGHT * len(optimizers)), dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(optimizers), 2, squeeze=False, sharey="row")
    for optimizer, (over_tokens, over_time) in zip(optimizers, axes, strict=True):
        ends: list[float] = []
        for row in rows:
            if row.optimizer == optimizer and row.best:
                group = list(_group(outcomes, row))
                colour = COLOURS[variants.index(row.variant) % len(COLOURS)]
                label = f"{row.variant}, rate {row.learning_rate:g}"
                _draw(over_tokens, group, group[0].tokens_per_step / 1e6, colour, label, row.steps)
                _draw(over_time, group, group[0].forwards_per_step, colour, label, row.steps)
                curve = mean_curve(group)
                ends += [loss for _, loss in curve[int(len(curve) * (1 - SHOWN)) :]]
        if ends:
            margin = 0.1 * (max(ends) - min(ends) or 1.0)
            over_tokens.set_ylim(min(ends) - margin, max(ends) + margin)
        over_tokens.set_ylabel(f"{optimizer}: validation loss")
        over_tokens.set_xlabel("tokens, millions")
        over_time.set_xlabel("predicted time, forwards of one stage")
        over_tokens.legend(fontsize="small", frameon=False)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def _group(outcomes: Mapping[Trial, Outcome], row: Row) -> Iterator[Outcome]:
    asked = (row.variant, row.optimizer, row.learning_rate, row.steps)
    for trial, outcome in outcomes.items():
        if (trial.variant, trial.optimizer, trial.learning_rate, trial.steps) == asked:
            yield outcome


def _draw(axes: Axes, group: Sequence[Outcome], scale: float, colour: str, label: str, steps: int) -> None:
    """The mean over the seeds, and their range."""
    curve = mean_curve(group)
    along = [step * scale for step, _ in curve]
    axes.plot(along, [loss for _, loss in curve], color=colour, label=label, linewidth=1.6)
    if len(group) > 1:
        losses = list(zip(*([loss for _, loss in outcome.validation] for outcome in group), strict=True))
        least, most = [min(each) for each in losses], [max(each) for each in losses]
        axes.fill_between(along, least, most, color=colour, alpha=0.15)
    axes.spines[["top", "right"]].set_visible(False)
