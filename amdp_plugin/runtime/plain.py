"""A worker on stages in plain PyTorch: the runtime without any host framework."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import nn

from ..plan.action import Action
from ..plan.schedule import Schedule
from .channels import Tensors
from .feed import Feed
from .feedback import ErrorFeedback
from .losses import WindowLosses
from .random_streams import RandomStreams
from .replica import make_replicas
from .stage import Loss, Stage, as_tuple, input_leaf
from .tied import make_tied
from .weights import live_update
from .worker import StagesWorker


class PlainWorker(StagesWorker):
    """The stages of one rank, each a module with an optimizer of its own at home.

    Args:
        schedule: tells which stages others hold too, and where each has its home.
        rank: this rank in the pipeline.
        modules: every stage that it holds.
        optimizers: for every stage that has its home here, what steps it after a window, with the mean gradient.
        loss: of the last stage, a scalar.
        data: where a first or last stage is, the ``(input, label)`` micro-batches of all directions.
        tied: of the stage here, the parameter of every weight that the schedule ties, ``None`` where it has no part.
        coefficient: of error feedback, from :func:`.plan.staleness.planned_coefficient`; ``None`` without.

    Attributes:
        reported: the loss of every micro-batch whose last stage is here, as far as it was not cancelled.
    """

    def __init__(
        self,
        schedule: Schedule,
        rank: int,
        modules: Mapping[int, nn.Module],
        optimizers: Mapping[int, torch.optim.Optimizer],
        loss: Loss | None = None,
        data: Iterator[tuple[Any, Any]] | None = None,
        coefficient: float | None = None,
        tied: Sequence[nn.Parameter | None] = (),
    ) -> None:
        feed = Feed(lambda: next(data), partial(schedule.placement.is_end, rank)) if data else None
        shared, self.tied_modules = make_tied(schedule, rank, tied)
        replicas = {**make_replicas(schedule.placement, rank, modules), **shared}
        streams = RandomStreams(schedule.placement.directions)
        super().__init__(schedule, feed, streams, WindowLosses(), replicas)
        self.modules, self._optimizers, self.reported = modules, optimizers, dict[int, float]()
        self.feedback = {
            stage: ErrorFeedback(modules[stage].parameters(), [optimizer], coefficient=coefficient)
            for stage, optimizer in optimizers.items()
        }
        self._stages = {
            stage: Stage(module, loss if stage == self.last_stage else None, lambda loss: loss / schedule.micro_batches)
            for stage, module in modules.items()
        }

    def module(self, stage: int) -> nn.Module:
        return self.modules[stage]

    def run_forward(self, action: Action, inputs: Tensors | None) -> Tensors | None:
        stage, _, micro_batch = action
        if inputs is None:
            leaves = as_tuple(self.take(micro_batch)[0])
        else:
            leaves = tuple(input_leaf(tensor) for tensor in inputs)
        label = self.take(micro_batch)[1] if stage == self.last_stage else None
        outputs = self._stages[stage].forward(micro_batch, leaves, label)
        if stage < self.last_stage:
            return outputs
        self.losses.add(micro_batch, outputs[0].detach().clone())
        return None

    def run_backward(self, action: Action, gradients: Tensors | None) -> Tensors:
        return self._stages[action.stage].backward(action.index, gradients)

    def forget(self, action: Action) -> None:
        self._stages[action.stage].cancel(action.index)

    def update(self, action: Action) -> None:
        optimizer = self._optimizers[action.stage]
        with live_update(self.modules[action.stage].parameters()), self.keeping_tied(), self._stepping(action):
            optimizer.step()
        optimizer.zero_grad()

    def _stepping(self, action: Action) -> AbstractContextManager[None]:
        return self.feedback[action.stage].stepping(self.runs_freely(action))

    def end_of_backwards(self, window: int, direction: int) -> None:
        numbers = self.schedule.micro_batches_of(window, direction)
        self.reported.update(zip(numbers, torch.stack(self.losses.take(numbers)).tolist(), strict=True))
