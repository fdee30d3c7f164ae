"""How Megatron's optimizers keep one parameter, for weights that several stages share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.tied_state import KeptState
from .optimizer import is_distributed, members

MASTER = "param"
"""As the distributed optimizer calls it."""


class MegatronStates:
    """Those of a ``MegatronOptimizer``: plain, with masters, or this rank's part of either. Megatron's distributed
    optimizer cuts a tied embedding into the same parts on both stages, since it has a bucket of its own."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    def read(self, parameter: nn.Parameter) -> KeptState:
        for member in members(self._optimizer):
            if is_distributed(member):
                if parameter in member.model_param_group_index_map:
                    kept = member._get_main_param_and_optimizer_states(parameter)
                    part = member._get_model_param_range_map(parameter)["param"]
                    return KeptState(_tensors(kept, kept[MASTER].shape), part.start)
                continue
            master = _master(parameter)
            if master in member.optimizer.state:
                states = _tensors(member.optimizer.state[master], master.shape)
                return KeptState(states if master is parameter else {MASTER: master.detach(), **states})
        return KeptState({})

    @torch.no_grad()
    def write(self, parameter: nn.Parameter, tensors: Mapping[str, Tensor]) -> None:
        for member in members(self._optimizer):
            if is_distributed(member):
                if parameter in member.model_param_group_index_map:
                    kept = member._get_main_param_and_optimizer_states(parameter)
                    member._set_main_param_and_optimizer_states(parameter, {**kept, **tensors})
                continue
            master = _master(parameter)
            if master in member.optimizer.state:
                kept = {MASTER: master, **member.optimizer.state[master]}
                for name, value in tensors.items():
                    kept[name].copy_(value)


def _master(parameter: Any) -> Any:
    master = getattr(parameter, "main_param", None)
    return parameter if master is None else master


def _tensors(state: Mapping[str, Any], shape: torch.Size) -> dict[str, Tensor]:
    """What there is of every element: not the number of steps, which all stages have made."""
    return {
        name: value.detach() for name, value in state.items() if isinstance(value, Tensor) and value.shape == shape
    }
