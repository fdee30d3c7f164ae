"""What a stage of a DeepSpeed engine does when the executor says so (``runtime.executor.Worker``).

Every method hands the work to the instruction of ``PipelineEngine`` that does it in stock schedules, so
that timers, activation checkpointing, bf16 and ZeRO-1 go on as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from ..plan.action import Action
from ..runtime.channels import Tensors
from ..runtime.feed import Feed
from ..runtime.stage import as_tuple, copy_buffers, gradients_of, input_leaf, one_or_tuple, restore_buffers
from ..runtime.weights import live_update
from .losses import WindowLosses
from .random_state import random_state, set_random_state


class StageEngine(Protocol):
    """The engine, as far as its worker uses it."""

    module: nn.Module
    micro_batches: int
    pipe_buffers: dict[str, list[Any]]
    window_losses: WindowLosses
    loss: Tensor
    total_loss: Any
    total_additional_losses: Any
    grad_layer: Any

    def is_first_stage(self) -> bool: ...
    def is_last_stage(self) -> bool: ...
    def load(self, batch: Any, buffer_id: int) -> None: ...
    def report_losses(self, window: int) -> None: ...
    def _exec_forward_pass(self, buffer_id: int) -> None: ...
    def _exec_backward_pass(self, buffer_id: int) -> None: ...
    def _exec_reduce_grads(self) -> None: ...
    def _exec_optimizer_step(self) -> None: ...


class EngineWorker:
    """The stage of ``engine``, whose in-flight micro-batches take turns in ``num_buffers`` pipeline buffers."""

    def __init__(self, engine: StageEngine, feed: Feed, num_buffers: int) -> None:
        self._engine, self._feed, self._num_buffers = engine, feed, num_buffers
        self._tuples: dict[int, bool] = {}

    def has_window(self, window: int) -> bool:
        return self._feed.has((window + 1) * self._engine.micro_batches - 1)

    def forward(self, action: Action, inputs: Tensors | None) -> Tensors | None:
        engine, buffers = self._engine, self._engine.pipe_buffers
        micro_batch, buffer_id = action.index, self._buffer(action.index)
        if inputs is not None:
            buffers["inputs"][buffer_id] = one_or_tuple(tuple(input_leaf(tensor) for tensor in inputs))
        if engine.is_first_stage() or engine.is_last_stage():
            engine.load(self._feed.take(micro_batch), buffer_id)
        engine.total_loss = engine.total_additional_losses = None
        engine._exec_forward_pass(buffer_id)
        if engine.is_last_stage():
            buffers["losses"][buffer_id] = engine.loss
            engine.window_losses.add(micro_batch, engine.total_loss, engine.total_additional_losses)
            return None
        outputs = buffers["outputs"][buffer_id]
        self._tuples[micro_batch] = isinstance(outputs, tuple)
        return as_tuple(outputs)

    def backward(self, action: Action, gradients: Tensors | None) -> Tensors | None:
        engine, buffers = self._engine, self._engine.pipe_buffers
        micro_batch, buffer_id = action.index, self._buffer(action.index)
        if gradients is None:
            engine.loss, buffers["losses"][buffer_id] = buffers["losses"][buffer_id], None
        else:
            engine.grad_layer = list(gradients) if self._tuples.pop(micro_batch) else gradients[0]
        engine._exec_backward_pass(buffer_id)
        engine.grad_layer = None
        inputs = as_tuple(buffers["inputs"][buffer_id])
        self._clear(buffer_id)
        self._feed.release(micro_batch)
        return None if engine.is_first_stage() else gradients_of(inputs)

    def reduce(self, action: Action) -> None:
        raise NotImplementedError(f"{action}: this engine holds every stage once")

    def update(self, action: Action) -> None:
        with live_update(self._engine.module.parameters()):
            self._engine._exec_reduce_grads()
            self._engine._exec_optimizer_step()

    def end_of_backwards(self, window: int) -> None:
        self._engine.report_losses(window)

    def snapshot(self) -> Any:
        module = self._engine.module
        return random_state(), module.micro_offset, copy_buffers(module)

    def cancel(self, micro_batches: Sequence[tuple[int, int]], snapshot: Any) -> None:
        for _, micro_batch in micro_batches:
            self._clear(self._buffer(micro_batch))
            self._tuples.pop(micro_batch, None)
            self._engine.window_losses.drop(micro_batch)
        self._feed.reopen()
        if snapshot is not None:
            state, micro_offset, copies = snapshot
            set_random_state(state)
            self._engine.module.micro_offset = micro_offset
            restore_buffers(self._engine.module, copies)

    def _buffer(self, micro_batch: int) -> int:
        return micro_batch % self._num_buffers

    def _clear(self, buffer_id: int) -> None:
        for slots in self._engine.pipe_buffers.values():
            slots[buffer_id] = None
