"""Which weights a schedule may say that its passes use, and what it may do about gradients that are late."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .schedule import Schedule

KEPT = ("stashed", "previous", "synchronized")
"""Weights of which versions are kept, so that a backward uses those of its forward."""
PREDICTED = ("predicted", "predicted_by_window")
WEIGHTS = ("latest", *KEPT, "corrected", *PREDICTED)
COMPENSATIONS = ("none", "error_feedback")


def check_weights(schedule: Schedule) -> None:
    """Refuse weights, and numbers that go with them, which make no schedule.

    Raises:
        ValueError: with the numbers.
    """
    name, weights = schedule.name, schedule.weights
    if weights not in WEIGHTS:
        raise ValueError(f"{name}: weights are {', '.join(WEIGHTS)}; got {weights!r}")
    if len(schedule.weight_versions) != schedule.num_stages or min(schedule.weight_versions) < 1:
        raise ValueError(
            f"{name}: weight_versions need one entry, at least 1, for each of {schedule.num_stages} stages; got "
            f"{schedule.weight_versions}"
        )
    if weights != "latest" and schedule.reduces:
        raise ValueError(f"{name}: stages that several ranks hold have their latest weights alone")
    decay, steps = schedule.correction_decay, schedule.rescale_steps
    if not (0 < decay < 1 if weights == "corrected" else decay == 0):
        raise ValueError(
            f"{name}: correction_decay is of corrected weights, above 0 and below 1, and 0 of others; got {decay} for "
            f"{weights} weights"
        )
    if steps < 0 or (schedule.flush and steps):
        raise ValueError(
            f"{name}: rescale_steps counts updates, at least 0, and 0 under a flush at every window, where nothing is "
            f"late; got {steps}"
        )


def check_compensation(schedule: Schedule) -> None:
    """Refuse a compensation of what is not late, or of what is compensated already.

    Raises:
        ValueError: with what to use instead.
    """
    name, compensation = schedule.name, schedule.compensation
    if compensation not in COMPENSATIONS:
        raise ValueError(f"{name}: compensation is {' or '.join(COMPENSATIONS)}, got {compensation!r}")
    if not 0 < schedule.strength < inf:
        raise ValueError(f"{name}: strength is a number above 0, got {schedule.strength}")
    if schedule.flush and compensation != "none":
        raise ValueError(
            f"{name}: compensation {compensation!r} means nothing under a flush at every window, where no gradient is "
            'late (staleness 0); use "none", or a free-running schedule'
        )
    if schedule.extrapolates and compensation != "none":
        raise ValueError(
            f"{name}: its {schedule.weights} weights are a compensation already, so that compensation must be "
            f'"none", got {compensation!r}; paci, amdp, pipedream and pipedream-2bw take it'
        )
