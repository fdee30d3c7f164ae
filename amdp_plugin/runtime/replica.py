"""The weights and gradients of a stage that lives on several ranks: at home, and as a guest elsewhere.

Gradients travel to the home and weights come back as one message each (:mod:`.packing`), in the order of the module's
parameters, which is the same on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ..plan.placement import Placement
from .packing import Spec, allocate, parts

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
        self._parameters, self._gradient_of = _trainable(module), gradient_of
        self._device = _device(module)
        self._weights, self._gradients = _specs(self._parameters), _specs(self._parameters, sum_dtype)
        self.send_buffer = allocate(self._weights, self._device)

    def gradient_buffer(self) -> Tensor:
        """A new buffer for the gradients of one guest."""
        return allocate(self._gradients, self._device)

    @torch.no_grad()
    def add(self, gradients: Tensor) -> None:
        """Add the gradients of a guest to those of this rank."""
        for parameter, part in zip(self._parameters, parts(gradients, self._gradients), strict=True):
            own = self._gradient_of(parameter)
            own.add_(part.view(own.shape))

    @torch.no_grad()
    def weights(self) -> Tensor:
        """The present weights, in :attr:`send_buffer`, which the next call overwrites."""
        for parameter, part in zip(self._parameters, parts(self.send_buffer, self._weights), strict=True):
            part.copy_(parameter)
        return self.send_buffer

    @torch.no_grad()
    def clear(self) -> None:
        """Set the sums of gradients to zero."""
        for parameter in self._parameters:
            self._gradient_of(parameter).zero_()


class Guest:
    """A replica of a stage away from its home: weights and gradients as they travel, no optimizer state.

    Args:
        module: the replica. Its parameters become views of :attr:`weights`.
        sum_dtype: dtype of the sums of gradients; by default that of the parameters.

    Attributes:
        weights: those of all parameters, packed.
        gradients: the sums of gradients, likewise.
        landing: where new weights are received, if that is not straight in :attr:`weights`.
    """

    def __init__(self, module: nn.Module, sum_dtype: torch.dtype | None = None) -> None:
        parameters, device = _trainable(module), _device(module)
        specs, sum_specs = _specs(parameters), _specs(parameters, sum_dtype)
        self.weights, self.gradients = allocate(specs, device), allocate(sum_specs, device).zero_()
        self.landing: Tensor | None = None
        self._sums: list[tuple[nn.Parameter, Tensor]] = []
        packed = parts(self.weights, specs), parts(self.gradients, sum_specs)
        for parameter, weight, total in zip(parameters, *packed, strict=True):
            weight.copy_(parameter.detach())
            parameter.data = weight
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

    def outgoing(self) -> Tensor:
        """The gradients to be sent."""
        return self.gradients

    def land(self, landing: bool) -> None:
        """Whether new weights are received beside those that the stage computes with; nothing may be on its way."""
        self.landing = torch.empty_like(self.weights) if landing else None

    def incoming(self) -> Tensor:
        """Where the new weights are received: by default straight in those that the stage computes with."""
        return self.weights if self.landing is None else self.landing

    @torch.no_grad()
    def arrived(self) -> None:
        """The new weights are there: compute with them. The home has had the gradients."""
        if self.landing is not None:
            self.weights.copy_(self.landing)
        self.clear()

    def clear(self) -> None:
        """Set the sums of gradients to zero."""
        self.gradients.zero_()


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


def _trainable(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _device(module: nn.Module) -> torch.device:
    """Where ``module`` is; of one without any tensor, where this process computes."""
    here = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_initialized() else torch.device("cpu")
    return next((tensor.device for tensor in (*module.parameters(), *module.buffers())), here)


def _specs(parameters: list[nn.Parameter], dtype: torch.dtype | None = None) -> list[Spec]:
    """Of tensors like ``parameters``, by default each of its own dtype."""
    return [(tuple(parameter.shape), dtype or parameter.dtype) for parameter in parameters]
