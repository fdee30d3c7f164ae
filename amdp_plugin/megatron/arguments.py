"""The flags that Megatron-LM's jobs get, and what they ask for."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from ..plan import schedules
from ..runtime.runnable import check_homes, check_runnable
from ..settings import Needs, ScheduleSettings, read_schedule
from .refusals import check_common_decisions, check_options
from .tied import tied_embedding

STOCK = "stock"
FLAG, OPTIONS_FLAG = "--pipeline-schedule", "--pipeline-schedule-options"


def add_flags(parser: ArgumentParser) -> ArgumentParser:
    """Add :data:`FLAG` and :data:`OPTIONS_FLAG` to Megatron-LM's parser."""
    group = parser.add_argument_group("pipeline schedule (amdp_plugin)")
    known = ", ".join(schedules.names())
    group.add_argument(
        FLAG, default=STOCK, metavar="NAME", help=f"{STOCK} (the default) leaves Megatron as it is; else {known}"
    )
    group.add_argument(
        OPTIONS_FLAG, type=Path, metavar="FILE.json", help=f"options of the schedule that {FLAG} names, as an object"
    )
    return parser


def read_flags(arguments: Namespace) -> ScheduleSettings | None:
    """The schedule that the flags ask for; ``None`` for Megatron's own.

    Raises:
        ValueError: for an unknown schedule or option, and for a file that holds none.
    """
    name, path = getattr(arguments, "pipeline_schedule", STOCK), getattr(arguments, "pipeline_schedule_options", None)
    if name == STOCK:
        if path is not None:
            raise ValueError(f"{OPTIONS_FLAG} {path} needs a schedule: {FLAG} {', '.join(schedules.names())}")
        return None
    return read_schedule({**_read_options(path), "name": name}, f"{FLAG} {name}")


def check_arguments(arguments: Namespace, settings: ScheduleSettings) -> list[str]:
    """Refuse what the schedule cannot work with, before any process group is made; turn off what it replaces.

    Args:
        arguments: Megatron-LM's, after it has validated them.

    Returns:
        What was turned off, a line each.

    Raises:
        ValueError: with the argument, the reason and the alternative.
    """
    stages = arguments.pipeline_model_parallel_size
    tied = stages > 1 and not getattr(arguments, "untie_embeddings_and_output_weights", True)
    needs = Needs(norm=arguments.clip_grad > 0, exact=arguments.fp16, tied=tied_embedding(stages, tied))
    first, *later = _micro_batches(arguments)
    schedule = settings.make(stages, first, needs)
    for number in later:
        settings.make(stages, number, needs)
    settings.costs(stages)
    check_runnable(schedule)
    check_homes(schedule)
    check_options(settings, schedule, [arguments])
    check_common_decisions(settings, schedule, tied, arguments.fp16)
    return _turn_off(arguments, schedule.flush)


def _turn_off(arguments: Namespace, flush: bool) -> list[str]:
    done = []
    if getattr(arguments, "rerun_mode", "disabled") != "disabled":
        arguments.rerun_mode = "disabled"
        done.append("--rerun-mode disabled: an iteration runs once, since the next one has begun when it ends")
    if not flush and getattr(arguments, "barrier_with_L1_time", False):
        arguments.barrier_with_L1_time = False
        done.append("--no-barrier-with-level-1-timing: stages do not wait for each other to be timed")
    return done


def _micro_batches(arguments: Namespace) -> list[int]:
    """Micro-batches of the job's windows, the first window's first; of more than one size where the batch grows."""
    last = arguments.global_batch_size
    first, increment, *_ = map(int, getattr(arguments, "rampup_batch_size", None) or (last, 1))
    batches = [*range(first, last, max(1, increment)), last]
    each = arguments.micro_batch_size * arguments.data_parallel_size
    return list(dict.fromkeys(max(1, batch // each) for batch in batches))


def _read_options(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        options = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{OPTIONS_FLAG} {path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{OPTIONS_FLAG} {path} is not JSON: {error}") from None
    if not isinstance(options, dict) or "name" in options:
        raise ValueError(f"{OPTIONS_FLAG} {path} must hold an object with options alone; {FLAG} names the schedule")
    return options
