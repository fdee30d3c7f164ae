"""How far weights are extrapolated, from the plan: by the updates that lie between two instants of it.

A stage has the weights of its latest update, ``w``, and some schedules compute with others:

- **corrected** (PipeMare, arXiv 1910.05124, section 3.2): a backward uses ``w - gap * delta``, about the weights of its
  forward, where ``delta`` is the running mean ``gamma * delta + (1 - gamma) * (w - w_before)`` of the stage's updates.
  The paper's ``tau_forward - tau_backward`` is the gap of the micro-batch at hand, which the program tells; and in
  ``gamma = D ** (1 / (tau_forward - tau_backward))`` it is the stage's largest gap, so that there is one mean.
- **predicted** (SpecTrain, arXiv 1809.02839; XPipe, arXiv 1911.04610): a forward or a backward of window ``k`` uses
  ``w + ahead * direction``, the direction being a step of the stage's optimizer without its latest gradient. Both
  methods look as far as the instant at which the mini-batch comes back to stage 0. The stage has then had ``k + lead``
  updates: ``lead`` of its own windows ``k``, ``k + 1``, ... are done before, which the times of the plan tell.
  ``ahead`` is what is missing to that. With backwards as long as forwards that is SpecTrain's version difference, and
  XPipe's of a backward; in a forward XPipe rounds a time to updates, which here are counted.

The learning rate is rescaled (PipeMare, section 3.1) by ``1 / tau ** (1 - min(k / K, 1))`` at update ``k``, counted
from where the pipeline begins to run freely, ``tau`` being the mean staleness of the stage, in updates. The paper's
``tau``, about twice as long, is of a pipeline whose stages forward and backward at once. It bounds the rate that is
stable under a delay; a delay of less than one update bounds nothing beyond what holds without delay, and dividing by it
would raise the rate. So where ``tau`` is below 1 the rate is left as it is.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from .action import BACKWARD, UPDATE, Action
from .planner import Planner
from .simulate import simulate
from .staleness import mean_staleness
from .timing import Timing
from .versions import versions
from .weights import PREDICTED


@dataclass(frozen=True)
class Extrapolation:
    """The figures of a schedule and its program, each for every stage where it is a tuple.

    Args:
        weights: see :class:`.Schedule`.
        micro_batches: likewise.
        max_gap: likewise.
        most_ahead: updates that a forward looks ahead, at most, once the program repeats; 0 where it does not.
        lead: updates beyond those of the windows before that a stage has had when a window is complete on stage 0.
        correction_decay: see :class:`.Schedule`.
        rescale_steps: likewise.
        free_from: windows at the start of a job that end with a flush, in which nothing is extrapolated or rescaled.
        divisors: by what learning rates are divided at first.
    """

    weights: str
    micro_batches: int
    max_gap: tuple[int, ...]
    most_ahead: tuple[int, ...]
    lead: tuple[int, ...]
    correction_decay: float
    rescale_steps: int
    free_from: int
    divisors: tuple[float, ...]

    @property
    def predicts(self) -> bool:
        return self.weights in PREDICTED

    def forward_steps(self, stage: int, window: int, version: int) -> int:
        """Updates by which a forward of ``window`` extrapolates weights of ``version``, both counted from one start."""
        return window + self.lead[stage] - version if self.predicts else 0

    def backward_steps(self, stage: int, window: int, forward: int, version: int) -> int:
        """Likewise of the backward, whose forward had weights of version ``forward``; below 0 for going back."""
        if self.predicts:
            return window + self.lead[stage] - version
        return forward - version if self.weights == "corrected" else 0

    def decay(self, stage: int) -> float | None:
        """gamma of the running mean of the stage's updates; ``None`` where there is none, for want of a gap."""
        corrects = self.weights == "corrected" and self.max_gap[stage] > 0
        return self.correction_decay ** (1 / self.max_gap[stage]) if corrects else None

    def divisor(self, stage: int, update: int) -> float:
        """What divides the learning rate of the stage at ``update``, counted from the job's start."""
        done = update - self.free_from
        if not 0 <= done < self.rescale_steps:
            return 1.0
        return float(self.divisors[stage] ** (1 - done / self.rescale_steps))

    def copies(self, stage: int) -> int:
        """Copies of the stage's weights beside them: of the weights while they hold others, and the mean of updates,
        or what a window has predicted."""
        if not self.predicts:
            return 0 if self.decay(stage) is None else 2
        ahead = self.most_ahead[stage] > 0
        return int(ahead or self.lead[stage] > 0) + int(ahead and self.weights == "predicted_by_window")

    def __str__(self) -> str:
        if self.predicts:
            of = "its window's first" if self.weights == "predicted_by_window" else "each"
            return (
                "predicted by the optimizer's smooth direction to the instant when the window is complete on stage 0, "
                f"updates ahead by stage: {_numbers(self.most_ahead)} at most in a forward ({of} predicts), "
                f"{_numbers(self.lead)} in a backward"
            )
        corrected = (
            f"in a backward w - gap * delta, delta a mean of updates that holds {self.correction_decay:.3g} of one "
            "when the stage has had as many more as its largest gap; "
        )
        rescaled = f"divided at first by {_numbers(self.divisors)}, by 1 after {self.rescale_steps} updates"
        rates = rescaled if self.rescale_steps and max(self.divisors) > 1 else "whole"
        return f"{corrected if self.weights == 'corrected' else ''}learning rates are {rates}"


def planned_extrapolation(planner: Planner) -> Extrapolation | None:
    """The figures of the program of ``planner``, once it repeats; ``None`` where weights are used as they are."""
    schedule = planner.schedule
    if not schedule.extrapolates and not schedule.rescale_steps:
        return None
    windows = planner.settled_windows()
    found = versions(planner.program(windows.stop))
    size, stages = schedule.micro_batches, range(schedule.num_stages)
    predicts = schedule.weights in PREDICTED
    lead = _lead(planner, windows) if predicts else (0,) * schedule.num_stages
    settled = range(windows.start * size, windows.stop * size)
    late = [max(found[stage, number].staleness for number in settled) for stage in stages]
    return Extrapolation(
        weights=schedule.weights,
        micro_batches=size,
        max_gap=schedule.max_gap,
        most_ahead=tuple(late[stage] + lead[stage] if predicts else 0 for stage in stages),
        lead=lead,
        correction_decay=schedule.correction_decay,
        rescale_steps=schedule.rescale_steps,
        free_from=schedule.flush_first,
        divisors=tuple(max(1.0, staleness) for staleness in mean_staleness(schedule, found, windows)),
    )


def _lead(planner: Planner, windows: range) -> tuple[int, ...]:
    """The fewest over ``windows``, so that no prediction goes further than the plan. An update that ends at the very
    instant is not counted, as in the papers, where half a round trip is rounded down."""
    schedule = planner.schedule
    later = -(-schedule.num_stages // schedule.micro_batches)
    timing = simulate(planner.program(windows.stop + later), planner.costs)
    last = [(window + 1) * schedule.micro_batches - 1 for window in windows]
    begins = dict(_times(timing, 0, BACKWARD, 0))
    fewest = []
    for stage in range(schedule.num_stages):
        ends = [end for _, end in _times(timing, stage, UPDATE, 1)]
        done = [
            bisect_left(ends, begins[number]) - window for window, number in zip(windows, last, strict=True)
        ]
        fewest.append(max(0, min(done)))
    return tuple(fewest)


def _times(timing: Timing, stage: int, kind: str, place: int) -> list[tuple[int, int]]:
    """(index, start or end) of the actions of a kind on a stage, at its home."""
    home = timing.program.schedule.placement.home(stage)
    spans: Sequence[tuple[Action, tuple[int, int]]] = list(
        zip(timing.program.rows[home], timing.spans[home], strict=True)
    )
    return [(action.index, span[place]) for action, span in spans if action[:2] == (stage, kind)]


def _numbers(numbers: Sequence[float]) -> str:
    return " ".join(f"{number:.6g}" for number in numbers)
