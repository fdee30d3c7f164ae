"""What makes Megatron take this rank for that of another stage: a guest is built and run as its home would be."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn


@contextmanager
def acting_as(stage: int) -> Iterator[None]:
    """Within it Megatron's ``parallel_state`` says that this rank runs ``stage``.

    Layers, layouts of the pipeline, data and dropout ask there, whatever group they were given.
    """
    before = parallel_state.get_pipeline_model_parallel_rank()
    if before == stage:
        yield
        return
    parallel_state.set_pipeline_model_parallel_rank(stage)
    try:
        yield
    finally:
        parallel_state.set_pipeline_model_parallel_rank(before)


@contextmanager
def building_with(groups: ProcessGroupCollection) -> Iterator[None]:
    """Within it modules that take their process groups from Megatron's globals get ``groups``.

    Not every ``model_provider`` passes on those that it is given.
    """
    name = "use_mpu_process_groups"
    original = ProcessGroupCollection.__dict__[name]
    setattr(ProcessGroupCollection, name, staticmethod(lambda *args, **kwargs: copy.copy(groups)))
    try:
        yield
    finally:
        setattr(ProcessGroupCollection, name, original)


class StageGroup:
    """Stands in for the pipeline's process group where a module only asks which stage it is."""

    def __init__(self, stage: int, num_stages: int) -> None:
        self._stage, self._num_stages = stage, num_stages

    def rank(self) -> int:
        return self._stage

    def size(self) -> int:
        return self._num_stages


def bare(chunk: nn.Module) -> nn.Module:
    """The model itself, without DDP and without the module that casts."""
    while isinstance(module := getattr(chunk, "module", None), nn.Module):
        chunk = module
    return chunk


def accepted(function: Callable[..., Any], **arguments: Any) -> dict[str, Any]:
    """Those of ``arguments`` that ``function`` takes: Megatron's signatures grow and shrink from release to release."""
    names = _parameters(function)
    return arguments if names is None else {name: value for name, value in arguments.items() if name in names}


@cache
def _parameters(function: Callable[..., Any]) -> frozenset[str] | None:
    """Names of what ``function`` takes; ``None`` where it takes any."""
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return None
    return frozenset(parameters)
