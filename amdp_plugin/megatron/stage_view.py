"""What makes Megatron take this rank for that of another stage: a guest is built and run as its home would be."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from megatron.core import parallel_state


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


class StageGroup:
    """Stands in for the pipeline's process group where a module only asks which stage it is."""

    def __init__(self, stage: int, num_stages: int) -> None:
        self._stage, self._num_stages = stage, num_stages

    def rank(self) -> int:
        return self._stage

    def size(self) -> int:
        return self._num_stages


def accepted(function: Callable[..., Any], **arguments: Any) -> dict[str, Any]:
    """Those of ``arguments`` that ``function`` takes: Megatron's signatures grow and shrink from release to release."""
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return arguments
    return {name: value for name, value in arguments.items() if name in parameters}
