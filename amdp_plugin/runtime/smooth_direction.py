"""The step that an optimizer would make without its latest gradient: where its weights are going to be, in the mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

ADAM = ("Adam", "AdamW", "FusedAdam", "CPUAdam", "DeepSpeedCPUAdam")
"""Classes of torch, Apex and DeepSpeed that keep ``exp_avg`` and ``exp_avg_sq``."""
UNLIKE = ("amsgrad", "maximize")
"""Options under which a step goes elsewhere."""


def check_optimizer(optimizer: torch.optim.Optimizer, predicts: bool) -> None:
    """Refuse an optimizer whose steps cannot be looked around, or, where weights are predicted, foreseen.

    Raises:
        ValueError: with the reason and the alternative.
    """
    kind = type(optimizer).__name__
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(
            f"the schedule cannot be used with the optimizer {kind}, before and after whose step nothing can be done: "
            "use one that is a torch.optim.Optimizer, or paci"
        )
    if not predicts:
        return
    instead = "use Adam, AdamW or SGD with momentum, or another schedule: pipemare and paci take any optimizer"
    if kind not in (*ADAM, "SGD"):
        raise ValueError(
            f"no smooth direction of the optimizer {kind} is known, by which weights are predicted: {instead}"
        )
    for group in optimizer.param_groups:
        if kind == "SGD" and not group["momentum"]:
            raise ValueError(f"SGD with momentum 0 has no smooth direction, by which weights are predicted: {instead}")
        asked = [option for option in UNLIKE if group.get(option)]
        if asked:
            raise ValueError(f"weights cannot be predicted where {kind} has {' and '.join(asked)}: leave it out")


def smooth_direction(optimizer: torch.optim.Optimizer, group: Mapping[str, Any], stepped: Tensor) -> Tensor:
    """What one step would add to ``stepped``, of ``group``; zeros where it has not made any.

    Adam: ``-lr * m / (sqrt(v) + eps)``, both moments without their bias (arXiv 1412.6980, algorithm 1; XPipe, arXiv
    1911.04610). SGD: ``-lr`` times the momentum (SpecTrain, arXiv 1809.02839). The decay of weights is no part of it.
    """
    state, rate = optimizer.state.get(stepped) or {}, group["lr"]
    if "exp_avg" in state:
        steps = _steps(state.get("step", group.get("step")))
        first, second = group["betas"]
        mean, square = state["exp_avg"] / (1 - first**steps), state["exp_avg_sq"] / (1 - second**steps)
        return mean / (square.sqrt() + group["eps"]) * -rate
    if state.get("momentum_buffer") is not None:
        momentum: Tensor = state["momentum_buffer"]
        return momentum * -rate
    return torch.zeros_like(stepped)


def _steps(counted: Any) -> Any:
    """As a number; of a device's (fused optimizers), that stays there, so that the host does not wait for it."""
    if not isinstance(counted, Tensor):
        return float(counted)
    return counted.double() if counted.is_cuda else float(counted)
