"""The study as a picture: loss over tokens and over predicted time, every method at its best learning rate."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from ..plan.picture import DOTS_PER_INCH
from .summary import Row, mean_curve
from .trial import Outcome, Trial, Variant

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, ROW_HEIGHT = 14.0, 3.8
"""Inches: of the picture, and of the panels of one optimizer."""
COLOURS = (
    "#555555", "#d1631b", "#2f6db5", "#3a8f5a", "#8a4fa3", "#b8860b", "#7a2e2e", "#2e9a98", "#d16ba5", "#9aa72e",
)  # fmt: skip
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
        for variant in variants:
            shown = [row for row in rows if (row.variant, row.optimizer, row.best) == (variant, optimizer, True)]
            colour = COLOURS[variants.index(variant) % len(COLOURS)]
            at_equal_tokens, longest = shown[0], max(shown, key=lambda row: row.steps)
            group = list(_group(outcomes, at_equal_tokens))
            _draw(over_tokens, group, group[0].million_tokens, colour, at_equal_tokens)
            ends += _end(group)
            group = list(_group(outcomes, longest))
            _draw(over_time, group, group[0].forwards, colour, longest)
            ends += _end(group)
        margin = 0.1 * (max(ends) - min(ends) or 1.0)
        over_tokens.set_ylim(min(ends) - margin, max(ends) + margin)
        over_tokens.set_ylabel(f"{optimizer}: validation loss")
        over_tokens.set_xlabel("tokens, millions")
        over_time.set_xlabel("predicted time, forwards of one stage")
        over_time.legend(loc="upper left", bbox_to_anchor=(1.02, 1.0), fontsize="small", frameon=False)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def _group(outcomes: Mapping[Trial, Outcome], row: Row) -> Iterator[Outcome]:
    asked = (row.variant, row.optimizer, row.learning_rate, row.steps)
    for trial, outcome in outcomes.items():
        if (trial.variant, trial.optimizer, trial.learning_rate, trial.steps) == asked:
            yield outcome


def _end(group: Sequence[Outcome]) -> list[float]:
    """The later losses of a curve."""
    curve = mean_curve(group)
    return [loss for _, loss in curve[int(len(curve) * (1 - SHOWN)) :]]


def _named(variant: Variant) -> str:
    """With its options in words, where they are numbers and names."""
    told = [f"{value}" if isinstance(value, str) else f"{key} {value}" for key, value in variant.options]
    return ", ".join([variant.schedule, *told]).replace("_", " ")


def _draw(axes: Axes, group: Sequence[Outcome], place: Callable[[float], float], colour: str, row: Row) -> None:
    """The mean over the seeds, and their range; ``place`` says where on the axis a step is."""
    curve = mean_curve(group)
    along = [place(step) for step, _ in curve]
    label = f"{_named(row.variant)}\n{row.steps} steps, learning rate {row.learning_rate:g}"
    axes.plot(along, [loss for _, loss in curve], color=colour, label=label, linewidth=1.6)
    if len(group) > 1:
        losses = list(zip(*([loss for _, loss in outcome.validation] for outcome in group), strict=True))
        least, most = [min(each) for each in losses], [max(each) for each in losses]
        axes.fill_between(along, least, most, color=colour, alpha=0.15)
    axes.spines[["top", "right"]].set_visible(False)
