"""The weights and gradients of a stage that lives on several ranks: at home, and as a guest elsewhere.

Gradients travel to the home and weights come back as flat tensors, one for every dtype, in the order of the
module's parameters, which is the same on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..plan.placement import Placement

Parameters = list[nn.Parameter]
GradientOf = Callable[[nn.Parameter], Tensor]


def gradient_of(parameter: nn.Parameter) -> Tensor:
    """The gradient of ``parameter``, zeros where it has none yet."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


class Home:
    """A stage where its optimizer state lives.

    Args:
        module: the stage.
        sum_dtype: dtype of the sums of gradients; by default that of the parameters.
        gradient_of: the sum of gradients of a parameter, of any shape with as many elements.
    """

    def __init__(
        self, module: nn.Module, sum_dtype: torch.dtype | None = None, gradient_of: GradientOf = gradient_of
    ) -> None:
        self._groups, self._sum_dtype, self._gradient_of = _groups(module), sum_dtype, gradient_of
        self.send_buffers = [_flat(group, group[0].dtype) for group in self._groups]

    def gradient_buffers(self) -> list[Tensor]:
        """New buffers for the gradients of one guest."""
        return [_flat(group, self._sum_dtype or group[0].dtype) for group in self._groups]

    @torch.no_grad()
    def add(self, gradients: Sequence[Tensor]) -> None:
        """Add the gradients of a guest to those of this rank."""
        for group, flat in zip(self._groups, gradients, strict=True):
            for parameter, part in _parts(group, flat):
                own = self._gradient_of(parameter)
                own.add_(part.view(own.shape))

    @torch.no_grad()
    def weights(self) -> list[Tensor]:
        """The present weights, in :attr:`send_buffers`, which the next call overwrites."""
        for group, flat in zip(self._groups, self.send_buffers, strict=True):
            for parameter, part in _parts(group, flat):
                part.copy_(parameter.view(-1))
        return self.send_buffers

    @torch.no_grad()
    def clear(self) -> None:
        """Set the sums of gradients to zero."""
        for group in self._groups:
            for parameter in group:
                self._gradient_of(parameter).zero_()


class Guest:
    """A replica of a stage away from its home: flat weights, flat gradients, no optimizer state.

    Args:
        module: the replica. Its parameters become views of :attr:`weights`.
        sum_dtype: dtype of the sums of gradients; by default that of the parameters.

    Attributes:
        weights: a tensor for every dtype of the parameters.
        gradients: the sums of gradients, in the same order.
        landing: where new weights are received, if that is not straight in :attr:`weights`.
    """

    def __init__(self, module: nn.Module, sum_dtype: torch.dtype | None = None) -> None:
        groups = _groups(module)
        self.weights = [_flat(group, group[0].dtype) for group in groups]
        self.gradients = [_flat(group, sum_dtype or group[0].dtype).zero_() for group in groups]
        self.landing: list[Tensor] = []
        self._sums: list[tuple[nn.Parameter, Tensor]] = []
        for group, weights, gradients in zip(groups, self.weights, self.gradients, strict=True):
            for (parameter, weight), (_, total) in zip(_parts(group, weights), _parts(group, gradients), strict=True):
                weight.copy_(parameter.detach().view(-1))
                parameter.data = weight.view(parameter.shape)
                total = total.view(parameter.shape)
                self._sums.append((parameter, total))
                if total.dtype == parameter.dtype:
                    parameter.grad = total  # autograd then accumulates into it, in place

    @torch.no_grad()
    def accumulate(self) -> None:
        """After a backward: add its gradients to the sums, where autograd has not done so."""
        for parameter, total in self._sums:
            if parameter.grad is not None and parameter.grad is not total:
                total.add_(parameter.grad)
                parameter.grad = None

    def outgoing(self) -> list[Tensor]:
        """The gradients to be sent."""
        return self.gradients

    def land(self, landing: bool) -> None:
        """Whether new weights are received beside those that the stage computes with; nothing may be on its way."""
        self.landing = [torch.empty_like(weights) for weights in self.weights] if landing else []

    def incoming(self) -> list[Tensor]:
        """Where the new weights are received: by default straight in those that the stage computes with."""
        return self.landing or self.weights

    @torch.no_grad()
    def arrived(self) -> None:
        """The new weights are there: compute with them. The home has had the gradients."""
        for weights, landed in zip(self.weights, self.landing, strict=False):
            weights.copy_(landed)
        self.clear()

    def clear(self) -> None:
        """Set the sums of gradients to zero."""
        for gradients in self.gradients:
            gradients.zero_()


Replica = Home | Guest


def make_replicas(
    placement: Placement,
    rank: int,
    modules: Mapping[int, nn.Module],
    sum_dtype: torch.dtype | None = None,
    gradient_of: GradientOf = gradient_of,
) -> dict[int, Replica]:
    """Of ``modules``, the stages on ``rank``, those that other ranks hold too: at home here, or as guests.

    Args:
        sum_dtype: dtype of the sums of gradients; by default that of the parameters.
        gradient_of: where the home sums the gradient of a parameter.
    """
    shared = {stage: module for stage, module in modules.items() if len(placement.holders[stage]) > 1}
    return {
        stage: Home(module, sum_dtype, gradient_of) if placement.home(stage) == rank else Guest(module, sum_dtype)
        for stage, module in shared.items()
    }


def _groups(module: nn.Module) -> list[Parameters]:
    """The trainable parameters of ``module``, those of one dtype together."""
    groups: dict[torch.dtype, Parameters] = {}
    for parameter in module.parameters():
        if parameter.requires_grad:
            groups.setdefault(parameter.dtype, []).append(parameter)
    return list(groups.values())


def _flat(group: Parameters, dtype: torch.dtype) -> Tensor:
    return torch.empty(sum(parameter.numel() for parameter in group), dtype=dtype, device=group[0].device)


def _parts(group: Parameters, flat: Tensor) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Every parameter with its part of ``flat``."""
    return zip(group, flat.split([parameter.numel() for parameter in group]), strict=True)
