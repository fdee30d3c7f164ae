"""How DeepSpeed's optimizers keep one parameter, for weights that several stages share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.tied_state import KeptState
from .memory import torch_optimizer

MASTER = "master"


class EngineStates:
    """Those of an engine: plain, or with masters in parts over data-parallel replicas (bf16, ZeRO-1), which DeepSpeed
    puts together."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def read(self, parameter: nn.Parameter) -> KeptState:
        kept = torch_optimizer(self._engine).state
        if not hasattr(parameter, "_hp_mapping"):
            return KeptState(_tensors(kept[parameter], parameter.shape) if parameter in kept else {})
        names = {name for flat, state in kept.items() for name in _tensors(state, flat.shape)}
        if names:
            self._find_parts()
        whole: Any = parameter
        states = {name: whole.get_full_hp_param(name) for name in sorted(names)}
        return KeptState({MASTER: whole.get_full_hp_param(), **states})

    @torch.no_grad()
    def write(self, parameter: nn.Parameter, tensors: Mapping[str, Tensor]) -> None:
        whole: Any = parameter
        for name, value in tensors.items():
            if not hasattr(parameter, "_hp_mapping"):
                torch_optimizer(self._engine).state[parameter][name].copy_(value)
            elif whole._hp_mapping is not None:  # else the parts are on other replicas
                whole.set_full_hp_param(value, None if name == MASTER else name)

    def _find_parts(self) -> None:
        """DeepSpeed finds the parts of a parameter's state once, after its first step, and loses them when it loads a
        checkpoint."""
        optimizer = self._engine.optimizer
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def _tensors(state: Mapping[str, Any], shape: torch.Size) -> dict[str, Tensor]:
    """What there is of every element: not the number of steps, which all stages have made."""
    return {name: value for name, value in state.items() if isinstance(value, Tensor) and value.shape == shape}
