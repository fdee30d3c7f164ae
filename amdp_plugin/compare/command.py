"""``amdp compare``: one job under several schedules, side by side."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ..lists_command import ListsCommand

EXIT_FAILURE = 1
DEFAULT_STEPS = 150
LEAST_STEPS = 3
LISTS = ("--configs", "--schedules")


class HostName(str, Enum):
    """Whose jobs are compared."""

    deepspeed = "deepspeed"
    megatron = "megatron"


class CompareCommand(ListsCommand):
    """``--configs A B -- C``."""

    lists = LISTS


def compare(
    host: Annotated[HostName, typer.Option(help="Whose jobs.")] = HostName.deepspeed,
    configs: Annotated[
        list[str] | None, typer.Option(help="DeepSpeed configurations; stock where there is no schedule.")
    ] = None,
    schedules: Annotated[
        list[str] | None, typer.Option(help="For Megatron: stock, names of schedules, or NAME:OPTIONS.json.")
    ] = None,
    nproc: Annotated[int, typer.Option(help="Processes on this machine.")] = 2,
    script: Annotated[
        Path | None,
        typer.Option(help="Training script that takes --deepspeed_config or --pipeline-schedule.", show_default=False),
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps of each run.")] = DEFAULT_STEPS,
    steps_flag: Annotated[str, typer.Option(help="What the script calls them: train-iters in Megatron-LM.")] = "steps",
    turns: Annotated[int, typer.Option(help="How often all run, one after another; figures are medians.")] = 1,
    output: Annotated[Path, typer.Option(help="Folder for the table, the picture and the trace.")] = Path("comparison"),
    script_arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[-- ARGUMENT ...]", help="More arguments for the script.")
    ] = None,
) -> int:
    """Train one model in several ways in turn, and compare speed, waiting and loss with the host's own schedule."""
    if nproc < 1:
        raise ValueError(f"--nproc is at least 1, got {nproc}")
    if turns < 1:
        raise ValueError(f"--turns is at least 1, got {turns}")
    if steps < LEAST_STEPS:
        raise ValueError(f"--steps is at least {LEAST_STEPS}, got {steps}")
    from .hosts import HOSTS
    from .job import Job, JobFailed
    from .job import compare as run

    chosen = HOSTS[host.value]
    for option, values in zip(LISTS, (configs, schedules), strict=True):
        if bool(values) != (option == chosen.option):
            what = "needs" if option == chosen.option else "does not take"
            raise ValueError(f"--host {host.value} {what} {option}")
    candidates = [chosen.candidate(value) for value in configs or schedules or ()]
    flag = f"--{steps_flag.removeprefix('--')}"
    job = Job(chosen.launcher, _find(script or chosen.script), script_arguments or [], nproc, steps, flag, turns)
    try:
        table = run(candidates, job, output)
    except JobFailed as error:
        print(f"amdp: error: {error}", file=sys.stderr)
        return EXIT_FAILURE
    print(table)
    print(f"picture: {output / 'comparison.png'}   trace for ui.perfetto.dev: {output / 'comparison.trace.json'}")
    return 0


def _find(script: Path) -> Path:
    """The script, or that of the repository this package lies in: ``amdp`` may be called from anywhere."""
    repository = Path(__file__).parents[2] / script
    return repository if not script.is_file() and repository.is_file() else script
