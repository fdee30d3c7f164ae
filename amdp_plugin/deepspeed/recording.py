"""What a recorded job leaves behind: one JSON file a rank, written by ``record`` and read by ``measured``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..runtime.timeline import Event

STOCK = "stock"
"""The engine of DeepSpeed itself, without the ``schedule`` key."""
OURS = "amdp_plugin"
PROGRESS = "steps"
"""``steps<rank>`` has one byte for every step that the rank has done."""


@dataclass
class Step:
    """One ``train_batch`` of one rank.

    Args:
        step: optimizer steps done with this one, counted from the job's start.
        start: when ``train_batch`` was called, in seconds of the machine's monotonic clock.
        end: when it returned.
        loss: what it returned, the mean over the window and the data-parallel replicas; ``None`` where that is no
            number.
        samples: samples of the window, over all replicas.
        tokens: tokens of the window, over all replicas; ``None`` where the inputs are no token identifiers, and
            on all stages but the first.
        interruptions: what else was done since the step before, such as ``eval_batch``.
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
    """One ``eval_batch`` after ``step`` steps; ``start`` and ``end`` in seconds of the machine's monotonic clock."""

    step: int
    start: float
    end: float
    loss: float | None


@dataclass
class RankRecord:
    """What one rank did.

    Args:
        rank: global rank.
        stage: its pipeline stage.
        engine: :data:`STOCK` or :data:`OURS`.
        schedule: name of the schedule; stock is ``1f1b``.
        options: the schedule's options.
        stages: stages of the pipeline.
        micro_batches: micro-batches of a window.
        steps: every ``train_batch``.
        evaluations: every ``eval_batch``.
        events: forwards, backwards and updates (phase ``run``) and waits for messages (phase ``wait``), the latest.
        run_seconds: seconds in forwards, backwards and updates, in all.
        wait_seconds: seconds in waits, in all.
        peak_in_flight: the most micro-batches that were forwarded and not yet backwarded.
        largest_gap: the largest (version at backward) - (version at forward).
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
        return cls(**values)


def read_records(directory: Path) -> list[RankRecord]:
    """The records of all ranks of a job, in the order of ranks.

    Raises:
        FileNotFoundError: when there are none.
    """
    records = [RankRecord.read(path) for path in directory.glob("rank*.json")]
    if not records:
        raise FileNotFoundError(f"{directory} holds no rank*.json: no rank of the recorded job came to its first step")
    return sorted(records, key=lambda record: record.rank)
