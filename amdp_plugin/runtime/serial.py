"""The oracle: what a schedule means, on real modules, in one process.

It plays the programs of all ranks in any order that the laws allow. It shares nothing with the
executor, the channels or the engines but the program, so that no bug can make both agree. It is also a
tool: train any sequential model under any schedule on one device, and see what that does to convergence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..plan.action import BACKWARD, FORWARD, UPDATE, Action
from ..plan.play import play
from ..plan.schedule import Schedule
from ..plan.scheduler import Scheduler

Tensors = tuple[Tensor, ...]
MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


class Used(NamedTuple):
    """Versions of a stage's weights that one micro-batch's forward and backward used."""

    forward: int
    backward: int


class SerialPipeline:
    """Trains ``stages`` as ``schedule`` would, one action after the other.

    The weights have explicit versions: every stage's optimizer steps a master copy of its own, and the
    result is written over the stage's parameters as the next version. A backward uses the version that is
    then current, whatever its forward used. Each stage draws its random numbers from a stream of its own.

    Args:
        stages: the consecutive slices of the model. A stage takes and returns a tensor or a tuple of tensors.
        make_optimizer: called once a stage with its master parameters.
        loss: ``loss(output, label)`` of the last stage's output, a scalar.
        schedule: in one direction, for example ``plan.schedules.make("paci", 4, 8)``.
        seeds: the seed of each stage's random numbers; by default each continues from the present state.
        master_dtype: dtype of the master copies and of the sum of gradients, for mixed precision; by
            default that of the parameters.
        before_step: called with a stage's master parameters, gradients set, before each step (to clip them).

    Attributes:
        versions: updates that each stage has had.
        random_states: the state of each stage's random numbers.
        used: for every (stage, micro-batch), the :class:`Used` versions. Micro-batches count from the start.

    Raises:
        ValueError: for a schedule with several directions, delayed updates or other weights than the latest.
    """

    def __init__(
        self,
        stages: Sequence[nn.Module],
        make_optimizer: MakeOptimizer,
        loss: Callable[[Any, Any], Tensor],
        schedule: Schedule,
        *,
        seeds: Sequence[int] | None = None,
        master_dtype: torch.dtype | None = None,
        before_step: Callable[[list[nn.Parameter]], Any] = lambda parameters: None,
    ) -> None:
        if schedule.placement.directions > 1 or schedule.update_delay or schedule.weights != "latest":
            raise ValueError(f"the serial pipeline runs one direction with the latest weights; {schedule.name} is more")
        if len(stages) != schedule.num_stages:
            raise ValueError(f"{len(stages)} stages for a schedule of {schedule.num_stages}")
        self.stages, self.schedule = list(stages), schedule
        self.versions = [0] * len(stages)
        self.used: dict[tuple[int, int], Used] = {}
        self._loss, self._before_step, self._master_dtype = loss, before_step, master_dtype
        self._parameters = [[p for p in stage.parameters() if p.requires_grad] for stage in stages]
        self._masters = [[_master(p, master_dtype) for p in parameters] for parameters in self._parameters]
        self.optimizers = [make_optimizer(masters) for masters in self._masters]
        present = torch.get_rng_state()
        self.random_states = [_random_state(seed) for seed in seeds] if seeds else [present.clone() for _ in stages]
        self._data: dict[int, tuple[Any, Any]] = {}
        self._losses: dict[int, Tensor] = {}
        self._flying: dict[tuple[int, int], tuple[Tensors, Tensors, int]] = {}
        self._messages: dict[tuple[int, str, int], Tensors] = {}

    def train(self, data: Iterator[tuple[Any, Any]], windows: int) -> list[float]:
        """Run ``windows`` windows, from an empty pipeline to an empty pipeline.

        What the schedule would have forwarded beyond them is not forwarded: that is what cancelling comes to.

        Args:
            data: ``(input, label)`` micro-batches; ``windows * schedule.micro_batches`` are taken.

        Returns:
            The mean loss of every window.
        """
        size, first = self.schedule.micro_batches, self.versions[0]
        numbers = range(first * size, (first + windows) * size)
        self._data = {number: next(data) for number in numbers}
        self._losses.clear()
        for _, action in play(Scheduler(self.schedule).program(windows)):
            action = action.shifted(first, size)
            if action.kind != FORWARD or action.index in numbers:
                self._run(action)
        assert not self._flying and not self._messages, "the program left work undone"
        return [self._mean_loss(window) for window in range(first, first + windows)]

    def _run(self, action: Action) -> None:
        stage, kind, index = action
        if kind == UPDATE:
            self._update(stage)
            return
        outside = torch.get_rng_state()
        torch.set_rng_state(self.random_states[stage])
        self._forward(stage, index) if kind == FORWARD else self._backward(stage, index)
        self.random_states[stage] = torch.get_rng_state()
        torch.set_rng_state(outside)

    def _forward(self, stage: int, index: int) -> None:
        value = self._data[index][0] if stage == 0 else self._messages.pop((stage, FORWARD, index))
        inputs = (value,) if isinstance(value, Tensor) else tuple(value)
        if stage > 0:
            inputs = tuple(tensor.requires_grad_(tensor.is_floating_point()) for tensor in inputs)
        output = self.stages[stage](inputs[0] if len(inputs) == 1 else inputs)
        if stage == len(self.stages) - 1:
            output = self._loss(output, self._data[index][1])
            self._losses[index] = output.detach()
        outputs = (output,) if isinstance(output, Tensor) else tuple(output)
        if stage < len(self.stages) - 1:
            self._messages[stage + 1, FORWARD, index] = tuple(tensor.detach().clone() for tensor in outputs)
        self._flying[stage, index] = (inputs, outputs, self.versions[stage])

    def _backward(self, stage: int, index: int) -> None:
        inputs, outputs, version = self._flying.pop((stage, index))
        self.used[stage, index] = Used(version, self.versions[stage])
        if stage == len(self.stages) - 1:
            (outputs[0] / self.schedule.micro_batches).backward()
        else:
            floating = [tensor for tensor in outputs if tensor.is_floating_point()]
            torch.autograd.backward(floating, self._messages.pop((stage, BACKWARD, index)))
        if stage > 0:
            floating = [tensor for tensor in inputs if tensor.is_floating_point()]
            self._messages[stage - 1, BACKWARD, index] = tuple(
                torch.zeros_like(tensor) if tensor.grad is None else tensor.grad.clone() for tensor in floating
            )
        if self._master_dtype is not None:
            self._sum_in_master_dtype(stage)

    def _sum_in_master_dtype(self, stage: int) -> None:
        for parameter, master in zip(self._parameters[stage], self._masters[stage], strict=True):
            if parameter.grad is not None:
                gradient = parameter.grad.to(master.dtype)
                master.grad = gradient if master.grad is None else master.grad + gradient
                parameter.grad = None

    def _update(self, stage: int) -> None:
        """Step the masters, and make the result the stage's next version."""
        pairs = list(zip(self._parameters[stage], self._masters[stage], strict=True))
        if self._master_dtype is None:
            for parameter, master in pairs:
                master.grad, parameter.grad = parameter.grad, None
        self._before_step(self._masters[stage])
        self.optimizers[stage].step()
        self.optimizers[stage].zero_grad(set_to_none=True)
        for parameter, master in pairs:
            # Through .data, so that graphs that saved the parameter read the new version.
            parameter.data.copy_(master.detach())
        self.versions[stage] += 1

    def _mean_loss(self, window: int) -> float:
        size = self.schedule.micro_batches
        total = torch.zeros_like(self._losses[window * size])
        for index in range(window * size, (window + 1) * size):
            total += self._losses[index]
        return float(total / size)


def _master(parameter: nn.Parameter, dtype: torch.dtype | None) -> nn.Parameter:
    return nn.Parameter(parameter.detach().clone().to(dtype or parameter.dtype))


def _random_state(seed: int) -> Tensor:
    return torch.Generator().manual_seed(seed).get_state()
