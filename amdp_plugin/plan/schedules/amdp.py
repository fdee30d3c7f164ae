"""AMDP (arXiv 2605.29664): several pipelines run at once, in complementary directions, and never flush."""

from __future__ import annotations

from typing import Any

from ..action import BACKWARD, Action
from ..placement import Placement
from ..schedule import Priority, Schedule, backward_first

WEIGHTS = (
    (1.0, 4.0, 0.86, -1.19, 1.0),
    (1.0, 4.0, 0.34, -0.10, 2.0),
    (1.0, 0.0, 1.99, -0.48, 0.5),
    (1.0, 4.0, -0.12, -0.50, 2.0),
    (0.0, 1.0, 1.46, 1.61, 8.0),
    (0.0, -1.0, 2.81, -1.83, 4.0),
    (0.0, -1.0, 2.80, -1.70, 2.0),
    (1.0, 2.0, -0.11, 0.54, 0.5),
    (1.0, 2.0, 0.40, -0.25, 1.0),
    (1.0, 2.0, 2.09, -2.90, 2.0),
    (1.0, 4.0, 2.03, -0.84, 0.0),
)
"""Candidate orders, as weights of a linear priority: of the instant since which an action could start, of its being a
backward, of the stage of a forward and of a backward, and of the micro-batch's number in its direction. Found by random
search over N = 4 .. 16, backward ratios 1 .. 2.5 and link costs 0 and 0.1; the scheduler tries all of them on the
pipeline at hand and keeps the fastest."""


def amdp(num_stages: int, micro_batches: int, *, directions: int = 0, preload: int = 1) -> Schedule:
    """``num_stages / 2`` pipelines share the ranks, each rank holds as many different stages. Two micro-batches are
    admitted to each, so that no version is missed by more than one; replicas reduce their gradients to the stage's
    home, which alone updates it.

    Args:
        directions: pipelines that run at once, 1 to ``num_stages / 2``; 0 for that most. With fewer,
            ``num_stages / directions`` micro-batches are admitted to each.
        preload: micro-batches admitted to each beyond that, to fill the ends of windows.

    Raises:
        ValueError: for an odd number of stages, directions that do not divide, or a negative preload.
    """
    if num_stages % 2:
        raise ValueError(f"amdp: complementary directions need an even number of stages, got {num_stages}")
    most = num_stages // 2
    used = directions or most
    if not 1 <= used <= most or num_stages % used:
        allowed = ", ".join(str(count) for count in range(1, most + 1) if num_stages % count == 0)
        raise ValueError(f"amdp: {num_stages} stages can run in {allowed} directions, got {directions}")
    if preload < 0:
        raise ValueError(f"amdp: preload cannot be negative, got {preload}")
    admitted = num_stages // used + preload
    per_direction = max(1, micro_batches // used)
    return Schedule(
        name="amdp",
        placement=Placement.complementary(num_stages, used),
        micro_batches=micro_batches,
        flush=False,
        in_flight=(admitted,) * num_stages,
        max_gap=(-(-admitted // per_direction),) * num_stages,
        priorities=(backward_first, *(_linear(used, *weights) for weights in WEIGHTS)),
        options={"directions": used, "preload": preload},
    )


def _linear(
    directions: int, waiting: float, backward: float, forward_stage: float, backward_stage: float, turn: float
) -> Priority:
    """The order of least weighted sums; of equal ones the older micro-batch and the earlier stage."""

    def priority(action: Action, since: float) -> tuple[Any, ...]:
        stage, kind, micro_batch = action
        own = backward + backward_stage * stage if kind == BACKWARD else forward_stage * stage
        return (waiting * since + own + turn * (micro_batch // directions), micro_batch, stage)

    return priority
