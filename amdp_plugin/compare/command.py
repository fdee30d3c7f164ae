"""``amdp compare``: one job under several DeepSpeed configurations, side by side."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

EXIT_FAILURE = 1
DEFAULT_STEPS = 150
LEAST_STEPS = 3


class CompareCommand(TyperCommand):
    """Takes several files after one ``--configs``, and leaves what stands after ``--`` to the script."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Rewrite ``--configs A B -- C`` as click knows it: ``--configs A --configs B -- C``."""
        own, rest = (args[: args.index("--")], args[args.index("--") :]) if "--" in args else (args, [])
        rewritten: list[str] = []
        several = False
        for argument in own:
            if argument.startswith("-"):
                several = argument == "--configs"
                rewritten += [] if several else [argument]
            else:
                rewritten += ["--configs", argument] if several else [argument]
        return super().parse_args(ctx, [*rewritten, *rest])


def compare(
    configs: Annotated[list[Path], typer.Option(help="DeepSpeed configurations; stock where there is no schedule.")],
    nproc: Annotated[int, typer.Option(help="Processes on this machine.")] = 2,
    script: Annotated[Path, typer.Option(help="Training script that takes --deepspeed_config and --steps.")] = Path(
        "scripts/train_gpt.py"
    ),
    steps: Annotated[int, typer.Option(help="Optimizer steps of each run.")] = DEFAULT_STEPS,
    output: Annotated[Path, typer.Option(help="Folder for the table, the picture and the trace.")] = Path("comparison"),
    script_arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[-- ARGUMENT ...]", help="More arguments for the script.")
    ] = None,
) -> int:
    """Train one model under each configuration in turn, and compare speed, waiting and loss with stock DeepSpeed."""
    if nproc < 1:
        raise ValueError(f"--nproc is at least 1, got {nproc}")
    if steps < LEAST_STEPS:
        raise ValueError(f"--steps is at least {LEAST_STEPS}, got {steps}")
    from .job import Job, JobFailed
    from .job import compare as run

    try:
        table = run(configs, Job(_find(script), script_arguments or [], nproc, steps), output)
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
