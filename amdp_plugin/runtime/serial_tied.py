"""Weights that several stages share, in the serial oracle."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor, nn

from ..plan.schedule import Schedule

Tied = Sequence[Sequence[tuple[int, nn.Parameter]]]
"""For every shared weight, the stages that share it, ascending, each with its parameter."""


class Copy(Protocol):
    """A shared weight on a stage that is not its home: its value there, and the sum of its gradients."""

    def accumulate(self, scale: float) -> None: ...
    def take_gradients(self) -> list[Tensor | None]: ...
    def load(self, values: list[Tensor]) -> None: ...


class SharedWeights:
    """What is under way of them: sums of gradients to their homes, values back.

    Args:
        tied: the weights, as the schedule counts them.
        schedule: has as many.
        stages: of the model.
        copy: makes a guest of a stage's parameter.

    Raises:
        ValueError: where the schedule ties other stages, or parameters differ.
    """

    def __init__(
        self,
        tied: Tied,
        schedule: Schedule,
        stages: Sequence[nn.Module],
        copy: Callable[[nn.Module, nn.Parameter], Copy],
    ) -> None:
        given = tuple(tuple(stage for stage, _ in weight) for weight in tied)
        if given != schedule.tied:
            raise ValueError(f"schedule {schedule.name!r} ties the stages {schedule.tied}, got parameters of {given}")
        self._first, self._homes, self._copies = schedule.num_stages, [weight[0] for weight in tied], []
        for weight in tied:
            (_, own), *guests = weight
            if any(other.shape != own.shape for _, other in guests):
                raise ValueError(f"a shared weight has one shape, got {[tuple(each.shape) for _, each in weight]}")
            for _, other in guests:
                other.data.copy_(own.data)
            self._copies.append({stage: copy(stages[stage], parameter) for stage, parameter in guests})
        self._guests = {id(parameter) for weight in tied for _, parameter in weight[1:]}
        self._sums: dict[tuple[int, int, int], Tensor | None] = {}
        self._values: defaultdict[tuple[int, int], deque[Tensor]] = defaultdict(deque)

    def own(self, module: nn.Module) -> list[nn.Parameter]:
        """What the optimizer of a stage steps."""
        parameters = (parameter for parameter in module.parameters() if parameter.requires_grad)
        return [parameter for parameter in parameters if id(parameter) not in self._guests]

    def accumulate(self, stage: int, scale: float) -> None:
        """After a backward of ``stage``, whose gradients have that loss scale."""
        for copies in self._copies:
            if stage in copies:
                copies[stage].accumulate(scale)

    def home(self, unit: int) -> tuple[int, nn.Parameter]:
        """The stage that steps the weight, and its parameter."""
        return self._homes[unit - self._first]

    def send_gradient(self, unit: int, stage: int, window: int) -> None:
        """A guest has closed the window."""
        (self._sums[unit, stage, window],) = self._copies[unit - self._first][stage].take_gradients()

    def gradients(self, unit: int, window: int) -> list[Tensor | None]:
        """What the guests have sent, in their order."""
        return [self._sums.pop((unit, stage, window)) for stage in self._copies[unit - self._first]]

    def send_value(self, unit: int, value: Tensor) -> None:
        """The home has stepped."""
        for stage in self._copies[unit - self._first]:
            self._values[unit, stage].append(value.detach().clone())

    def take_value(self, unit: int, stage: int) -> None:
        """A guest takes the next value."""
        self._copies[unit - self._first][stage].load([self._values[unit, stage].popleft()])

    def take_all(self) -> None:
        """Every guest takes what is still under way."""
        for (unit, stage), values in self._values.items():
            while values:
                self.take_value(unit, stage)
        assert not self._sums, "the home has added all"

