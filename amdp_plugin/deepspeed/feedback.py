"""Error feedback around the steps of DeepSpeed's optimizers: what they step, and how that gets into the weights."""

from __future__ import annotations

from typing import Any

import torch

from ..runtime.feedback import ErrorFeedback
from ..settings import ScheduleSettings
from .memory import torch_optimizer


def error_feedback(engine: Any, settings: ScheduleSettings) -> ErrorFeedback:
    """That of the engine's own stage.

    Raises:
        ValueError: where the schedule asks for it and its optimizer cannot do it.
    """
    inner = torch_optimizer(engine)
    if settings.compensation != "none":
        _check(engine.optimizer, inner, settings)
    return ErrorFeedback(engine.module.parameters(), [inner], lambda: _copy_masters(engine.optimizer))


def _check(optimizer: Any, inner: Any, settings: ScheduleSettings) -> None:
    def refuse(what: str, why: str, instead: str) -> None:
        raise ValueError(
            f"schedule {settings.name!r}: compensation {settings.compensation!r} cannot be used with {what}: {why}; "
            f'{instead}, or "compensation": "none"'
        )

    if not isinstance(inner, torch.optim.Optimizer):
        refuse(
            f"the optimizer {type(inner).__name__}",
            "nothing can be done before and after its step",
            "use one that is a torch.optim.Optimizer",
        )
    for legacy in ("fused_adam_legacy", "fused_lamb_legacy"):
        if getattr(optimizer, legacy, False):
            refuse(f"{legacy} in fp16", "its step writes the weights by itself", "use AdamW, or bf16")


def _copy_masters(optimizer: Any) -> None:
    """Write the master copies, where ``optimizer`` has some, into the weights, on all data-parallel replicas."""
    if hasattr(optimizer, "update_lp_params"):  # bf16 and ZeRO-1
        optimizer.update_lp_params()
    elif hasattr(optimizer, "fp16_groups"):
        groups = getattr(optimizer, "fp32_groups", None) or optimizer.fp32_groups_flat
        for weights, masters in zip(optimizer.fp16_groups, groups, strict=True):
            if isinstance(masters, torch.Tensor):
                masters = masters.split([weight.numel() for weight in weights])
            for weight, master in zip(weights, masters, strict=True):
                weight.data.copy_(master.view(weight.shape))
