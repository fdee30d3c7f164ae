"""Measures what the memory of a rank holds, for stock engines and ours alike.

What lives within DeepSpeed's own reductions alone (its buckets) is seen by the peak, and by nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from deepspeed.runtime.pipe import schedule as stock
from torch import Tensor

from ..compare.memory import held, tensors
from ..compare.recording import Memory
from ..plan.action import REDUCE, UPDATE
from .instructions import RunAction

GRADIENTS_OF_OPTIMIZERS = ("fp32_groups_gradients_flat", "averaged_gradients", "all_grad_tensors")
"""Where DeepSpeed's bf16 and ZeRO-1 optimizers keep gradients that no parameter has."""


def measure(engine: Any) -> Memory:
    """What ``engine``, a ``PipelineEngine``, holds now, without the peak."""
    modules = [engine.module, *getattr(engine, "guests", {}).values()]
    parameters = [parameter for module in modules for parameter in module.parameters()]
    optimizer = torch_optimizer(engine)
    stepped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return held(
        weights=[
            parameters,
            (buffer for module in modules for buffer in module.buffers()),
            getattr(engine, "other_weights", tuple)(),
        ],
        gradients=_gradients(engine, [*parameters, *stepped]),
        exchange=getattr(engine, "exchange_buffers", tuple)(),
        optimizer_state=[stepped, optimizer.state],
    )


@contextmanager
def gauge(engine: Any, samples: list[Memory]) -> Iterator[None]:
    """Collect ``samples`` of ``engine`` where gradients are at their fullest in the enclosed step: before they are
    reduced, and in the optimizer's step, when ZeRO-1 and fp16 have made them whole in fp32."""

    def sample(*_: Any) -> None:
        samples.append(measure(engine))

    def wrap(kind: type, run: Callable[..., None]) -> Callable[..., None]:
        @wraps(run)
        def measured(engine: Any, **arguments: Any) -> None:
            if kind is stock.ReduceGrads or (kind is RunAction and arguments["action"].kind in (REDUCE, UPDATE)):
                sample()
            run(engine, **arguments)

        return measured

    instructions = engine._INSTRUCTION_MAP
    # The engine looks its instructions up through itself.
    engine._INSTRUCTION_MAP = {kind: wrap(kind, run) for kind, run in instructions.items()}
    hook = torch_optimizer(engine).register_step_pre_hook(sample)
    try:
        yield
    finally:
        hook.remove()
        engine._INSTRUCTION_MAP = instructions


def torch_optimizer(engine: Any) -> Any:
    """The optimizer that DeepSpeed's own may wrap. It steps the weights, or fp32 masters of them."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _gradients(engine: Any, parameters: Iterable[Tensor]) -> Iterator[Tensor]:
    for parameter in parameters:
        yield from tensors([parameter.grad, getattr(parameter, "grad_accum", None)])
    yield from tensors([getattr(engine.optimizer, name, None) for name in GRADIENTS_OF_OPTIMIZERS])
    yield from tensors(getattr(engine, "other_gradients", tuple)())
