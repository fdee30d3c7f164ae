"""Runs one job in several ways in turn and writes what they took, side by side."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from .hosts import Candidate
from .machine import cores, describe, others_seconds
from .measured import Run
from .recording import PROGRESS, read_records
from .table import Row, rows, table

POLL_SECONDS = 0.2
SECONDS_PER_FRAME, SECONDS_PER_LINE = 0.2, 10.0
"""Between two pictures of the progress bar, on a terminal and in a log."""
LOG_LINES = 40
LAUNCHER_REPORT = "torch/distributed/elastic/multiprocessing/api.py"
"""What the first line of the launcher's own report about a failure holds."""
SECONDS_TO_END = 10.0
KEEPING_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(2**31), "MALLOC_MMAP_THRESHOLD_": str(2**31)}
"""Lets glibc keep what a process frees, as PyTorch does on a GPU. Else a job gives its memory back to the system within
every step and takes it anew, or does not: small changes in the order of allocations decide, by up to 10 % of a step."""


class JobFailed(Exception):
    """A job that was to be compared ended with an error; the message holds the end of its log."""


@dataclass(frozen=True)
class Job:
    """What is run, for every candidate.

    Args:
        launcher: the module that runs ``script`` and records it.
        script: takes a candidate's arguments, and the number of steps.
        arguments: what else the script gets.
        processes: ranks on this machine.
        steps: optimizer steps.
        steps_flag: of the script, which takes their number.
        turns: how often every candidate runs, one after another in each turn.
    """

    launcher: str
    script: Path
    arguments: Sequence[str]
    processes: int
    steps: int
    steps_flag: str = "--steps"
    turns: int = 1

    def command(self, candidate: Candidate, directory: Path) -> list[str]:
        """The command line that runs ``candidate`` and records it in ``directory``."""
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.processes)]
        recorded = ["-m", self.launcher, "--record", str(directory), str(self.script)]
        options = [*candidate.arguments, self.steps_flag, str(self.steps), *self.arguments]
        return [sys.executable, *launcher, *recorded, *options]


def compare(candidates: Sequence[Candidate], job: Job, output: Path) -> str:
    """Run ``job`` for every candidate and write the comparison to ``output``.

    ``table.md``, ``result.json``, ``comparison.png``, ``comparison.trace.json`` (for ui.perfetto.dev) and, for every
    candidate, ``runs/NAME/`` with the log and the records of all ranks (``runs/NAME/turnK/`` where there are several
    turns). Figures are medians over the turns; losses, picture and trace are the last turn's.

    Returns:
        The table, in Markdown.

    Raises:
        ValueError: when the candidates cannot be compared.
        JobFailed: when one of the jobs fails.
    """
    _check(candidates, job)
    output.mkdir(parents=True, exist_ok=True)
    for candidate in candidates:
        shutil.rmtree(output / "runs" / candidate.name, ignore_errors=True)
    turns = [
        [_run_once(job, candidates, number, turn, output) for number in range(len(candidates))]
        for turn in range(job.turns)
    ]
    about = {"steps": job.steps, "turns": job.turns, "processes": job.processes, "script": str(job.script)}
    return write(turns, output, about)


def _run_once(job: Job, candidates: Sequence[Candidate], number: int, turn: int, output: Path) -> Run:
    candidate = candidates[number]
    directory = output / "runs" / candidate.name / (f"turn{turn + 1}" if job.turns > 1 else "")
    directory.mkdir(parents=True)
    title = f"[{turn * len(candidates) + number + 1}/{job.turns * len(candidates)}] {candidate.name}"
    others = _run(job, candidate, directory, title)
    return Run(candidate.name, read_records(directory), others)


def write(turns: Sequence[Sequence[Run]], output: Path, about: dict[str, Any]) -> str:
    """Write the comparison of the runs recorded in ``turns``, each of the same candidates. Returns the table."""
    from .picture import picture
    from .trace import trace

    found, runs = rows(turns), turns[-1]
    text = table(found)
    (output / "table.md").write_text(text, encoding="utf-8")
    (output / "comparison.png").write_bytes(picture(runs))
    (output / "comparison.trace.json").write_text(trace(runs), encoding="utf-8")
    result = {**about, "machine": describe(), "runs": [_result(row, run) for row, run in zip(found, runs, strict=True)]}
    (output / "result.json").write_text(json.dumps(result, indent=2), encoding="utf-8")
    return text


def _check(candidates: Sequence[Candidate], job: Job) -> None:
    names = [candidate.name for candidate in candidates]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"two configurations are called {', '.join(repeated)}; give their files different names")
    if not job.script.is_file():
        raise ValueError(f"there is no file {job.script}")


def _run(job: Job, candidate: Candidate, directory: Path, title: str) -> float | None:
    """Run the job in its own process group, with its output in ``log.txt`` and a progress bar on standard error.

    Returns:
        The cores that other processes kept busy meanwhile, where that can be known.
    """
    started, busy = time.monotonic(), others_seconds()
    path = directory / "log.txt"
    with path.open("w", encoding="utf-8") as log:
        process = _start(job.command(candidate, directory), log, job.processes)
        try:
            _follow(process, directory / f"{PROGRESS}0", job.steps, title)
        finally:
            _end(process)
    if process.returncode:
        raise JobFailed(f"{title} failed with exit code {process.returncode}; the end of {path}:\n{_end_of_log(path)}")
    seconds = time.monotonic() - started
    print(f"{title}: done in {seconds:.0f} s", file=sys.stderr, flush=True)
    after = others_seconds()
    return None if busy is None or after is None else max(0.0, after - busy) / seconds


def _end_of_log(path: Path) -> str:
    """The last lines that the ranks wrote, without the page that the launcher adds."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    ranks = list(takewhile(lambda line: LAUNCHER_REPORT not in line, lines))
    return "\n".join((ranks or lines)[-LOG_LINES:])


def _start(command: Sequence[str], log: TextIO, processes: int) -> subprocess.Popen[bytes]:
    environment = {"OMP_NUM_THREADS": str(max(1, cores() // processes)), **KEEPING_MEMORY, **os.environ}
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True)


def _follow(process: subprocess.Popen[bytes], progress: Path, steps: int, title: str) -> None:
    interval = SECONDS_PER_FRAME if sys.stderr.isatty() else SECONDS_PER_LINE
    with tqdm(total=steps, desc=title, unit="step", leave=False, file=sys.stderr, mininterval=interval) as bar:
        while process.poll() is None:
            time.sleep(POLL_SECONDS)
            if progress.exists():
                bar.update(progress.stat().st_size - bar.n)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Let nothing that the job started go on, if it was interrupted."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            os.killpg(process.pid, number)
            try:
                process.wait(SECONDS_TO_END)
            except subprocess.TimeoutExpired:
                continue


def _result(row: Row, run: Run) -> dict[str, Any]:
    evaluations = [asdict(evaluation) for evaluation in run.evaluations]
    return {**asdict(row), "costs": asdict(run.costs()), "losses": run.losses, "evaluations": evaluations}
