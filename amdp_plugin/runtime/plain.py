"""A worker on stages in plain PyTorch: the runtime without any host framework."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..plan.action import Action
from ..plan.schedule import Schedule
from .channels import Tensors
from .decisions import Decisions
from .extrapolation import ExtrapolatedWeights
from .feed import Feed
from .feedback import ErrorFeedback
from .losses import WindowLosses
from .parking import AttributeSums, Parking
from .random_streams import Generators, RandomStreams, generators_of
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
        generators: what layers draw random numbers from; by default torch's own, where ``modules`` are.
        coefficient: of error feedback, from :func:`.plan.staleness.planned_coefficient`; ``None`` without.
        clipping: the largest norm of the gradients of all stages, as far as decisions tell them; 0 for any.

    Attributes:
        decisions: sums of other stages, to be given before the first window where updates take some.
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
        clipping: float = 0.0,
        tied: Sequence[nn.Parameter | None] = (),
        generators: Generators | None = None,
    ) -> None:
        feed = Feed(lambda: next(data), partial(schedule.placement.is_end, rank)) if data else None
        shared, self.tied_modules = make_tied(schedule, rank, tied)
        replicas = {**make_replicas(schedule.placement, rank, modules), **shared}
        streams = RandomStreams(schedule.placement.directions, generators or generators_of(modules.values()))
        super().__init__(schedule, feed, streams, WindowLosses(), replicas)
        self.modules, self._optimizers, self.reported = modules, optimizers, dict[int, float]()
        self.feedback = {
            stage: ErrorFeedback(modules[stage].parameters(), [optimizer], coefficient=coefficient)
            for stage, optimizer in optimizers.items()
        }
        self.decisions: Decisions | None = None
        self._clipping = clipping
        self._parking = {stage: Parking(AttributeSums(modules[stage].parameters())) for stage in optimizers}
        self.extrapolation = {
            stage: ExtrapolatedWeights(stage, feedback.parameters, feedback.optimizers)
            for stage, feedback in self.feedback.items()
        }
        self._stages = {
            stage: Stage(module, loss if stage == self.last_stage else None, lambda loss: loss / schedule.micro_batches)
            for stage, module in modules.items()
        }

    def module(self, stage: int) -> nn.Module:
        return self.modules[stage]

    def run_forward(self, action: Action, inputs: Tensors | None) -> Tensors | None:
        stage, _, micro_batch = action
        if self.schedule.relays:
            self._parking[stage].forward(micro_batch)
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
        if self.schedule.relays:
            self._parking[action.stage].backward(action.index)
        return self._stages[action.stage].backward(action.index, gradients)

    def forget(self, action: Action) -> None:
        self._stages[action.stage].cancel(action.index)
        if self.schedule.relays:
            self._parking[action.stage].forget(action.index)

    def close(self, update: Action) -> None:
        if self.decisions is not None:
            self.decisions.tell(update, self._squares(update.stage))
        self._parking[update.stage].close()

    def drop(self, update: Action) -> None:
        if self.decisions is not None:
            self.decisions.sum_up(update)
        self._parking[update.stage].drop()

    def parked(self) -> Iterable[Tensor]:
        return (tensor for parking in self._parking.values() for tensor in parking.tensors())

    def update(self, action: Action) -> None:
        with self._parking[action.stage].oldest() if self.schedule.relays else nullcontext():
            self._clip(action)
            optimizer = self._optimizers[action.stage]
            with live_update(self.modules[action.stage].parameters()), self.keeping_tied(), self._stepping(action):
                optimizer.step()
            optimizer.zero_grad()

    def _clip(self, update: Action) -> None:
        if self.decisions is None:
            return
        with self.decisions.update(update) as answers:
            squares = self._squares(update.stage)
            answers.whole(squares)
        if self._clipping:
            for parameter in self.parameters(update.stage):
                if parameter.grad is not None:
                    parameter.grad = parameter.grad * (self._clipping / squares.sqrt()).clamp(max=1.0)

    def _squares(self, stage: int) -> Tensor:
        gradients = [parameter.grad for parameter in self.parameters(stage) if parameter.grad is not None]
        return torch.stack([gradient.norm() for gradient in gradients]).square().sum()

    def _stepping(self, action: Action) -> AbstractContextManager[None]:
        return self.feedback[action.stage].stepping(self.runs_freely(action))

    def end_of_backwards(self, window: int, direction: int) -> None:
        numbers = self.schedule.micro_batches_of(window, direction)
        self.reported.update(zip(numbers, torch.stack(self.losses.take(numbers)).tolist(), strict=True))
