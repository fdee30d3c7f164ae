"""A stage as autograd runs it, and the handling of what goes in and out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .channels import Tensors

Loss = Callable[[Any, Any], Tensor]


def as_tuple(value: Any) -> Tensors:
    """A stage's input or output as a tuple of tensors."""
    return (value,) if isinstance(value, Tensor) else tuple(value)


def one_or_tuple(tensors: Tensors) -> Any:
    """What a stage's module is called with: the tensor itself when there is one."""
    return tensors[0] if len(tensors) == 1 else tensors


def input_leaf(tensor: Tensor) -> Tensor:
    """A received tensor as the leaf at which this stage's graph begins."""
    return tensor.detach().requires_grad_(tensor.is_floating_point())


def gradients_of(inputs: Tensors) -> Tensors:
    """The gradients that go back: one for every floating-point input, zeros where it was not used."""
    floating = [tensor for tensor in inputs if tensor.is_floating_point()]
    return tuple(torch.zeros_like(tensor) if tensor.grad is None else tensor.grad for tensor in floating)


def copy_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Copies of the buffers that a checkpoint of ``module`` would hold: what its forwards may have changed."""
    buffers = dict(module.named_buffers())
    persistent = module.state_dict(keep_vars=True).keys() if buffers else ()
    return {name: buffers[name].clone() for name in persistent if name in buffers}


@torch.no_grad()
def restore_buffers(module: nn.Module, copies: dict[str, Tensor]) -> None:
    """Write back what :func:`copy_buffers` copied."""
    for name, buffer in module.named_buffers():
        if name in copies:
            buffer.copy_(copies[name])


class Stage:
    """A stage as autograd runs it, and what is in flight on it.

    Args:
        module: takes a tensor or a tuple of tensors, as the stage before returns them.
        loss: on a last stage, ``loss(output, label)``.
        scale: on a last stage, makes of the loss what the backward begins from.
    """

    def __init__(
        self,
        module: Callable[[Any], Any],
        loss: Loss | None = None,
        scale: Callable[[Tensor], Tensor] = lambda loss: loss,
    ) -> None:
        self._module, self._loss, self._scale = module, loss, scale
        self._in_flight: dict[int, tuple[Tensors, Tensors]] = {}

    def forward(self, micro_batch: int, inputs: Tensors, label: Any = None) -> Tensors:
        """The outputs; on a last stage the loss."""
        output = self._module(one_or_tuple(inputs))
        outputs = as_tuple(output if self._loss is None else self._loss(output, label))
        self._in_flight[micro_batch] = inputs, outputs
        return outputs

    def backward(self, micro_batch: int, gradients: Tensors | None) -> Tensors:
        """Accumulate the gradients of the weights; returns the inputs, which have theirs."""
        inputs, outputs = self._in_flight.pop(micro_batch)
        if gradients is None:
            self._scale(outputs[0]).backward()
        else:
            torch.autograd.backward([tensor for tensor in outputs if tensor.is_floating_point()], gradients)
        return inputs

    def cancel(self, micro_batch: int) -> None:
        """Forget a forward."""
        del self._in_flight[micro_batch]
