"""Error feedback around the steps of Megatron's optimizers: what they step, and how that gets into the weights."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..runtime.feedback import ErrorFeedback
from .optimizer import is_distributed, members
from .stage_view import bare


def error_feedback(optimizer: Any, chunk: nn.Module) -> ErrorFeedback:
    """That of the home chunk, which ``optimizer`` steps: master copies, weights, or this rank's part of either."""
    inner = [each.optimizer for each in members(optimizer) if each.optimizer is not None]
    return ErrorFeedback(bare(chunk).parameters(), inner, lambda: _copy_masters(optimizer))


def _copy_masters(optimizer: Any) -> None:
    """Write what is stepped into the weights, on all data-parallel replicas, as Megatron does after a step."""
    for each in members(optimizer):
        if hasattr(each, "_copy_main_params_to_model_params") and not each.is_stub_optimizer:
            each._copy_main_params_to_model_params()
        if is_distributed(each):
            for chunk in each.model_chunks:
                chunk.start_param_sync()
