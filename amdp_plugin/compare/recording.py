"""What a recorded job leaves behind: one JSON file a rank, written by ``record`` and read by ``measured``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, astuple, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..plan.costs import CostModel
from ..runtime.device import HOST_CLOCK
from ..runtime.timeline import Event

STOCK = "stock"
"""The host's own engine and schedule."""
OURS = "amdp_plugin"
PROGRESS = "steps"
"""``steps<rank>`` has one byte for every step that the rank has done."""


@dataclass
class Step:
    """One optimizer step of one rank: DeepSpeed's ``train_batch``; Megatron's schedule and ``optimizer.step``.

    Args:
        step: optimizer steps done with this one, counted from the job's start.
        start: when it was called, in seconds of the machine's monotonic clock.
        end: when it returned.
        loss: the mean over the window, as this rank knows it; ``None`` where it does not, or where it is no number.
        samples: samples of the window, over all replicas.
        tokens: tokens of the window, over all replicas; ``None`` where the inputs are no token identifiers, and
            on ranks that do not see them.
        interruptions: what else was done since the step before, such as an evaluation.
    """

    step: int
    start: float
    end: float
    loss: float | None
    samples: int
    tokens: int | None = None
    interruptions: list[str] = field(default_factory=list)


@dataclass
class Evaluation:
    """One evaluation after ``step`` steps; ``start`` and ``end`` in seconds of the machine's monotonic clock."""

    step: int
    start: float
    end: float
    loss: float | None


@dataclass(frozen=True)
class Memory:
    """Bytes that one rank keeps for training, whatever is in flight.

    Args:
        weights: parameters and buffers of all stages that it holds.
        gradients: everything that holds gradients, where that is most: just before they are applied.
        optimizer_state: moments, and fp32 copies of the weights where the optimizer steps those.
        exchange: what replicas of a stage use to send gradients and weights.
        peak: the most that the process had, with activations: on a GPU as PyTorch's allocator counts, on the CPU all
            resident memory.
    """

    weights: int
    gradients: int
    optimizer_state: int
    exchange: int
    peak: int = 0

    @property
    def kept(self) -> int:
        """All but the peak."""
        return self.weights + self.gradients + self.optimizer_state + self.exchange

    @classmethod
    def largest(cls, each: Iterable[Memory]) -> Memory:
        """The largest of every entry."""
        return cls(*map(max, zip(*map(astuple, each), strict=True)))


@dataclass
class RankRecord:
    """What one rank did.

    Args:
        rank: global rank.
        stage: its pipeline stage, which is also its place in the pipeline; where it holds several, its home.
        engine: :data:`STOCK` or :data:`OURS`.
        schedule: name of the schedule; stock is ``1f1b``.
        options: the schedule's options.
        stages: stages of the pipeline.
        micro_batches: micro-batches of a window.
        steps: every optimizer step.
        evaluations: every evaluation.
        events: forwards, backwards, reductions and updates (phase ``run``) and waits (phase ``wait``), the latest, in
            order of time; they do not overlap, and an action may be several.
        run_seconds: seconds in forwards, backwards, reductions and updates, in all.
        wait_seconds: seconds in waits, in all.
        peak_in_flight: the most micro-batches that were forwarded and not yet backwarded.
        largest_gap: the largest (version at backward) - (version at forward).
        memory: what it kept in memory; ``None`` where that was not measured.
        planned_costs: what the program was made for; by default equal stages, backwards of two forwards.
        clock: what the times of ``events`` were taken with: the host, or the device by events of its own.
    """

    rank: int
    stage: int
    engine: str
    schedule: str
    options: dict[str, Any]
    stages: int
    micro_batches: int
    steps: list[Step]
    evaluations: list[Evaluation]
    events: Sequence[Event]
    run_seconds: float
    wait_seconds: float
    peak_in_flight: int
    largest_gap: int
    memory: Memory | None = None
    planned_costs: CostModel | None = None
    clock: str = HOST_CLOCK

    def write(self, directory: Path) -> None:
        """Write ``rank<rank>.json``: the whole file or, when killed at it, the one before."""
        target = directory / f"rank{self.rank}.json"
        partial = target.with_suffix(".partial")
        values = {**asdict(replace(self, events=())), "events": list(self.events)}
        partial.write_text(json.dumps(values), encoding="utf-8")
        partial.replace(target)

    @classmethod
    def read(cls, path: Path) -> RankRecord:
        """Read what :meth:`write` wrote."""
        values = json.loads(path.read_text(encoding="utf-8"))
        values["steps"] = [Step(**step) for step in values["steps"]]
        values["evaluations"] = [Evaluation(**evaluation) for evaluation in values["evaluations"]]
        values["events"] = [Event(*event) for event in values["events"]]
        values["memory"] = Memory(**values["memory"]) if values.get("memory") else None
        costs = values.get("planned_costs")
        values["planned_costs"] = costs and CostModel(**{key: _tuple(value) for key, value in costs.items()})
        return cls(**values)


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def read_records(directory: Path) -> list[RankRecord]:
    """The records of all ranks of a job, in the order of ranks.

    Raises:
        FileNotFoundError: when there are none.
    """
    records = [RankRecord.read(path) for path in directory.glob("rank*.json")]
    if not records:
        raise FileNotFoundError(f"{directory} holds no rank*.json: no rank of the recorded job came to its first step")
    return sorted(records, key=lambda record: record.rank)
