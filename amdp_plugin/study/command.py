"""``amdp study``: what schedules do to a model's loss, on one device."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import product
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..lists_command import ListsCommand

if TYPE_CHECKING:
    from .trial import Setting, Trial, Variant

MODEL = "scripts/gpt_study.py:problem"


class StudyCommand(ListsCommand):
    """``--schedules A B``."""

    lists = ("--schedules", "--optimizers", "--learning-rates", "--compensation", "--flush-first")


def study(
    schedules: Annotated[
        list[str], typer.Option(help="NAME (see amdp plan), or NAME:key=value,key=value. The first is the reference.")
    ] = ["1f1b", "paci"],  # noqa: B006
    optimizers: Annotated[list[str], typer.Option(help="adamw, muon, sgd.")] = ["adamw"],  # noqa: B006
    learning_rates: Annotated[
        list[str] | None, typer.Option(help="OPTIMIZER:RATE,RATE. A method is shown at its best, too.")
    ] = None,
    compensation: Annotated[
        list[str], typer.Option(help="none, error_feedback; with both, schedules that run freely are run with each.")
    ] = ["none"],  # noqa: B006
    flush_first: Annotated[
        list[int], typer.Option(help="Steps at the start that end with a flush; with several, each of them.")
    ] = [0],  # noqa: B006
    stages: Annotated[int, typer.Option(help="Stages of the pipeline.")] = 8,
    micro_batches: Annotated[int, typer.Option(help="Micro-batches of a step.")] = 8,
    steps: Annotated[int, typer.Option(help="Steps of a run.")] = 300,
    warm_up: Annotated[int, typer.Option(help="Steps until the learning rate is whole.")] = 30,
    clip: Annotated[float, typer.Option(help="Largest norm of the gradients; 0: any.")] = 1.0,
    seeds: Annotated[int, typer.Option(help="Runs of each, with other weights and data.")] = 2,
    at_equal_time: Annotated[
        bool, typer.Option("--at-equal-time", help="Also train as many steps as fit in the reference's time.")
    ] = False,
    backward_ratio: Annotated[float, typer.Option(help="Time of a backward, in forwards.")] = 2.0,
    link_cost: Annotated[float, typer.Option(help="Time of a message, in forwards of one stage.")] = 0.0,
    model: Annotated[str, typer.Option(help="FILE:FUNCTION, which takes a seed and returns a Problem.")] = MODEL,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    processes: Annotated[int | None, typer.Option(help="Runs at a time; by default as many as cores.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for table, picture and what is needed to go on.")] = Path("study"),
) -> int:
    """Train a model under several schedules with the serial oracle, which needs no second device, and compare losses at
    equal tokens and at equal predicted time. Stopped, it goes on where it was."""
    from .problem import load
    from .runner import run_all
    from .summary import summarize, table
    from .trial import Setting

    at_a_time = os.cpu_count() or 1 if processes is None else processes
    _check_least(1, stages=stages, micro_batches=micro_batches, steps=steps, seeds=seeds, processes=at_a_time)
    _check_least(0, warm_up=warm_up, clip=clip)
    load(model)  # refuses what is not there
    _check_device(device)
    costs = (("backward_ratio", backward_ratio), ("link_cost", link_cost))
    setting = Setting(model, stages, micro_batches, warm_up, clip, device, costs)
    variants = list(_variants(setting, schedules, compensation, flush_first))
    rates = _read_rates(optimizers, learning_rates or [])
    _check_predictions(setting, variants, rates)
    trials = list(_trials(setting, variants, rates, steps, seeds, at_equal_time))
    outcomes = run_all(setting, trials, out, at_a_time)
    ordered = {trial: outcomes[trial] for trial in trials}
    rows = summarize(ordered, variants[0], steps)
    text = table(rows)
    (out / "table.md").write_text(f"{text}\n")
    told = [{**asdict(row), "variant": str(row.variant), "loss": row.loss} for row in rows]
    (out / "result.json").write_text(json.dumps({"setting": asdict(setting), "rows": told}, indent=2))
    from .picture import picture

    (out / "study.png").write_bytes(picture(ordered, rows))
    print(text)
    print(f"picture: {out / 'study.png'}")
    return 0


def _check_least(least: float, **values: float) -> None:
    for name, value in values.items():
        if not least <= value < inf:
            raise ValueError(f"--{name.replace('_', '-')} is at least {least}, got {value}")


def _check_device(name: str) -> None:
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch raises either, the second where it was built without CUDA
        raise ValueError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from None


def _variants(
    setting: Setting, texts: Sequence[str], compensation: Sequence[str], flush_first: Sequence[int]
) -> Iterator[Variant]:
    """Every schedule with every compensation and every opening; one that flushes has nothing of them, and is there
    once, as is one that extrapolates weights, which is a compensation, under every opening."""
    from .trial import Variant

    for text in texts:
        variant = Variant.read(text)
        made = variant.make(setting.stages, setting.micro_batches)
        if made.flush:
            yield variant
        else:
            kinds = ["none"] if made.extrapolates else compensation
            yield from (variant.told(each, windows) for windows in flush_first for each in kinds)


def _check_predictions(setting: Setting, variants: Sequence[Variant], optimizers: Iterable[str]) -> None:
    """Refuse, before anything is trained, an optimizer by which a schedule cannot predict weights.

    Raises:
        ValueError: with both, the reason and the alternative.
    """
    from torch import nn, ones

    from ..plan.weights import PREDICTED
    from ..runtime.smooth_direction import check_optimizer
    from .optimizers import OPTIMIZERS

    made = {variant: variant.make(setting.stages, setting.micro_batches) for variant in variants}
    predicting = [variant for variant, schedule in made.items() if schedule.weights in PREDICTED]
    for variant, name in product(predicting, optimizers):
        try:
            check_optimizer(OPTIMIZERS[name]([nn.Parameter(ones(2, 2))], 1.0), predicts=True)
        except ValueError as error:
            raise ValueError(f"--schedules {variant} with --optimizers {name}: {error}") from None


def _trials(
    setting: Setting, variants: Sequence[Variant], rates: dict[str, Sequence[float]],
    steps: int, seeds: int, longer: bool,
) -> Iterator[Trial]:  # fmt: skip
    from .trial import Trial

    whole = steps * setting.planned(variants[0]).forwards_per_window
    for variant in variants:
        numbers = {steps: None}
        if longer:
            numbers[setting.steps_within(variant, whole)] = None
        for number in numbers:
            for optimizer, values in rates.items():
                for learning_rate in values:
                    for seed in range(1, seeds + 1):
                        yield Trial(variant, optimizer, learning_rate, seed, number)


def _read_rates(optimizers: Sequence[str], texts: Sequence[str]) -> dict[str, Sequence[float]]:
    """The learning rates of every optimizer.

    Raises:
        ValueError: for an unknown optimizer, or what is no number.
    """
    from .optimizers import DEFAULT_RATES, OPTIMIZERS

    unknown = sorted(set(optimizers) - OPTIMIZERS.keys())
    if unknown:
        raise ValueError(f"--optimizers: unknown {', '.join(unknown)}; there are {', '.join(OPTIMIZERS)}")
    rates: dict[str, Sequence[float]] = {name: DEFAULT_RATES[name] for name in optimizers}
    for text in texts:
        name, _, numbers = text.partition(":")
        try:
            values = [float(number) for number in numbers.split(",")]
            if not all(0 < value < inf for value in values):
                raise ValueError
        except ValueError:
            raise ValueError(f"--learning-rates wants OPTIMIZER:RATE,RATE, rates above 0; got {text!r}") from None
        if name not in rates:
            raise ValueError(f"--learning-rates: {name!r} is none of --optimizers {', '.join(rates)}")
        rates[name] = values
    return rates
