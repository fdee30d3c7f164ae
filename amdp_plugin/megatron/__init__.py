"""Megatron under the plugin's schedules: patched Megatron-LM jobs, and training loops of one's own on megatron-core."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .hook import ScheduledForwardBackward

__all__ = ["forward_backward_func", "patch", "unpatch"]


def forward_backward_func(schedule: Any) -> ScheduledForwardBackward:
    """What to call in the place of Megatron's ``get_forward_backward_func()``, in a training loop of one's own.

    ::

        forward_backward = amdp_plugin.megatron.forward_backward_func("paci")
        forward_backward.attach(model, optimizer, model_provider)  # once
        losses = forward_backward(forward_step_func=..., ...)      # as Megatron's, then optimizer.step() as before

    Args:
        schedule: a name, or an object with a ``"name"`` and options, as in a DeepSpeed configuration; or what
            ``arguments.read_flags`` found on a command line.

    Raises:
        ValueError: for an unknown schedule or option.
    """
    from ..settings import ScheduleSettings, read_schedule, refusing
    from .hook import ScheduledForwardBackward

    read = isinstance(schedule, ScheduleSettings)
    with refusing():
        return ScheduledForwardBackward(schedule if read else read_schedule(schedule, f"the schedule {schedule!r}"))


def patch() -> list[str]:
    """Give Megatron-LM the flag ``--pipeline-schedule``, and its jobs the schedule that it names.

    May be called again; :func:`unpatch` undoes it. Call it before ``pretrain()``.

    Returns:
        What was done, a line each.

    Raises:
        ValueError: where this Megatron-LM lacks a function that has to be replaced, naming it.
    """
    from .patching import patch

    return patch()


def unpatch() -> None:
    """Leave Megatron as it was before :func:`patch`."""
    from .patching import unpatch

    unpatch()
