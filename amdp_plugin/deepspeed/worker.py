"""What a rank does when the executor says so (``runtime.worker.StagesWorker``), on the stages of a DeepSpeed engine.

On the home stage every method hands the work to the instruction of ``PipelineEngine`` that does it in stock
schedules, so that timers, activation checkpointing, bf16 and ZeRO-1 go on as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

from deepspeed.pipe import PipelineModule
from torch import Tensor

from ..plan.action import Action
from ..plan.schedule import Schedule
from ..runtime.channels import Tensors
from ..runtime.device import placed
from ..runtime.parking import Parking
from ..runtime.pipeline import Pipeline
from ..runtime.stage import as_tuple, input_leaf, one_or_tuple
from ..runtime.weights import live_update
from ..runtime.worker import StagesWorker
from .guests import guest_stage, to_device
from .sums import sums_of


class StageEngine(Protocol):
    """The engine, as far as its worker uses it."""

    stage_id: int
    module: PipelineModule
    guests: Mapping[int, PipelineModule]
    pipeline: Pipeline
    pipe_buffers: dict[str, list[Any]]
    loss: Tensor
    total_loss: Any
    total_additional_losses: Any
    grad_layer: Any
    global_steps: int
    global_samples: int

    def load(self, batch: Any, buffer_id: int) -> None: ...
    def train_batch_size(self) -> int: ...
    def present_loss_scale(self) -> float: ...
    def tell(self, update: Action) -> None: ...
    def deciding(self, update: Action) -> AbstractContextManager[None]: ...
    def report_losses(self, window: int, direction: int) -> None: ...
    def _reentrant_activation_checkpointing(self) -> bool: ...
    def _exec_forward_pass(self, buffer_id: int) -> None: ...
    def _exec_backward_pass(self, buffer_id: int) -> None: ...
    def _exec_reduce_tied_grads(self) -> None: ...
    def _exec_reduce_grads(self) -> None: ...
    def _exec_optimizer_step(self) -> None: ...


class EngineWorker(StagesWorker):
    """The stages of ``engine``. In-flight micro-batches of the home stage sit in ``num_buffers`` pipeline buffers."""

    def __init__(self, engine: StageEngine, schedule: Schedule, num_buffers: int) -> None:
        pipeline = engine.pipeline
        super().__init__(schedule, pipeline.feed, pipeline.random_streams, pipeline.losses, pipeline.replicas)
        self._engine = engine
        self._guests = {stage: guest_stage(engine, guest) for stage, guest in engine.guests.items()}
        self._free = list(reversed(range(num_buffers)))
        self._buffers: dict[int, int] = {}
        self._parking = Parking(sums_of(engine), engine.present_loss_scale)
        self._tuples: dict[int, bool] = {}

    def module(self, stage: int) -> PipelineModule:
        return self._engine.module if stage == self._engine.stage_id else self._engine.guests[stage]

    def run_forward(self, action: Action, inputs: Tensors | None) -> Tensors | None:
        self.module(action.stage).micro_offset = action.index  # as if the stage had run all micro-batches before
        forward = self._forward_home if action.stage == self._engine.stage_id else self._forward_guest
        return forward(action, inputs)

    def _forward_home(self, action: Action, inputs: Tensors | None) -> Tensors | None:
        engine, buffers = self._engine, self._engine.pipe_buffers
        stage, _, micro_batch = action
        if self.schedule.relays:
            self._parking.forward(micro_batch)
        buffer_id = self._buffers[micro_batch] = self._free.pop()
        if inputs is not None:
            buffers["inputs"][buffer_id] = one_or_tuple(tuple(input_leaf(tensor) for tensor in inputs))
        if stage in (0, self.last_stage):
            engine.load(self._placed(stage, micro_batch), buffer_id)
        engine.total_loss = engine.total_additional_losses = None
        engine._exec_forward_pass(buffer_id)
        if stage == self.last_stage:
            buffers["losses"][buffer_id] = engine.loss
            self.losses.add(micro_batch, (engine.total_loss, engine.total_additional_losses))
            engine.total_loss = engine.total_additional_losses = None  # an evaluation would add to them, in place
            return None
        outputs = buffers["outputs"][buffer_id]
        self._tuples[micro_batch] = isinstance(outputs, tuple)
        return as_tuple(outputs)

    def _forward_guest(self, action: Action, inputs: Tensors | None) -> Tensors | None:
        engine, label = self._engine, None
        stage, _, micro_batch = action
        if inputs is None:
            differentiable = engine._reentrant_activation_checkpointing()
            leaves = as_tuple(to_device(self._placed(stage, micro_batch)[0], engine, differentiable))
        else:
            leaves = tuple(input_leaf(tensor) for tensor in inputs)
        if stage == self.last_stage:
            label = to_device(self._placed(stage, micro_batch)[1], engine)
        outputs = self._guests[stage].forward(micro_batch, leaves, label)
        if stage < self.last_stage:
            return outputs
        additional = engine.guests[stage].get_additional_losses()
        copies = additional and {name: loss.detach().clone() for name, loss in additional.items()}
        self.losses.add(micro_batch, (outputs[0].detach().clone(), copies))
        return None

    def _placed(self, stage: int, micro_batch: int) -> Any:
        """The micro-batch, with what ``stage`` uses of it on the device, so that DeepSpeed copies nothing."""
        batch, used = self.take(micro_batch), {0: stage == 0, 1: stage == self.last_stage}
        place = self._engine.pipeline.watch.timeline.device.to_device
        return tuple(placed(part, place) if used.get(index) else part for index, part in enumerate(batch))

    def run_backward(self, action: Action, gradients: Tensors | None) -> Tensors:
        if action.stage == self._engine.stage_id:
            return self._backward_home(action.index, gradients)
        return self._guests[action.stage].backward(action.index, gradients)

    def _backward_home(self, micro_batch: int, gradients: Tensors | None) -> Tensors:
        if self.schedule.relays:
            self._parking.backward(micro_batch)
        engine, buffers = self._engine, self._engine.pipe_buffers
        buffer_id = self._buffers[micro_batch]
        if gradients is None:
            engine.loss, buffers["losses"][buffer_id] = buffers["losses"][buffer_id], None
        else:
            engine.grad_layer = list(gradients) if self._tuples.pop(micro_batch) else gradients[0]
        engine._exec_backward_pass(buffer_id)
        engine.grad_layer = None
        inputs = as_tuple(buffers["inputs"][buffer_id])
        self._clear(micro_batch)
        return inputs

    def close(self, update: Action) -> None:
        self._reduce()
        self._engine.tell(update)
        self._parking.close()
        # A step that a user counts, on all stages in the same call, whenever its update comes.
        self._engine.global_steps += 1
        self._engine.global_samples += self._engine.train_batch_size()

    def drop(self, update: Action) -> None:
        with self._engine.deciding(update):
            self._parking.drop()

    @contextmanager
    def _closed(self, update: Action) -> Iterator[None]:
        """Let DeepSpeed step with the gradient of a window that has closed, and count that as it would."""
        engine = self._engine
        counted = engine.global_steps, engine.global_samples
        engine.global_samples -= (engine.global_steps - update.index) * engine.train_batch_size()
        engine.global_steps = update.index
        with self._parking.oldest():
            yield
        engine.global_steps, engine.global_samples = counted

    def parked(self) -> Iterable[Tensor]:
        return self._parking.tensors()

    def _reduce(self) -> None:
        """Over data-parallel replicas."""
        if not self.schedule.tied:  # those have come, or gone, in messages of their own
            self._engine._exec_reduce_tied_grads()
        self._engine._exec_reduce_grads()

    def update(self, action: Action) -> None:
        stepping = self._engine.pipeline.feedback.stepping(self.runs_freely(action))
        parked = self._closed(action) if self.schedule.relays else nullcontext()
        with parked, live_update(self._engine.module.parameters()), self.keeping_tied(), stepping:
            if not self.schedule.relays:
                self._reduce()
            with self._engine.deciding(action):
                self._engine._exec_optimizer_step()

    def end_of_backwards(self, window: int, direction: int) -> None:
        self._engine.report_losses(window, direction)

    def forget(self, action: Action) -> None:
        stage, _, micro_batch = action
        if stage == self._engine.stage_id:
            self._parking.forget(micro_batch)
            self._clear(micro_batch)
            self._tuples.pop(micro_batch, None)
        else:
            self._guests[stage].cancel(micro_batch)

    def _clear(self, micro_batch: int) -> None:
        buffer_id = self._buffers.pop(micro_batch)
        self._free.append(buffer_id)
        for slots in self._engine.pipe_buffers.values():
            slots[buffer_id] = None
