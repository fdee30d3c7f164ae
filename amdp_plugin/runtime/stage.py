"""Stages in plain PyTorch, and a worker that runs those of one rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..plan.action import Action
from ..plan.schedule import Schedule
from .channels import Tensors
from .feed import Feed
from .random_streams import RandomStreams
from .replica import Guest, Home, Replica
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


class StageWorker:
    """The stages of one rank (``runtime.executor.Worker``).

    Args:
        schedule: tells which stages others hold too, and where each has its home.
        rank: this rank in the pipeline.
        modules: every stage that it holds.
        optimizers: for every stage that has its home here, what steps it after a window, with the mean gradient.
        loss: of the last stage, a scalar.
        data: where a first or last stage is, the ``(input, label)`` micro-batches of all directions.
    """

    def __init__(
        self,
        schedule: Schedule,
        rank: int,
        modules: Mapping[int, nn.Module],
        optimizers: Mapping[int, torch.optim.Optimizer],
        loss: Loss | None = None,
        data: Iterator[tuple[Any, Any]] | None = None,
    ) -> None:
        self.modules, self.losses = modules, dict[int, float]()
        self._micro_batches, self._last = schedule.micro_batches, schedule.num_stages - 1
        self._directions, self._optimizers = schedule.placement.directions, optimizers
        self._stages = {
            stage: Stage(module, loss if stage == self._last else None, lambda loss: loss / self._micro_batches)
            for stage, module in modules.items()
        }
        self.replicas: dict[int, Replica] = {
            stage: Home(module) if stage in optimizers else Guest(module)
            for stage, module in modules.items()
            if len(schedule.placement.holders[stage]) > 1
        }
        self.streams = RandomStreams(self._directions)
        self._feed = Feed(lambda: next(data), partial(schedule.placement.is_end, rank)) if data else None

    def has_window(self, window: int) -> bool:
        assert self._feed is not None, "the ranks of first and last stages need data"
        return self._feed.has((window + 1) * self._micro_batches - 1)

    def forward(self, action: Action, inputs: Tensors | None) -> Tensors | None:
        stage, _, micro_batch = action
        if inputs is None:
            leaves = as_tuple(self._take(micro_batch)[0])
        else:
            leaves = tuple(input_leaf(tensor) for tensor in inputs)
        label = self._take(micro_batch)[1] if stage == self._last else None
        with self.streams.drawing(micro_batch % self._directions):
            outputs = self._stages[stage].forward(micro_batch, leaves, label)
        if stage < self._last:
            return outputs
        self.losses[micro_batch] = float(outputs[0].detach())
        return None

    def backward(self, action: Action, gradients: Tensors | None) -> Tensors | None:
        stage, _, micro_batch = action
        inputs = self._stages[stage].backward(micro_batch, gradients)
        replica = self.replicas.get(stage)
        if isinstance(replica, Guest):
            replica.accumulate()
        return gradients_of(inputs) if stage > 0 else None

    def update(self, action: Action) -> None:
        optimizer = self._optimizers[action.stage]
        with live_update(self.modules[action.stage].parameters()):
            optimizer.step()
        optimizer.zero_grad()

    def release(self, action: Action) -> None:
        if self._feed is not None:
            self._feed.release(action.index)

    def end_of_backwards(self, window: int, direction: int) -> None:
        pass

    def snapshot(self, action: Action) -> Any:
        direction = action.index % self._directions
        return direction, self.streams.states()[direction], action.stage, copy_buffers(self.modules[action.stage])

    def cancel(self, forwards: Sequence[Action], backwards: Sequence[Action], snapshots: Sequence[Any]) -> None:
        for stage, _, micro_batch in forwards:
            self._stages[stage].cancel(micro_batch)
        for _, _, micro_batch in (*forwards, *backwards):
            self.losses.pop(micro_batch, None)
        if backwards:
            for replica in self.replicas.values():
                replica.clear()
        if self._feed is not None:
            self._feed.reopen()
        for direction, state, stage, buffers in snapshots:
            self.streams.restore(direction, state)
            restore_buffers(self.modules[stage], buffers)

    def _take(self, micro_batch: int) -> tuple[Any, Any]:
        assert self._feed is not None
        taken: tuple[Any, Any] = self._feed.take(micro_batch)
        return taken
