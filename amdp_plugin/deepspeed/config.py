"""The ``schedule`` key of the ``pipeline`` section, and what it cannot be combined with."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from math import inf
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from ..plan import schedules
from ..plan.costs import CostModel
from ..plan.schedule import Schedule
from ..runtime.watch import DEFAULT_TIMEOUT_SECONDS

STOCK_KEYS = (
    "stages", "partition", "seed_layers", "activation_checkpoint_interval", "pipe_partitioned", "grad_partitioned",
    "use_reentrant",
)  # fmt: skip


class ScheduleSettings(BaseModel):
    """The options that every schedule has; a schedule's own are added as ``create_model`` fields."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str
    timeout_seconds: float = Field(
        DEFAULT_TIMEOUT_SECONDS, gt=0, description="the longest that one message or collective of the pipeline may take"
    )
    backward_ratio: float = Field(2.0, gt=0, lt=inf, description="time of a backward, in forwards of its stage")
    link_cost: float = Field(0.0, ge=0, lt=inf, description="time of a message between ranks, in forwards of 1")
    stage_costs: list[float] | None = Field(None, description="time of every stage's forward, where they differ")

    def costs(self, num_stages: int) -> CostModel:
        """What the program is made for. Only the ratios matter.

        Raises:
            ValueError: when ``stage_costs`` are of another number of stages, or no times.
        """
        return CostModel.relative(
            num_stages,
            backward_ratio=self.backward_ratio,
            link_cost=self.link_cost,
            stage_costs=self.stage_costs or (),
        )

    def make(self, num_stages: int, micro_batches: int, meet: bool = False) -> Schedule:
        """The schedule for a pipeline of ``num_stages`` and ``gradient_accumulation_steps`` of ``micro_batches``.

        Args:
            meet: whether the job wants one decision of all stages at every update (a norm, a loss scale, a tied
                weight). Schedules that leave it open (``"updates": "auto"``) then update together.
        """
        common = set(ScheduleSettings.model_fields)
        chosen = {key: value for key, value in self.model_dump().items() if key not in common}
        if meet and chosen.get("updates") == "auto":
            chosen["updates"] = "together"
        return schedules.make(self.name, num_stages, micro_batches, **chosen)


def read_settings(pipeline: Any) -> ScheduleSettings | None:
    """The settings in the ``pipeline`` section, or ``None`` where it has no ``schedule``.

    Raises:
        ValueError: for anything that is not a schedule with options that it knows.
    """
    if not isinstance(pipeline, Mapping):
        return None
    if "schedule" not in pipeline:
        _refuse_misspelling(pipeline)
        return None
    unknown = sorted(pipeline.keys() - {*STOCK_KEYS, "schedule"})
    if unknown:
        raise ValueError(f'"pipeline" has no key {", ".join(unknown)}; it has {", ".join(STOCK_KEYS)} and schedule')
    section = pipeline["schedule"]
    if isinstance(section, str):
        section = {"name": section}
    if not isinstance(section, Mapping) or not isinstance(section.get("name"), str):
        raise ValueError(
            f'"pipeline": {{"schedule": {section!r}}} must be a name, or an object with a "name" and options; '
            f"the names are {', '.join(schedules.names())}"
        )
    model = _settings_model(section["name"])
    try:
        return model(**section)
    except ValidationError as error:
        raise ValueError(_explain(error, model, section["name"])) from None


def _settings_model(name: str) -> type[ScheduleSettings]:
    fields: dict[str, Any] = {
        key: (parameter.annotation, parameter.default) for key, parameter in schedules.options(name).items()
    }
    return create_model("ScheduleSettings", __base__=ScheduleSettings, **fields)


def _explain(error: ValidationError, model: type[ScheduleSettings], name: str) -> str:
    known = ", ".join(key for key in model.model_fields if key != "name")
    lines = []
    for problem in error.errors():
        option = ".".join(map(str, problem["loc"]))
        if problem["type"] == "extra_forbidden":
            lines.append(f"schedule {name!r} has no option {option!r}; its options are {known}")
        else:
            lines.append(f"option {option!r} of schedule {name!r} is {problem['input']!r}: {problem['msg']}")
    return "; ".join(lines)


def _refuse_misspelling(pipeline: Mapping[str, Any]) -> None:
    """DeepSpeed ignores keys that it does not know, so a typing error would quietly train stock 1F1B."""
    for key in pipeline.keys() - set(STOCK_KEYS):
        if difflib.get_close_matches(str(key).lower(), ["schedule"], cutoff=0.75):
            raise ValueError(f'"pipeline" has no key {key!r}; did you mean "schedule"?')


def enabled(config: Mapping[str, Any], section: str) -> bool:
    """Whether the DeepSpeed configuration turns ``section`` on."""
    value = config.get(section)
    return bool(value.get("enabled")) if isinstance(value, Mapping) else bool(value)


def check_compatible(config: Mapping[str, Any], settings: ScheduleSettings) -> None:
    """Refuse what the schedules cannot work with.

    Args:
        config: the DeepSpeed configuration, as the user wrote it.

    Raises:
        ValueError: with the reason and the alternative.
    """

    def refuse(what: str, why: str, instead: str) -> None:
        raise ValueError(f"schedule {settings.name!r} cannot be used with {what}: {why}; {instead}")

    if enabled(config, "amp"):
        refuse('"amp"', "apex scales the loss over all stages together", 'use "bf16"')
    if enabled(config, "torch_autocast"):
        refuse(
            '"torch_autocast"',
            "it keeps a cast copy of the weights in every graph, so a delayed backward would use the old weights",
            'use "bf16"',
        )
    zero = config.get("zero_optimization")
    stage = zero.get("stage", 0) if isinstance(zero, Mapping) else 0
    if isinstance(stage, int) and stage > 1:
        refuse(
            f"ZeRO stage {stage}",
            "DeepSpeed's pipelines hold whole gradients and weights",
            'use "zero_optimization": {"stage": 1}',
        )


def check_topology(pipeline: Mapping[str, Any], model_parallel: int, settings: ScheduleSettings) -> None:
    """Refuse activations partitioned over tensor-parallel ranks, where the user asks for them."""
    for key in ("pipe_partitioned", "grad_partitioned"):
        if model_parallel > 1 and pipeline.get(key):
            raise ValueError(
                f'schedule {settings.name!r} sends whole activations: "{key}": true cannot be used with '
                f"{model_parallel} tensor-parallel ranks; leave it out or set it to false"
            )
