"""The figures of a recorded run, and what the plan predicts for another schedule from them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from statistics import mean, median
from typing import NamedTuple

from ..plan import schedules
from ..plan.action import BACKWARD, FORWARD, UPDATE, Action
from ..plan.costs import CostModel
from ..plan.schedule import Schedule
from ..plan.scheduler import Scheduler
from ..plan.simulate import steady_state
from ..runtime.timeline import RUN, WAIT, Event
from .recording import STOCK, RankRecord, Step

WARM_UP_STEPS = 5
"""Steps that are left out at the start, or a third of them where that is less: they compile, allocate and fill."""
LAST_LOSSES = 10
"""Steps whose losses the final training loss averages: single batches differ by more than schedules do."""
LEAST_SECONDS = 1e-9


class Interval(NamedTuple):
    """From the end of the step before to the end of ``step``, on one rank; seconds of the machine's clock."""

    step: Step
    start: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.start


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
        """Its name, and whether it is stock DeepSpeed."""
        return f"{self.name} ({STOCK})" if self.first.engine == STOCK else self.name

    @property
    def first(self) -> RankRecord:
        """A rank of the first stage."""
        return next(record for record in self.records if record.stage == 0)

    @cached_property
    def intervals(self) -> list[list[Interval]]:
        """For every rank its warm steps: without the first ones, and those before which something else was done."""
        return [_warm_intervals(record.steps) for record in self.records]

    @cached_property
    def seconds_per_step(self) -> float:
        """Median seconds between the ends of two successive steps, of the slowest rank."""
        return max(median(interval.seconds for interval in intervals) for intervals in self.intervals)

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
        """Share of the warm steps in which a rank waits for messages."""
        return [_share(record.events, WAIT, of) for record, of in zip(self.records, self.intervals, strict=True)]

    @cached_property
    def running_share_by_rank(self) -> list[float]:
        """Share of the warm steps in which a rank computes forwards, backwards and updates."""
        return [_share(record.events, RUN, of) for record, of in zip(self.records, self.intervals, strict=True)]

    @property
    def peak_in_flight_by_rank(self) -> list[int]:
        return [record.peak_in_flight for record in self.records]

    @property
    def largest_gap(self) -> int:
        return max(record.largest_gap for record in self.records)

    @property
    def final_train_loss(self) -> float | None:
        """Mean over the last steps."""
        losses = [step.loss for step in self.first.steps[-LAST_LOSSES:] if step.loss is not None]
        return mean(losses) if losses else None

    @property
    def final_validation_loss(self) -> float | None:
        """Of the last evaluation, if there was one."""
        return self.first.evaluations[-1].loss if self.first.evaluations else None

    def costs(self) -> CostModel:
        """Medians of what forwards, backwards and updates took on every stage, and messages between stages."""
        seconds: dict[tuple[int, str], list[float]] = {}
        for record, intervals in zip(self.records, self.intervals, strict=True):
            for event in record.events:
                if event.phase == RUN and intervals[0].start <= event.start <= intervals[-1].end:
                    action = Action.parse(event.name)
                    seconds.setdefault((action.stage, action.kind), []).append(event.end - event.start)

        def medians(kind: str) -> tuple[float, ...]:
            return tuple(max(LEAST_SECONDS, median(seconds[stage, kind])) for stage in range(self.first.stages))

        return CostModel(medians(FORWARD), medians(BACKWARD), medians(UPDATE), link_latency=self._link_latency())

    def _link_latency(self) -> float:
        """Median seconds from the end of an action to the end of the wait of a rank that waits for its message.

        Only messages for which somebody was waiting when they left tell how long they took.
        """
        delays = [wait.end - sent.end for sent, wait in self.messages() if wait.start < sent.end < wait.end]
        return median(delays) if delays else 0.0

    def messages(self) -> Iterator[tuple[Event, Event]]:
        """The messages between the stages of one replica: the action that sends, the wait of the receiver."""
        records = self.one_replica()
        senders = {event.name: event for record in records for event in record.events if event.phase == RUN}
        for record in records:
            for wait, sender in _receives(record):
                if sender in senders:
                    yield senders[sender], wait

    def one_replica(self) -> list[RankRecord]:
        """One rank of every stage, of the same pipeline: ranks are laid out stage by stage."""
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
        return steady_state(Scheduler(self.schedule()), costs)[1]


def _warm_intervals(steps: Sequence[Step]) -> list[Interval]:
    skipped = max(1, min(WARM_UP_STEPS, len(steps) // 3))
    pairs = list(pairwise(steps))
    warm = [Interval(step, before.end, step.end) for before, step in pairs[skipped - 1 :] if not step.interruptions]
    if not warm:
        raise ValueError(f"{len(steps)} steps are too few to measure: record at least 3")
    return warm


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


def _receives(record: RankRecord) -> Iterator[tuple[Event, str]]:
    """A rank's waits for what its own actions need, each with the name of the neighbour's action that sends it."""
    for event in record.events:
        if event.phase == WAIT and event.name[0].isdigit():
            action = Action.parse(event.name)
            if action.stage == record.stage:
                sender = action.stage + (-1 if action.kind == FORWARD else 1)
                yield event, str(action._replace(stage=sender))
