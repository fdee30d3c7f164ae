"""Runs the trials of a study, several at a time, and keeps what came of each, so that a study can go on."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict
from hashlib import sha256
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .trial import Outcome, Setting, Trial, run

POLL_SECONDS = 0.5

_told: Queue[tuple[str, int]] | None = None


class Store:
    """The outcomes of a study's trials, a file each, in ``folder``."""

    def __init__(self, folder: Path, setting: Setting) -> None:
        self._folder, self._setting = folder / "trials", setting
        self._folder.mkdir(parents=True, exist_ok=True)

    def get(self, trial: Trial) -> Outcome | None:
        """What came of it, if it was run under the same setting."""
        path = self._path(trial)
        return Outcome.of(json.loads(path.read_text())["outcome"]) if path.is_file() else None

    def put(self, trial: Trial, outcome: Outcome) -> None:
        told = {"setting": asdict(self._setting), "trial": asdict(trial), "outcome": asdict(outcome)}
        path = self._path(trial)
        unfinished = path.with_suffix(".part")  # a study that is stopped leaves no half of a file
        unfinished.write_text(json.dumps(told))
        unfinished.replace(path)

    def _path(self, trial: Trial) -> Path:
        asked = json.dumps([asdict(self._setting), asdict(trial)], sort_keys=True)
        return self._folder / f"{sha256(asked.encode()).hexdigest()[:16]}.json"


def run_all(setting: Setting, trials: Sequence[Trial], folder: Path, processes: int) -> dict[Trial, Outcome]:
    """The outcomes of ``trials``: those that are there already, and then the others', with a progress bar."""
    store = Store(folder, setting)
    found = {trial: outcome for trial in trials if (outcome := store.get(trial)) is not None}
    rest = [trial for trial in trials if trial not in found]
    with _bar(trials, found) as bar:
        for trial, outcome in _run_in_processes(setting, rest, processes, bar):
            store.put(trial, outcome)
            found[trial] = outcome
    return found


def _run_in_processes(
    setting: Setting, trials: Sequence[Trial], processes: int, bar: Any
) -> Iterable[tuple[Trial, Outcome]]:
    context = multiprocessing.get_context("spawn")  # a fork of a process that uses CUDA cannot
    told: Any = context.Queue()
    steps: dict[str, int] = {}
    with ProcessPoolExecutor(max(1, processes), context, _start, (told,)) as pool:
        pending: dict[Future[Outcome], Trial] = {pool.submit(_run, setting, trial): trial for trial in trials}
        try:
            while pending:
                done, _ = wait(pending, POLL_SECONDS, FIRST_COMPLETED)
                while not told.empty():
                    name, step = told.get()
                    bar.update(step - steps.get(name, 0))
                    steps[name] = step
                    bar.set_description(name)
                for future in done:
                    yield pending[future], future.result()
                    del pending[future]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _bar(trials: Sequence[Trial], found: dict[Trial, Outcome]) -> Any:
    total, done = sum(trial.steps for trial in trials), sum(trial.steps for trial in found)
    return tqdm(total=total, initial=done, unit="step", mininterval=1.0, dynamic_ncols=True)


def _start(told: Queue[tuple[str, int]]) -> None:
    """In a process that runs trials: one thread each, so that as many fit as there are cores."""
    global _told
    _told = told
    torch.set_num_threads(1)


def _run(setting: Setting, trial: Trial) -> Outcome:
    queue, parent = _told, multiprocessing.parent_process()
    assert queue is not None and parent is not None

    def progress(step: int) -> None:
        if not parent.is_alive():
            os._exit(1)  # a study that was killed must not go on in its processes
        queue.put((str(trial), step))

    return run(setting, trial, progress)
