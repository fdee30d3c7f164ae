"""What the recorders of all hosts share: the list of steps of one rank, and the files of one process."""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any, Protocol

from torch import Tensor

from .recording import PROGRESS, Evaluation, RankRecord, Step

KEPT_EVENTS = 200_000
MEASURED_STEP = 2
"""The step in which memory is measured: the first update makes the optimizer's state."""
WRITE_EVERY_SECONDS = 60.0


class Journal:
    """Steps and evaluations of one rank. Losses become numbers when they are asked for: that waits for a GPU."""

    def __init__(self) -> None:
        self._steps: list[tuple[Step, Any]] = []
        self._evaluations: list[tuple[Evaluation, list[Any]]] = []
        self._interruptions: list[str] = []

    @property
    def number(self) -> int:
        """Of the latest step; 0 before the first."""
        return self._steps[-1][0].step if self._steps else 0

    def measures_next(self, windows_late: int) -> bool:
        """Whether the step to come is the one in which memory is measured.

        Args:
            windows_late: steps that an update stands behind the end of its window, at most.
        """
        return len(self._steps) + 1 == MEASURED_STEP + windows_late

    @property
    def steps(self) -> list[Step]:
        return [replace(step, loss=_number(loss)) for step, loss in self._steps]

    @property
    def evaluations(self) -> list[Evaluation]:
        return [replace(evaluation, loss=_mean(losses)) for evaluation, losses in self._evaluations]

    def interrupt(self, name: str) -> None:
        """Note that something else was done between two steps."""
        self._interruptions.append(name)

    def step(self, number: int, span: tuple[float, float], loss: Any, samples: int, tokens: int | None) -> None:
        """A step is done; see :class:`.Step`. ``loss`` is a tensor of one element, or else counts as unknown."""
        step = Step(number, *span, loss=None, samples=samples, tokens=tokens, interruptions=self._interruptions)
        self._interruptions = []
        self._steps.append((step, loss))

    def evaluation(self, number: int, span: tuple[float, float], loss: Any) -> None:
        """An evaluation is done; see :class:`.Evaluation`."""
        self._evaluations.append((Evaluation(number, *span, loss=None), [loss]))

    def part_of_evaluation(self, span: tuple[float, float], loss: Any) -> None:
        """As :meth:`evaluation`, in a job that evaluates in several calls: those between two steps count as one."""
        if self._evaluations and self._evaluations[-1][0].step == self.number:
            before, losses = self._evaluations[-1]
            self._evaluations[-1] = replace(before, end=span[1]), [*losses, loss]
        else:
            self.interrupt("evaluation")
            self.evaluation(self.number, span, loss)


class Recorder(Protocol):
    """What a host's adapter tells of one pipeline."""

    @property
    def rank(self) -> int:
        """Its global rank."""

    @property
    def journal(self) -> Journal:
        """Its steps."""

    def record(self) -> RankRecord:
        """Everything until now."""


class Output:
    """The files of one process, written every minute and at its end: of the pipeline that trained last."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._latest: Recorder | None = None
        self._written = time.monotonic()
        self._progress: int | None = None
        atexit.register(self.write)

    def stepped(self, recorder: Recorder) -> None:
        """Count a step where others can see it, at the price of one byte, and write when it is time to."""
        if self._progress is None:
            path = self._directory / f"{PROGRESS}{recorder.rank}"
            self._progress = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            self._written = time.monotonic()  # a slow start is no reason to write
        os.write(self._progress, b".")
        self._latest = recorder
        if time.monotonic() - self._written > WRITE_EVERY_SECONDS:
            self.write()
            recorder.journal.interrupt("record")

    def write(self) -> None:
        """Write what the pipeline that trained last has done."""
        if self._latest is not None:
            self._latest.record().write(self._directory)
        self._written = time.monotonic()


def timed(function: Callable[[], Any]) -> tuple[Any, tuple[float, float]]:
    """What ``function`` returns, and from when to when it took: seconds of the machine's monotonic clock."""
    start = time.perf_counter()
    result = function()
    return result, (start, time.perf_counter())


def _number(loss: Any) -> float | None:
    return float(loss) if isinstance(loss, Tensor) and loss.numel() == 1 else None


def _mean(losses: list[Any]) -> float | None:
    numbers = [number for loss in losses if (number := _number(loss)) is not None]
    return mean(numbers) if numbers else None
