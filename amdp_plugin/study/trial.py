"""One training run of a study."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..plan import schedules
from ..plan.costs import CostModel
from ..plan.planner import Planner
from ..plan.report import Report, report
from ..plan.schedule import Schedule
from ..runtime.device import placed
from ..runtime.serial import SerialPipeline
from .optimizers import OPTIMIZERS, rate
from .problem import Problem, load

COMMON: dict[str, Callable[[str], Any]] = {
    "compensation": str, "strength": float, "flush_first": int, "decisions": str
}  # fmt: skip
"""Options of every schedule, and how they are read."""
VALIDATIONS = 12
"""Times that a trial is validated, at least, evenly over its steps."""


@dataclass(frozen=True)
class Variant:
    """A schedule with its options."""

    schedule: str
    options: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def read(cls, text: str) -> Variant:
        """As on the command line: ``paci`` or ``amdp:directions=2,decisions=meeting``.

        Raises:
            ValueError: for an unknown schedule or option.
        """
        name, _, rest = text.partition(":")
        options = []
        for setting in filter(None, rest.split(",")):
            key, equals, value = setting.partition("=")
            if not equals:
                raise ValueError(f"--schedules wants NAME or NAME:key=value,key=value, got {text!r}")
            read = COMMON.get(key) or partial(schedules.read_option, name, key)
            try:
                options.append((key, read(value)))
            except ValueError as error:
                raise ValueError(f"--schedules {text}: {error}") from None
        return cls(name, tuple(options))

    def told(self, compensation: str, flush_first: int) -> Variant:
        """With what the command line tells all."""
        told: dict[str, Any] = {"compensation": compensation, "flush_first": flush_first}
        chosen = tuple((key, value) for key, value in told.items() if value not in ("none", 0))
        return Variant(self.schedule, (*self.options, *chosen))

    def make(self, stages: int, micro_batches: int) -> Schedule:
        return schedules.make(self.schedule, stages, micro_batches, **dict(self.options))

    def __str__(self) -> str:
        options = ",".join(f"{key}={value}" for key, value in self.options)
        return f"{self.schedule}:{options}" if options else self.schedule


@dataclass(frozen=True)
class Setting:
    """What all trials of a study share.

    Args:
        model: ``FILE:FUNCTION`` of the problem.
        stages, micro_batches: of the pipeline; micro-batches of a step.
        warm_up: steps until the learning rate is whole.
        clip: the largest norm of a stage's gradients, or of all stages', as far as decisions tell it; 0: any.
        device: of the computation.
        costs: of :meth:`.CostModel.relative`, for the predicted time.
    """

    model: str
    stages: int
    micro_batches: int
    warm_up: int
    clip: float
    device: str = "cpu"
    costs: tuple[tuple[str, Any], ...] = ()

    def cost_model(self) -> CostModel:
        return CostModel.relative(self.stages, **dict(self.costs))

    def planned(self, variant: Variant) -> Report:
        """The figures of its plan."""
        return report(Planner(variant.make(self.stages, self.micro_batches), self.cost_model()), windows=1)

    def steps_within(self, variant: Variant, forwards: float) -> int:
        """How many steps take that time."""
        planned = self.planned(variant)
        opening = planned.flush_first * (planned.opening_forwards_per_window or 0.0)
        return round(planned.flush_first + (forwards - opening) / planned.forwards_per_window)


@dataclass(frozen=True)
class Trial:
    """One run: what is varied."""

    variant: Variant
    optimizer: str
    learning_rate: float
    seed: int
    steps: int

    def __str__(self) -> str:
        return f"{self.variant} {self.optimizer} {self.learning_rate:g} seed {self.seed} {self.steps} steps"


@dataclass(frozen=True)
class Outcome:
    """What came of a trial.

    Args:
        losses: the mean training loss of every step.
        validation: ``(steps done, loss)``, with all stages' weights of that version.
        tokens_per_step: for an axis.
        forwards_per_step: predicted time of a step in the steady state, in forwards of one stage.
        opening_steps: steps at the start that end with a flush, and
        opening_forwards_per_step: what each of them takes.
    """

    losses: list[float]
    validation: list[tuple[int, float]]
    tokens_per_step: int
    forwards_per_step: float
    opening_steps: int = 0
    opening_forwards_per_step: float = 0.0

    def million_tokens(self, step: float) -> float:
        """Of the first ``step`` steps."""
        return step * self.tokens_per_step / 1e6

    def forwards(self, step: float) -> float:
        """Predicted time of the first ``step`` steps, in forwards of one stage."""
        opening = min(step, self.opening_steps)
        return opening * self.opening_forwards_per_step + (step - opening) * self.forwards_per_step

    @classmethod
    def of(cls, told: dict[str, Any]) -> Outcome:
        """From its fields, as JSON keeps them."""
        return cls(**{**told, "validation": [(step, loss) for step, loss in told["validation"]]})


@dataclass
class _Snapshots:
    """Weights of all stages at the same version, which they come to one after another."""

    stages: int
    taken: dict[int, dict[int, list[Tensor]]] = field(default_factory=dict)

    def take(self, stage: int, step: int, parameters: Iterable[Tensor]) -> dict[int, list[Tensor]] | None:
        """Keep those of one stage; returns all of that step once they are there."""
        found = self.taken.setdefault(step, {})
        found[stage] = [parameter.detach().clone() for parameter in parameters]
        return self.taken.pop(step) if len(found) == self.stages else None


def run(setting: Setting, trial: Trial, progress: Callable[[int], None] = lambda step: None) -> Outcome:
    """Train and validate. ``progress`` is told the number of steps that the first stage has done.

    Raises:
        ValueError: for a problem or a schedule that cannot be made.
    """
    problem = load(setting.model)(trial.seed)
    device = torch.device(setting.device)
    place: Callable[[Any], Any] = lambda value: placed(value, lambda tensor: tensor.to(device))  # noqa: E731
    stages = [stage.to(device) for stage in problem.stages(setting.stages)]
    evaluated = deepcopy(stages)
    every = max(1, trial.steps // VALIDATIONS)
    snapshots, validation = _Snapshots(setting.stages), list[tuple[int, float]]()

    def after_step(stage: int, step: int, parameters: list[nn.Parameter]) -> None:
        if stage == 0:
            progress(step)
        if step % every == 0 or step == trial.steps:
            weights = snapshots.take(stage, step, parameters)
            if weights is not None:
                validation.append((step, _validate(evaluated, weights, problem, place)))

    schedule = trial.variant.make(setting.stages, setting.micro_batches)
    alone = schedule.updates_meet or schedule.decisions == "local"
    pipeline = SerialPipeline(
        stages,
        _optimizers(trial, setting, after_step),
        problem.loss,
        schedule,
        costs=setting.cost_model(),
        seeds=[trial.seed] * setting.stages,
        before_step=lambda parameters: _clip(parameters, setting.clip if alone else 0.0),
        measure=_squares,
        decide=lambda parameters, total: _clip_by(parameters, setting.clip, total),
    )
    losses = pipeline.train((place(each) for each in problem.micro_batches), trial.steps)
    planned = setting.planned(trial.variant)
    return Outcome(
        losses, validation, problem.tokens * setting.micro_batches, planned.forwards_per_window,
        planned.flush_first, planned.opening_forwards_per_window or 0.0,
    )  # fmt: skip


def _optimizers(
    trial: Trial, setting: Setting, after_step: Callable[[int, int, list[nn.Parameter]], None]
) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    """Makes the optimizer of one stage after another, whose learning rate follows its own steps."""
    made = 0

    def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        nonlocal made
        stage, step, made = made, 0, made + 1
        optimizer = OPTIMIZERS[trial.optimizer](parameters, trial.learning_rate)
        rates = [group["lr"] for group in optimizer.param_groups]

        def set_rates(*_: Any) -> None:
            for group, whole in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = whole * rate(step, trial.steps, setting.warm_up)

        def stepped(*_: Any) -> None:
            nonlocal step
            step += 1
            after_step(stage, step, parameters)

        optimizer.register_step_pre_hook(set_rates)
        optimizer.register_step_post_hook(stepped)
        return optimizer

    return make


def _squares(gradients: list[Tensor | None]) -> float:
    """What stages tell each other of their gradients."""
    return float(nn.utils.get_total_norm([each for each in gradients if each is not None]).square())


def _clip_by(parameters: list[nn.Parameter], limit: float, total: float) -> None:
    if limit:
        nn.utils.clip_grads_with_norm_(parameters, limit, torch.tensor(total).sqrt())


def _clip(parameters: list[nn.Parameter], limit: float) -> None:
    if limit:
        nn.utils.clip_grad_norm_(parameters, limit)


def _validate(
    stages: list[nn.Module], weights: dict[int, list[Tensor]], problem: Problem, place: Callable[[Any], Any]
) -> float:
    """The mean loss of the validation data under ``weights`` by stage."""
    for number, values in weights.items():
        trained = [parameter for parameter in stages[number].parameters() if parameter.requires_grad]
        for parameter, weight in zip(trained, values, strict=True):
            parameter.data.copy_(weight)
        stages[number].eval()
    total = 0.0
    with torch.no_grad():
        for each in problem.validation:
            value, label = place(each)
            for stage in stages:
                value = stage(value)
            total += float(problem.loss(value, label))
    return total / len(problem.validation)
