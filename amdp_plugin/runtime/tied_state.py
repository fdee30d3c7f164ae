"""What optimizers keep for a weight that several stages share, when a run rests.

Its home alone steps it. What the optimizers of the other stages keep for it means nothing, until a checkpoint of it is
loaded where every stage steps its own copy, as stock 1F1B does. So before a checkpoint they take what the home's keeps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from .exchange import Exchange


@dataclass(frozen=True)
class KeptState:
    """Of one parameter, on one rank.

    Args:
        tensors: master copy and state, by name: whole, or one part of each.
        start: where the part begins; 0 for the whole.
    """

    tensors: Mapping[str, Tensor]
    start: int = 0


class OptimizerStates(Protocol):
    """How a host's optimizer is read and written. All ranks of a stage call both alike."""

    def read(self, parameter: nn.Parameter) -> KeptState: ...
    def write(self, parameter: nn.Parameter, tensors: Mapping[str, Tensor]) -> None: ...


def take_from_home(exchange: Exchange, modules: Mapping[int, nn.Module], states: OptimizerStates) -> bool:
    """Between two windows: let the optimizers of guests keep what those of the homes do, for all tied weights.

    Args:
        modules: of the tied weights on this rank, each with its parameter.

    Returns:
        Whether they do: not where the parts that home and guest keep on these ranks are not the same.
    """
    same = True
    for unit, module in sorted(modules.items()):
        (parameter,) = module.parameters()
        own = states.read(parameter)
        dtype, device = torch.promote_types(parameter.dtype, torch.float32), parameter.device
        flat = [own.tensors[name].detach().reshape(-1).to(dtype) for name in sorted(own.tensors)]
        parts = torch.tensor([own.start, *map(torch.numel, flat)], device=device)
        (length,) = exchange.share(unit, [torch.tensor([len(parts)], device=device)])
        (homes,) = exchange.share(unit, [parts if len(parts) == length else parts.new_empty(int(length))])
        fits = torch.equal(homes, parts)
        others = [torch.empty(size, dtype=dtype, device=device) for size in homes[1:].tolist()]
        sent = exchange.share(unit, flat if fits else others)
        if fits and not exchange.is_home(unit):
            named = zip(sorted(own.tensors), sent, strict=True)
            states.write(parameter, {name: value.view(own.tensors[name].shape) for name, value in named})
        same &= fits
    return same
