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
    for legacy in ("fused_adam_legacy", "fused_lamb_legacy"):
        if settings.compensation != "none" and getattr(engine.optimizer, legacy, False):
            raise ValueError(
                f"compensation {settings.compensation!r} cannot be used with {legacy} of fp16, whose step writes the "
                'weights by itself: use another optimizer, bf16, or "compensation": "none"'
            )
    return ErrorFeedback(
        engine.module.parameters(), [torch_optimizer(engine)], lambda: _copy_masters(engine.optimizer)
    )


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
