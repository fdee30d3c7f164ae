"""What a study found: every method at the common learning rate and at its best, against the reference."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

from ..curves import reached
from .trial import Outcome, Trial, Variant


@dataclass(frozen=True)
class Row:
    """One variant with one optimizer and learning rate, over all seeds.

    Args:
        losses: validation loss at the end, of each seed.
        above: its mean, less the reference's with the same optimizer: each at its best learning rate where ``best``,
            else both at the same; ``None`` where the reference has no such trial.
        recovered: the share of what the same schedule loses without them that :data:`HELPS` take away.
        seconds: predicted time to the reference's final loss, in its time; ``None`` where it was never reached.
        best: whether it is the learning rate at which the variant does best.
    """

    variant: Variant
    optimizer: str
    learning_rate: float
    steps: int
    losses: tuple[float, ...]
    above: float | None
    recovered: float | None
    time: float | None
    best: bool

    @property
    def loss(self) -> float:
        return mean(self.losses)


HELPS = ("compensation", "strength", "flush_first")
"""Options that are there for the loss."""
_Key = tuple[Variant, str, float, int]


def summarize(outcomes: Mapping[Trial, Outcome], reference: Variant, steps: int) -> list[Row]:
    """Rows in the order of ``outcomes``; ``steps`` are those at equal tokens."""
    groups: dict[_Key, list[Outcome]] = {}
    for trial, outcome in outcomes.items():
        groups.setdefault((trial.variant, trial.optimizer, trial.learning_rate, trial.steps), []).append(outcome)
    finals = {key: tuple(outcome.validation[-1][1] for outcome in group) for key, group in groups.items()}
    best = {
        (variant, optimizer, number): min(
            (key for key in finals if (key[0], key[1], key[3]) == (variant, optimizer, number)),
            key=lambda key: mean(finals[key]),
        )
        for variant, optimizer, _, number in finals
    }
    rows = []
    for key, losses in finals.items():
        variant, optimizer, learning_rate, number = key
        is_best = best[variant, optimizer, number] == key
        against = best.get((reference, optimizer, steps)) if is_best else (reference, optimizer, learning_rate, steps)
        above = mean(losses) - mean(finals[against]) if against in finals else None
        rows.append(
            Row(
                variant, optimizer, learning_rate, number, losses, above,
                _recovered(key, finals, against), _time(groups[key], groups.get(against) if against else None), is_best,
            )
        )  # fmt: skip
    return rows


def _recovered(key: _Key, finals: Mapping[_Key, Sequence[float]], against: _Key | None) -> float | None:
    """How much of what the same schedule loses without help is not lost, at the same learning rate."""
    variant, *rest = key
    kept = tuple(option for option in variant.options if option[0] not in HELPS)
    bare = (Variant(variant.schedule, kept), *rest)
    if len(kept) == len(variant.options) or bare not in finals or against not in finals:
        return None
    lost, now = (mean(finals[each]) - mean(finals[against]) for each in (bare, key))  # type: ignore[index]
    return 1 - now / lost if lost > 0 else None


def _time(group: Sequence[Outcome], reference: Sequence[Outcome] | None) -> float | None:
    """Predicted time to the reference's mean final loss, over the reference's own time; the curve is the mean over the
    seeds, and straight between validations."""
    if not reference:
        return None
    target = mean(outcome.validation[-1][1] for outcome in reference)
    whole = reference[0].forwards(reference[0].validation[-1][0])
    step = reached(mean_curve(group), target)
    return None if step is None else group[0].forwards(step) / whole


def mean_curve(group: Sequence[Outcome]) -> list[tuple[float, float]]:
    """``(steps, validation loss)``, the mean over the seeds."""
    return [
        (points[0][0], mean(loss for _, loss in points))
        for points in zip(*(outcome.validation for outcome in group), strict=True)
    ]


HEAD = (
    "schedule", "optimizer", "learning rate", "steps", "validation loss", "range", "above reference", "recovered",
    "time to its loss",
)  # fmt: skip


def table(rows: Iterable[Row]) -> str:
    """As Markdown; the best learning rate of a method is marked."""
    lines = [f"| {' | '.join(HEAD)} |", "|" + "---|" * len(HEAD)]
    for row in rows:
        spread = f"{min(row.losses):.3f} to {max(row.losses):.3f}" if len(row.losses) > 1 else "one seed"
        cells = (
            str(row.variant), row.optimizer, f"{row.learning_rate:g}{' (best)' if row.best else ''}", str(row.steps),
            f"{row.loss:.3f}", spread, _number(row.above, "+.3f"), _number(row.recovered, ".0%"),
            _number(row.time, ".2f"),
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
