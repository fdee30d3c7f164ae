"""The ``schedule`` key of the ``pipeline`` section, and what it cannot be combined with."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from ..plan.schedules import names
from ..plan.schedules.options import COMMON
from ..settings import ScheduleSettings, read_schedule

STOCK_KEYS = (
    "stages", "partition", "seed_layers", "activation_checkpoint_interval", "pipe_partitioned", "grad_partitioned",
    "use_reentrant",
)  # fmt: skip


def check_places(config: Mapping[str, Any]) -> None:
    """Refuse a schedule that stands where DeepSpeed would not look, and quietly train stock 1F1B.

    Raises:
        ValueError: with the place where it belongs.
    """
    right = 'write "pipeline": {"schedule": "paci"}, or {"schedule": {"name": "paci", ...}} with options'
    for key, value in config.items():
        like = any(word in str(key).lower() for word in ("schedule", "pipeline"))
        if key != "pipeline" and like and _names_a_schedule(value):
            raise ValueError(f"DeepSpeed has no key {key!r} at the top of a configuration; {right}")
    pipeline = config.get("pipeline", {})
    if not isinstance(pipeline, Mapping):
        raise ValueError(f'"pipeline" is an object, not {pipeline!r}; {right}')
    stray = [key for key in pipeline if key in COMMON]
    if stray:
        listed = ", ".join(map(repr, stray))
        raise ValueError(f'"pipeline" has no key {listed}, which belongs to the object of the schedule; {right}')


def _names_a_schedule(value: Any) -> bool:
    if isinstance(value, Mapping):
        return _names_a_schedule(value.get("schedule", value.get("name")))
    return isinstance(value, str) and value in names()


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
    return read_schedule(section, f'"pipeline": {{"schedule": {section!r}}}')


def _refuse_misspelling(pipeline: Mapping[str, Any]) -> None:
    """DeepSpeed ignores keys that it does not know, so a typing error would quietly train stock 1F1B."""
    for key in pipeline.keys() - set(STOCK_KEYS):
        if difflib.get_close_matches(str(key).lower(), ["schedule"], cutoff=0.75):
            raise ValueError(f'"pipeline" has no key {key!r}; did you mean "schedule"?')


def enabled(config: Mapping[str, Any], section: str) -> bool:
    """Whether the DeepSpeed configuration turns ``section`` on."""
    value = config.get(section)
    return bool(value.get("enabled")) if isinstance(value, Mapping) else bool(value)


def offloads(config: Mapping[str, Any]) -> bool:
    """Whether the optimizer steps on the host."""
    zero = config.get("zero_optimization")
    section = zero.get("offload_optimizer") if isinstance(zero, Mapping) else None
    device = section.get("device", "none") if isinstance(section, Mapping) else section
    return device not in (None, False, "none")


def number_in(config: Mapping[str, Any], key: str, default: Any) -> Any:
    """What ``key`` holds, where it is a number or absent.

    Raises:
        ValueError: for a text such as ``"auto"``, which is for other programs to fill in.
    """
    value = config.get(key, default)
    if isinstance(value, str):
        raise ValueError(f'"{key}" must be a number, got {value!r}')
    return value


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
    if settings.compensation != "none" and offloads(config):
        refuse(
            f'"compensation": "{settings.compensation}" and "offload_optimizer"',
            "its step on the host has not been tried with two iterates",
            'leave one of them out',
        )
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
