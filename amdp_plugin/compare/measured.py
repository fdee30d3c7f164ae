"""The figures of a recorded run, and what the plan predicts for another schedule from them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from statistics import mean, median
from typing import NamedTuple

from ..curves import reached
from ..plan import schedules
from ..plan.action import BACKWARD, FORWARD, UPDATE, Action
from ..plan.costs import CostModel
from ..plan.placement import Placement
from ..plan.planner import Planner
from ..plan.schedule import Schedule
from ..plan.simulate import steady_state
from ..runtime.timeline import RUN, WAIT, Event
from .recording import STOCK, Evaluation, Memory, RankRecord, Step

WARM_UP_STEPS = 5
"""Steps that are left out at the start, or a third of them where that is less: they compile, allocate and fill."""
LAST_LOSSES = 10
"""Steps whose losses the final training loss averages: single batches differ by more than schedules do."""
LEAST_SECONDS = 1e-9
SENDER = {FORWARD: -1, BACKWARD: 1}
"""The stage that sends what an action needs, counted from the action's."""


class Interval(NamedTuple):
    """From the end of the step before to the end of ``step``, on one rank; seconds of the machine's clock."""

    step: Step
    start: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.start


class Message(NamedTuple):
    """Between two (global) ranks: the action that sends it, and the wait for it."""

    sender: int
    sent: Event
    receiver: int
    wait: Event


@dataclass(frozen=True)
class Run:
    """One recorded job.

    Args:
        name: what it is called in tables and pictures.
        records: all its ranks'.
        others_cores: cores that other processes of the machine kept busy meanwhile; ``None`` where that is unknown.
    """

    name: str
    records: Sequence[RankRecord]
    others_cores: float | None = None

    @property
    def label(self) -> str:
        """Its name, and whether it is the host's own schedule."""
        return f"{self.name} ({STOCK})" if self.first.engine == STOCK != self.name else self.name

    @property
    def first(self) -> RankRecord:
        """A rank whose home is the first stage."""
        return next(record for record in self.records if record.stage == 0)

    @cached_property
    def losses(self) -> list[float | None]:
        """Of every step; the mean over the ranks that know it: with some hosts all, with some the last stage's."""
        all_steps = [record.steps for record in self.records]
        return [_mean(step.loss for step in steps) for steps in zip(*all_steps, strict=False)]

    @cached_property
    def evaluations(self) -> list[Evaluation]:
        """Every evaluation, as the first rank timed it; its loss likewise."""
        of_ranks = zip(*(record.evaluations for record in self.records), strict=False)
        return [replace(each[0], loss=_mean(evaluation.loss for evaluation in each)) for each in of_ranks]

    @cached_property
    def intervals(self) -> list[list[Interval]]:
        """For every rank its warm steps: without the first ones, and those before which something else was done."""
        return [_warm_intervals(record.steps) for record in self.records]

    @cached_property
    def seconds_per_step(self) -> float:
        """Seconds between the ends of two successive steps, of the slowest rank: median over all stretches of steps
        after which the schedule repeats. The steps of one stretch may differ: AMDP's do, by a factor of 2 and more."""
        first, last = self._planner().steady_windows()
        return max(_pace(intervals, last - first) for intervals in self.intervals)

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens a second at the median pace; ``None`` where the inputs are no tokens."""
        tokens = self.first.steps[-1].tokens
        return None if tokens is None else tokens / self.seconds_per_step

    @property
    def samples_per_second(self) -> float:
        """Samples a second at the median pace."""
        return self.first.steps[-1].samples / self.seconds_per_step

    @cached_property
    def waiting_share_by_rank(self) -> list[float]:
        """Share of the warm steps in which a rank waits for others."""
        return [_share(record.events, WAIT, of) for record, of in zip(self.records, self.intervals, strict=True)]

    @cached_property
    def running_share_by_rank(self) -> list[float]:
        """Share of the warm steps in which a rank computes forwards, backwards, reductions and updates."""
        return [_share(record.events, RUN, of) for record, of in zip(self.records, self.intervals, strict=True)]

    @property
    def peak_in_flight_by_rank(self) -> list[int]:
        return [record.peak_in_flight for record in self.records]

    @property
    def largest_gap(self) -> int:
        return max(record.largest_gap for record in self.records)

    @property
    def memory_by_rank(self) -> list[Memory | None]:
        return [record.memory for record in self.records]

    @property
    def final_train_loss(self) -> float | None:
        """Mean over the last steps."""
        return _mean(self.losses[-LAST_LOSSES:])

    @property
    def final_validation_loss(self) -> float | None:
        """Of the last evaluation, if there was one."""
        return self.evaluations[-1].loss if self.evaluations else None

    def seconds_to(self, loss: float) -> float | None:
        """Seconds of training, at the median pace, until an evaluation's loss is as low; ``None`` where none is."""
        curve = [(each.step, each.loss) for each in self.evaluations if each.loss is not None]
        step = reached(curve, loss)
        return None if step is None else step * self.seconds_per_step

    def costs(self) -> CostModel:
        """Medians of what forwards, backwards and updates took on every stage, wherever it ran, and messages between
        ranks."""
        seconds: dict[tuple[int, str], list[float]] = {}
        for record, intervals in zip(self.records, self.intervals, strict=True):
            for action, taken in _seconds_of_actions(record.events, intervals[0].start, intervals[-1].end).items():
                # Away from home nothing is updated: the new weights are received.
                if action.kind != UPDATE or action.stage == record.stage:
                    seconds.setdefault((action.stage, action.kind), []).append(taken)

        def medians(kind: str) -> tuple[float, ...]:
            return tuple(max(LEAST_SECONDS, median(seconds[stage, kind])) for stage in range(self.first.stages))

        return CostModel(medians(FORWARD), medians(BACKWARD), medians(UPDATE), link_latency=self._link_latency())

    def _link_latency(self) -> float:
        """Median seconds from the end of an action to the end of the wait of a rank that waits for its message.

        Only messages for which somebody was waiting when they left tell how long they took.
        """
        messages = self.messages()
        delays = [wait.end - sent.end for _, sent, _, wait in messages if wait.start < sent.end < wait.end]
        return median(delays) if delays else 0.0

    def messages(self) -> Iterator[Message]:
        """The activations and gradients that go from stage to stage in one replica."""
        records, placement = self.one_replica(), self.schedule().placement
        done = {event.name: (record.rank, event) for record in records for event in record.events if event.phase == RUN}
        for record in records:
            for wait, sender in _receives(record, placement):
                if sender in done:
                    yield Message(*done[sender], record.rank, wait)

    def one_replica(self) -> list[RankRecord]:
        """The ranks of one pipeline, in its order: ranks are laid out (home) stage by stage."""
        found: dict[int, RankRecord] = {}
        for record in self.records:
            found.setdefault(record.stage, record)
        return [found[stage] for stage in sorted(found)]

    def schedule(self) -> Schedule:
        """The schedule that was run; stock's is 1F1B."""
        first = self.first
        return schedules.make(first.schedule, first.stages, first.micro_batches, **first.options)

    def predicted_seconds(self, costs: CostModel) -> float:
        """Seconds of a step of this run's schedule, in the steady state, if actions cost ``costs``."""
        return steady_state(self._planner(), costs)[1]

    def _planner(self) -> Planner:
        """Generates the program that was run."""
        return Planner(self.schedule(), self.first.planned_costs)


def _mean(losses: Iterable[float | None]) -> float | None:
    known = [loss for loss in losses if loss is not None]
    return mean(known) if known else None


def _seconds_of_actions(events: Iterable[Event], start: float, end: float) -> dict[Action, float]:
    """What every action took that began between ``start`` and ``end``, all its pieces together: an update in which
    stages wait for each other is several."""
    taken: dict[Action, float] = {}
    for event in events:
        if event.phase == RUN and start <= event.start <= end:
            action = Action.parse(event.name)
            taken[action] = taken.get(action, 0.0) + event.end - event.start
    return taken


def _warm_intervals(steps: Sequence[Step]) -> list[Interval]:
    skipped = max(1, min(WARM_UP_STEPS, len(steps) // 3))
    pairs = list(pairwise(steps))
    warm = [Interval(step, before.end, step.end) for before, step in pairs[skipped - 1 :] if not step.interruptions]
    if not warm:
        raise ValueError(f"{len(steps)} steps are too few to measure: record at least 3")
    return warm


def _pace(intervals: Sequence[Interval], period: int) -> float:
    """Median seconds of a step, in stretches of ``period`` successive ones; the mean where there is no such stretch."""
    stretches = zip(intervals, intervals[period - 1 :], strict=False)
    whole = [last.end - first.start for first, last in stretches if last.step.step - first.step.step == period - 1]
    return median(whole) / period if whole else mean(interval.seconds for interval in intervals)


def _share(events: Sequence[Event], phase: str, intervals: Sequence[Interval]) -> float:
    """Share of ``intervals`` that events of ``phase`` take. Both are in order of time, and events do not overlap."""
    starts, inside = [interval.start for interval in intervals], 0.0
    for event in events:
        if event.phase == phase:
            first = max(0, bisect_right(starts, event.start) - 1)
            last = bisect_right(starts, event.end)
            spans = ((max(event.start, of.start), min(event.end, of.end)) for of in intervals[first:last])
            inside += sum(max(0.0, end - start) for start, end in spans)
    return inside / sum(interval.seconds for interval in intervals)


def _receives(record: RankRecord, placement: Placement) -> Iterator[tuple[Event, str]]:
    """A rank's waits for what its own actions need, each with the name of the neighbour's action that sends it.

    A rank also waits until its own messages have left, under the names of the actions that need them.
    """
    for event in record.events:
        if event.phase == WAIT and event.name[0].isdigit():
            action = Action.parse(event.name)
            if action.kind in SENDER and placement.rank_of(action.stage, action.index) == record.stage:
                yield event, str(action._replace(stage=action.stage + SENDER[action.kind]))
