"""AMDP (arXiv 2605.29664): several pipelines run at once, in complementary directions, and never flush."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from typing import Any

from ..action import BACKWARD, Action
from ..placement import Placement
from ..priorities import Priority, backward_first
from ..schedule import Schedule

WEIGHTS = (
    (1.0, 4.0, 0.34, -0.1, 2.0),
    (0.0, 4.0, 0.35, -0.1, 0.5),
    (0.0, 4.0, 0.31, -0.5, 1.0),
    (0.0, -1.0, 3.25, -1.78, 2.0),
    (1.0, -1.0, 2.89, 2.52, 8.0),
    (1.0, 1.0, -0.06, 1.24, 0.0),
    (1.0, 4.0, -0.19, -0.5, 2.0),
    (1.0, 4.0, 0.48, -0.1, 2.0),
    (0.0, 2.0, 0.4, -0.37, 0.5),
    (0.0, 4.0, -0.29, -0.5, 0.0),
    (0.0, 1.0, 2.41, 2.23, 1.0),
    (1.0, 1.0, 0.95, 1.12, 4.0),
)
"""Candidate orders, as weights of a linear priority: of the instant since which an action could start, of its being a
backward, of the stage of a forward and of a backward, and of the micro-batch's number in its direction. Found by random
search over N = 4 .. 16, backward ratios 1 .. 2.5, link costs 0 and 0.1 and all three kinds of updates, those first that
most often keep every rank busy; the planner tries them on the pipeline at hand and keeps the fastest."""


PARKED = 1
"""Backwards of the next window that may run before an update whose gradient is parked. One is enough: measured at 4 to
12 stages, with and without link costs, it keeps ranks as busy in spite of meetings as they are without."""


def amdp(
    num_stages: int, micro_batches: int, *, directions: int = 0, preload: int | None = None, parked: bool = False
) -> Schedule:
    """``num_stages / 2`` pipelines share the ranks, each rank holds as many different stages. Two micro-batches are
    admitted to each, so that no version is missed by more than one; replicas send their gradients to the stage's
    home, which alone updates it.

    Args:
        directions: pipelines that run at once, 1 to ``num_stages / 2``; 0 for that most. With fewer,
            ``num_stages / directions`` micro-batches are admitted to each.
        preload: micro-batches admitted to each beyond that, to fill the ends of windows. By default the fewest
            that are nearly as fast, under the costs at hand, as half of ``num_stages / directions``; none that
            make a gap larger than 1.
        parked: backwards of the next window go on while the stages meet (``decisions="meeting"``), into one more
            gradient buffer.

    Raises:
        ValueError: for an odd number of stages, directions that do not divide, or a negative preload.
    """
    if num_stages % 2:
        raise ValueError(
            f"amdp: complementary directions need an even number of stages, got {num_stages}; paci takes any number"
        )
    most = num_stages // 2
    used = directions or most
    if not 1 <= used <= most or num_stages % used:
        allowed = ", ".join(str(count) for count in range(1, most + 1) if num_stages % count == 0)
        raise ValueError(f"amdp: the directions of {num_stages} stages may be {allowed}, got {directions}")
    if preload is not None and preload < 0:
        raise ValueError(f"amdp: preload cannot be negative, got {preload}")
    smaller = partial(_smaller, num_stages, micro_batches, used, preload, parked)
    if preload is not None:
        return replace(_preloading(preload, num_stages, micro_batches, used, parked), smaller=smaller)
    least, *more = [
        _preloading(each, num_stages, micro_batches, used, parked) for each in range(num_stages // used // 2 + 1)
    ]
    *cheaper, schedule = [least, *(each for each in more if max(each.max_gap) == 1)]
    return replace(schedule, alternatives=tuple(cheaper), smaller=smaller)


def _smaller(
    num_stages: int, micro_batches: int, directions: int, preload: int | None, parked: bool, at_most: int
) -> Schedule:
    """In as many directions, where there is room for them. Longer windows than of two micro-batches a stage only take
    longer to try: they want the same orders."""
    stages = at_most // 2 * 2
    directions = min(directions, stages // 2)
    stages = stages // directions * directions
    if stages % 2:
        stages -= directions
    share = stages / num_stages
    per_direction = max(1, round(min(micro_batches, 2 * num_stages) * share / directions))
    fewer = None if preload is None else round(preload * share)
    return amdp(stages, per_direction * directions, directions=directions, preload=fewer, parked=parked)


def _preloading(preload: int, num_stages: int, micro_batches: int, directions: int, parked: bool) -> Schedule:
    admitted, delay = num_stages // directions + preload, PARKED if parked else 0
    per_direction = max(1, micro_batches // directions)
    return Schedule(
        name="amdp",
        placement=Placement.complementary(num_stages, directions),
        micro_batches=micro_batches,
        flush_every=0,
        in_flight=(admitted,) * num_stages,
        max_gap=(-(-(admitted + delay) // per_direction),) * num_stages,
        priorities=(backward_first, *(_linear(directions, *weights) for weights in WEIGHTS)),
        update_delay=(delay,) * num_stages,
        options={"directions": directions, "preload": preload, **({"parked": True} if parked else {})},
    )


@cache
def _linear(
    directions: int, waiting: float, backward: float, forward_stage: float, backward_stage: float, turn: float
) -> Priority:
    """The order of least weighted sums; of equal ones the older micro-batch and the earlier stage."""

    def priority(action: Action, since: float) -> tuple[Any, ...]:
        stage, kind, micro_batch = action
        own = backward + backward_stage * stage if kind == BACKWARD else forward_stage * stage
        return (waiting * since + own + turn * (micro_batch // directions), micro_batch, stage)

    return priority
