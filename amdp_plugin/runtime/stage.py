"""A worker for plain PyTorch: one stage, its optimizer and, at the ends of the pipeline, the data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..plan.action import Action
from .channels import Tensors
from .feed import Feed
from .weights import live_update

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


class StageWorker:
    """One stage of an ordinary pipeline (``runtime.executor.Worker``).

    Args:
        module: the stage. Takes a tensor or a tuple of tensors, as the stage before returns them.
        optimizer: steps the stage after every window, with the mean gradient of its micro-batches.
        micro_batches: micro-batches of a window.
        loss: on the last stage, ``loss(output, label)``, a scalar.
        data: on the first and the last stage, the same ``(input, label)`` micro-batches.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        micro_batches: int,
        loss: Loss | None = None,
        data: Iterator[tuple[Any, Any]] | None = None,
    ) -> None:
        self.module, self.optimizer, self.losses = module, optimizer, dict[int, float]()
        self._micro_batches, self._loss = micro_batches, loss
        self._feed = Feed(lambda: next(data)) if data is not None else None
        self._inputs: dict[int, Tensors] = {}
        self._outputs: dict[int, Tensors] = {}

    def has_window(self, window: int) -> bool:
        assert self._feed is not None, "the first and the last stage need data"
        return self._feed.has((window + 1) * self._micro_batches - 1)

    def forward(self, action: Action, inputs: Tensors | None) -> Tensors | None:
        micro_batch = action.index
        if inputs is None:
            assert self._feed is not None
            self._inputs[micro_batch] = as_tuple(self._feed.take(micro_batch)[0])
        else:
            self._inputs[micro_batch] = tuple(input_leaf(tensor) for tensor in inputs)
        output = self.module(one_or_tuple(self._inputs[micro_batch]))
        if self._loss is not None:
            assert self._feed is not None
            output = self._loss(output, self._feed.take(micro_batch)[1])
            self.losses[micro_batch] = float(output.detach())
        self._outputs[micro_batch] = as_tuple(output)
        return None if self._loss is not None else self._outputs[micro_batch]

    def backward(self, action: Action, gradients: Tensors | None) -> Tensors | None:
        micro_batch = action.index
        outputs, inputs = self._outputs.pop(micro_batch), self._inputs.pop(micro_batch)
        if self._loss is not None:
            (outputs[0] / self._micro_batches).backward()
        else:
            floating = [tensor for tensor in outputs if tensor.is_floating_point()]
            torch.autograd.backward(floating, gradients)
        if self._feed is not None:
            self._feed.release(micro_batch)
        return gradients_of(inputs) if action.stage > 0 else None

    def reduce(self, action: Action) -> None:
        raise NotImplementedError(f"{action}: a stage on several ranks needs a worker that knows its replicas")

    def update(self, action: Action) -> None:
        with live_update(self.module.parameters()):
            self.optimizer.step()
        self.optimizer.zero_grad()

    def end_of_backwards(self, window: int) -> None:
        pass

    def snapshot(self) -> Any:
        return torch.get_rng_state(), copy_buffers(self.module)

    def cancel(self, micro_batches: Sequence[tuple[int, int]], snapshot: Any) -> None:
        for _, micro_batch in micro_batches:
            self._inputs.pop(micro_batch)
            self._outputs.pop(micro_batch)
            self.losses.pop(micro_batch, None)
        if self._feed is not None:
            self._feed.reopen()
        if snapshot is not None:
            random_state, buffers = snapshot
            torch.set_rng_state(random_state)
            restore_buffers(self.module, buffers)
