"""A weight that several stages share, on one of their ranks: see :mod:`.plan.sharing`.

At home it is a :class:`.Home` of one parameter, which the optimizer of the home's stage steps. On the other stages it
is a :class:`TiedGuest`, whose values come from the home alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..plan.schedule import Schedule
from .replica import GradientOf, Guest, Home, gradient_of
from .weights import live_update


class TiedGuest:
    """A tied weight away from its home.

    The stage goes on while sums are sent and values come, so that each has memory of its own.

    Args:
        parameter: that the stage computes with.
        sum_dtype: dtype of the sum of gradients; by default that of the parameter.
        gradient_of: that sum, of any shape with as many elements.
    """

    def __init__(
        self, parameter: nn.Parameter, sum_dtype: torch.dtype | None = None, gradient_of: GradientOf = gradient_of
    ) -> None:
        self._parameter, self._sum_dtype, self._gradient_of = parameter, sum_dtype or parameter.dtype, gradient_of
        self._value = parameter.detach().clone().view(-1)
        """What the stage computes with. An optimizer that knows of the parameter may write over that."""
        self._free_values: list[Tensor] = []
        self._free_sums: list[Tensor] = []
        self._receiving: deque[Tensor] = deque()
        self._sending: deque[Tensor] = deque()

    def provide(self, values: int, sums: int) -> None:
        """Take memory for so many copies of the value, the one in use among them, and of the sum."""
        while 1 + len(self._free_values) < values:
            self._free_values.append(torch.empty_like(self._value))
        while len(self._free_sums) < sums:
            self._free_sums.append(torch.empty_like(self._value, dtype=self._sum_dtype))

    def buffers(self) -> Iterator[Tensor]:
        """The memory that it takes."""
        yield self._value
        for buffers in (self._free_values, self._free_sums, self._receiving, self._sending):
            yield from buffers

    @torch.no_grad()
    def outgoing(self) -> Tensor:
        """The sum of the window that closes, to be sent, until :meth:`arrived`; the next one begins."""
        total = self._gradient_of(self._parameter)
        copy = self._free_sums.pop() if self._free_sums else torch.empty_like(self._value, dtype=self._sum_dtype)
        copy.copy_(total.reshape(-1))
        total.zero_()
        self._sending.append(copy)
        return copy

    def incoming(self) -> Tensor:
        """Where the next value is received, while those before it come, or are in use."""
        self._receiving.append(self._free_values.pop() if self._free_values else torch.empty_like(self._value))
        return self._receiving[-1]

    def arrived(self) -> None:
        """The oldest value that is received is there: compute with it. The home has had the oldest sum."""
        self._free_values.append(self._value)
        self._value = self._receiving.popleft()
        self._free_sums.append(self._sending.popleft())
        self.write()

    @torch.no_grad()
    def write(self, value: Tensor | None = None) -> None:
        """Let the parameter hold what the stage computes with, or for the time being ``value``."""
        with live_update([self._parameter]):
            self._parameter.copy_((self._value if value is None else value).view(self._parameter.shape))

    @torch.no_grad()
    def adopt(self) -> None:
        """The parameter holds what the stage computes with."""
        self._value.copy_(self._parameter.view(-1))

    def clear(self) -> None:
        """Set the sum of gradients to zero."""
        self._gradient_of(self._parameter).zero_()


Replicas = Mapping[int, Home | Guest | TiedGuest]
"""By number, the stages and tied weights on a rank that others hold too."""


def make_tied(
    schedule: Schedule,
    rank: int,
    parameters: Sequence[nn.Parameter | None],
    sum_dtype: torch.dtype | None = None,
    gradient_of: GradientOf = gradient_of,
) -> tuple[dict[int, Home | TiedGuest], dict[int, nn.Module]]:
    """The tied weights on ``rank``, and a module for each, by the number that the schedule gives it.

    Args:
        parameters: of this rank's stage, one for every tied weight; ``None`` for those that it does not share.
        sum_dtype: dtype of the sums of gradients; by default that of the parameters.
        gradient_of: where the host sums the gradient of a parameter.

    Raises:
        ValueError: where they are not what the schedule ties.
    """
    first, sharing = schedule.num_stages, schedule.sharing
    given = {unit: parameter for unit, parameter in enumerate(parameters, start=first) if parameter is not None}
    expected = [unit for unit in sharing.units[rank] if sharing.is_tied(unit)]
    if len(parameters) != len(schedule.tied) or sorted(given) != expected:
        raise ValueError(
            f"schedule {schedule.name!r} ties the stages {schedule.tied}; on rank {rank} that is {expected}, numbered "
            f"after the stages, and there are parameters for {sorted(given)}"
        )
    if len(set(map(id, given.values()))) < len(given):
        raise ValueError(f"one parameter of rank {rank} stands for several of the tied weights {sorted(given)}")
    frozen = [unit for unit, parameter in given.items() if not parameter.requires_grad]
    if frozen:
        raise ValueError(f"the tied weights {frozen} of the stages {schedule.tied} are not trained: build them untied")
    modules: dict[int, nn.Module] = {unit: nn.ParameterList([parameter]) for unit, parameter in given.items()}
    return {
        unit: Home(modules[unit], sum_dtype, gradient_of)
        if sharing.holders[unit][0] == rank
        else TiedGuest(parameter, sum_dtype, gradient_of)
        for unit, parameter in given.items()
    }, modules


def tied_guests(replicas: Replicas) -> list[TiedGuest]:
    """Those of ``replicas`` that are tied weights away from home."""
    return [replica for replica in replicas.values() if isinstance(replica, TiedGuest)]
