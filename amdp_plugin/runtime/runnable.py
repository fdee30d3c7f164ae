"""What can be planned and cannot be run."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.nn.utils import parametrize

from ..plan.schedule import Schedule
from .torch_private import compiler_options


def check_runnable(schedule: Schedule) -> None:
    """Refuse a schedule that says what neither the engines nor the serial pipeline do.

    Raises:
        ValueError: with the alternative.
    """
    if any(schedule.update_delay) and not schedule.relays:
        raise ValueError(
            f"schedule {schedule.name!r} can be planned, not run: an engine applies every gradient before it sums the "
            f"next window's, so update_delay must be 0, it is {max(schedule.update_delay)} (amdp: leave "
            'out "parked")'
        )


def check_homes(schedule: Schedule) -> None:
    """Refuse a placement whose homes are not where a host builds the stages: stage ``s`` on rank ``s``.

    Raises:
        ValueError: with the placement.
    """
    if any(schedule.placement.home(stage) != stage for stage in range(schedule.num_stages)):
        raise ValueError(
            f"schedule {schedule.name!r}: its first direction must place stage s on rank s, it places them on "
            f"{schedule.placement.ranks[0]}"
        )


def check_modules(schedule: Schedule, modules: Iterable[nn.Module]) -> None:
    """Refuse layers that do not keep what a schedule needs of them.

    Raises:
        ValueError: with the layer's name.
    """
    for name, layer in (named for module in modules for named in module.named_modules()):
        where = f"schedule {schedule.name!r}: layer {name or type(layer).__name__!r}"
        if compiler_options(layer).get("triton.cudagraphs"):
            raise ValueError(
                f'{where} is compiled to CUDA graphs (torch.compile with mode="reduce-overhead" or "max-autotune"), '
                "which write the outputs of every micro-batch to the same memory, while several are in flight; use the "
                'default mode or "max-autotune-no-cudagraphs"'
            )
        if not schedule.flush and parametrize.is_parametrized(layer):
            raise ValueError(
                f"{where} computes with weights made from its parameters (torch.nn.utils.parametrize), which backwards "
                "would use as they were at the forward, whatever the schedule says; call "
                "parametrize.remove_parametrizations, or use a schedule that flushes (1f1b)"
            )
