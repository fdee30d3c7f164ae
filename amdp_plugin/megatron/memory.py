"""Measures what the memory of a rank holds, under stock Megatron and our schedules alike."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..compare.memory import held
from ..compare.recording import Memory
from ..runtime.replica import Guest
from .guests import bare
from .hook import ScheduledForwardBackward, only
from .optimizer import members


@contextmanager
def gauge(model: Any, optimizer: Any, hook: ScheduledForwardBackward | None, samples: list[Memory]) -> Iterator[None]:
    """Collect ``samples`` where gradients are at their fullest in the enclosed step: just before they are applied."""

    def sample(*_: Any) -> None:
        samples.append(measure(only(model, "model chunk"), optimizer, hook))

    handles = [each.optimizer.register_step_pre_hook(sample) for each in members(optimizer)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def measure(chunk: Any, optimizer: Any, hook: ScheduledForwardBackward | None) -> Memory:
    """What this rank holds now, without the peak.

    Args:
        chunk: the home stage, under Megatron's DDP.
        hook: what holds guests beside it; ``None`` in a stock job.
    """
    guests: Iterable[nn.Module] = hook.guests.values() if hook else ()
    replicas = hook.pipeline.replicas.values() if hook else ()
    modules = [bare(chunk), *guests]
    parameters = [parameter for module in modules for parameter in module.parameters()]
    inner = [each.optimizer for each in members(optimizer)]
    stepped: Sequence[Tensor] = [each for one in inner for group in one.param_groups for each in group["params"]]
    flat = [*chunk.buffers, *chunk.expert_parallel_buffers]  # of Megatron's DDP
    return held(
        weights=[
            parameters,
            [module.buffers() for module in modules],
            [buffer.param_data for buffer in flat],
            hook.pipeline.other_weights() if hook else (),
        ],
        gradients=[
            [buffer.grad_data for buffer in flat],
            [replica.gradients for replica in replicas if isinstance(replica, Guest)],
            hook.pipeline.parked_gradients() if hook else (),
            [parameter.grad for parameter in [*parameters, *stepped]],
        ],
        exchange=hook.pipeline.exchange_buffers() if hook else (),
        optimizer_state=[stepped, [one.state for one in inner]],
    )
