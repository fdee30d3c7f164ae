"""The oracle: what a schedule means, on real modules, in one process.

It plays the programs of all ranks in any order that the laws allow. It shares nothing with the
executor, the channels or the engines but the program, so that no bug can make both agree. It is also a
tool: train any sequential model under any schedule on one device, and see what that does to convergence.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..plan.action import BACKWARD, FORWARD, REDUCE, UPDATE, Action
from ..plan.costs import CostModel
from ..plan.decisions import check_decisions, windows_ago
from ..plan.extrapolation import planned_extrapolation
from ..plan.planner import Planner
from ..plan.play import play
from ..plan.schedule import Schedule
from ..plan.staleness import planned_coefficient
from ..plan.verify import verify
from .random_streams import split
from .runnable import check_runnable
from .serial_extrapolation import SerialExtrapolation

Tensors = tuple[Tensor, ...]
MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


NO_VERSION = -1


class Used(NamedTuple):
    """Versions of a stage's weights that one micro-batch's forward and backward used."""

    forward: int
    backward: int


class SerialPipeline:
    """Trains ``stages`` as ``schedule`` would, one action after the other.

    The weights have explicit versions: every stage's optimizer steps a master copy of its own, and the
    result is written over the parameters of each of the stage's replicas as their next version. Before every forward
    and backward the version that the schedule says is written there: for a backward mostly that which its replica then
    has, whatever its forward used. Each direction on each rank draws its random numbers from a stream of its own.

    With error feedback a version is ``z + coefficient * (z - z_before)``, of what the optimizer has made and what it
    had made before; the optimizer goes on from ``z``, and does not know. Where a schedule extrapolates,
    :class:`.SerialExtrapolation` says what is written there instead.

    Args:
        stages: the consecutive slices of the model. A stage takes and returns a tensor or a tuple of tensors.
            They become the home replicas; where a schedule has several directions, guests are copies of them.
        make_optimizer: called once a stage with its master parameters.
        loss: ``loss(output, label)`` of the last stage's output, a scalar.
        schedule: for example ``plan.schedules.make("paci", 4, 8)``.
        costs: what the program is made for; equal stages by default, as in the engines.
        seeds: the seed of each rank's random numbers; by default each continues from the present state.
        master_dtype: dtype of the master copies and of the sum of gradients, for mixed precision; by
            default that of the parameters.
        before_step: called with a stage's master parameters, gradients set, before each step (to clip them); where
            a schedule's updates meet, once a window with those of all stages.
        measure: where decisions are the latest or relayed: of a stage's gradients (``None`` where there is none), the
            number that stages add up.
        decide: then called with a stage's master parameters, gradients set, and the sum, before each step.
        loss_scale: with a master dtype, what the loss is multiplied with before its backward, and its gradients divided
            by as they are summed up; takes the updates that the last stage has had at the forward.

    Attributes:
        schedule: of alternatives, the chosen one. One with windows of another size may be put in its place.
        versions: updates that each stage has had.
        random_states: for each rank, the states of its directions' random numbers.
        used: for every (stage, micro-batch), the :class:`Used` versions. Micro-batches count from the start.

    Raises:
        ValueError: for a schedule that can only be planned, or stages or costs of another number.
    """

    def __init__(
        self,
        stages: Sequence[nn.Module],
        make_optimizer: MakeOptimizer,
        loss: Callable[[Any, Any], Tensor],
        schedule: Schedule,
        *,
        costs: CostModel | None = None,
        seeds: Sequence[int] | None = None,
        master_dtype: torch.dtype | None = None,
        before_step: Callable[[list[nn.Parameter]], Any] = lambda parameters: None,
        measure: Callable[[list[Tensor | None]], float] = lambda gradients: 0.0,
        decide: Callable[[list[nn.Parameter], float], Any] = lambda parameters, total: None,
        loss_scale: Callable[[int], float] = lambda updates: 1.0,
    ) -> None:
        check_runnable(schedule)
        if len(stages) != schedule.num_stages:
            raise ValueError(f"{len(stages)} stages for a schedule of {schedule.num_stages}")
        self.stages, self.schedule, self._costs = list(stages), Planner(schedule, costs).schedule, costs
        self.used: dict[tuple[int, int], Used] = {}
        self._loss, self._before_step, self._measure, self._decide = loss, before_step, measure, decide
        self._replicas = [
            {rank: _Replica(_own(stage, copy=rank != ranks[0]), master_dtype, versions) for rank in ranks}
            for stage, ranks, versions in zip(
                stages, schedule.placement.holders, schedule.weight_versions, strict=True
            )
        ]
        self._masters = [
            [_master(parameter, master_dtype) for parameter in stage.parameters() if parameter.requires_grad]
            for stage in stages
        ]
        self.optimizers = [make_optimizer(masters) for masters in self._masters]
        self._extrapolation = SerialExtrapolation(self._masters, self.optimizers)
        ranks, present = range(schedule.num_ranks), torch.get_rng_state()
        states = [_random_state(seed) for seed in seeds] if seeds else [present.clone() for _ in ranks]
        self.random_states = [self._streams(state) for state in states]
        self._loss_scale = loss_scale
        self._scales: dict[int, float] = {}
        self._data: dict[int, tuple[Any, Any]] = {}
        self._losses: dict[int, Tensor] = {}
        self._backwards = [0] * len(self.stages)
        self._closed: list[deque[list[Tensor | None]]] = [deque() for _ in self.stages]
        self._measured: dict[tuple[int, int], float] = {}
        self._loaded: set[int] = set()
        self._coefficient = 0.0
        self._latest: dict[int, list[Tensor]] = {}
        self._flying: dict[tuple[int, int], tuple[Tensors, Tensors, int]] = {}
        self._messages: dict[tuple[int, str, int], Tensors] = {}

    @property
    def versions(self) -> list[int]:
        return [self._home(stage).version for stage in range(len(self.stages))]

    def replica(self, stage: int, rank: int) -> nn.Module:
        """``stage`` as ``rank`` holds it."""
        return self._replicas[stage][rank].module

    def plain(self, stage: int) -> list[Tensor]:
        """What the optimizer of ``stage`` has made, one tensor a trained parameter: without error feedback, what the
        stage computes with."""
        return [master.detach() for master in self._masters[stage]]

    def train(self, data: Iterator[tuple[Any, Any]], windows: int) -> list[float]:
        """Run ``windows`` windows, from an empty pipeline to an empty pipeline.

        What the schedule would have done ahead, for later windows, is not done: that is what cancelling comes to.

        Args:
            data: ``(input, label)`` micro-batches; ``windows * schedule.micro_batches`` are taken.

        Returns:
            The mean loss of every window.

        Raises:
            ProgramError: before anything is trained, when the program of the schedule breaks a law.
        """
        planner, first = Planner(self.schedule, self._costs), self.versions[0]
        opening = planner.schedule.opening()
        self._extrapolation.begin(planned_extrapolation(planner))
        self._losses.clear()
        flushed = min(windows, max(0, self.schedule.flush_first - first))
        losses = self._play(Planner(opening, self._costs), data, flushed) if opening and flushed else []
        return [*losses, *self._play(planner, data, windows - flushed)] if windows > flushed else losses

    def _play(self, planner: Planner, data: Iterator[tuple[Any, Any]], windows: int) -> list[float]:
        """:meth:`train`, with one program from its start."""
        program, self._coefficient = planner.program(windows), planned_coefficient(planner) or 0.0
        verify(program)
        self._played, self._ago = planner.schedule, windows_ago(planner)
        self._extrapolation.restart(self._played.extrapolates)
        if self._ago:
            check_decisions(program, self._ago)
        size, first = self.schedule.micro_batches, self.versions[0]
        numbers = range(first * size, (first + windows) * size)
        self._data = {number: next(data) for number in numbers}
        self._first = first
        self._measured.clear()
        for rank, action in play(program):
            action = action.shifted(first, size)
            if action.window(size) < first + windows:
                self._run(rank, action)
        for stage in range(len(self.stages)):
            while self._closed[stage]:  # its update stands in a window that is not run
                self._update(self.schedule.placement.home(stage), stage, self.versions[stage])
        for replicas in self._replicas:
            for replica in replicas.values():
                replica.use(replica.version)
        assert not self._flying and not self._messages, "the program left work undone"
        return [self._mean_loss(window) for window in range(first, first + windows)]

    def _run(self, rank: int, action: Action) -> None:
        stage, kind, index = action
        if kind == UPDATE:
            self._update(rank, stage, index)
        elif kind == REDUCE:
            if self._replicas[stage][rank] is self._home(stage):
                self._close(stage, index)
        elif kind in (FORWARD, BACKWARD):
            outside, direction = torch.get_rng_state(), index % self.schedule.placement.directions
            torch.set_rng_state(self.random_states[rank][direction])
            run = self._forward if kind == FORWARD else self._backward
            run(self._replicas[stage][rank], stage, index)
            self.random_states[rank][direction] = torch.get_rng_state()
            torch.set_rng_state(outside)

    def _forward(self, replica: _Replica, stage: int, index: int) -> None:
        value = self._data[index][0] if stage == 0 else self._messages.pop((stage, FORWARD, index))
        inputs = (value,) if isinstance(value, Tensor) else tuple(value)
        if stage > 0:
            inputs = tuple(tensor.requires_grad_(tensor.is_floating_point()) for tensor in inputs)
        window, first = index // self.schedule.micro_batches, self._first
        entered = self._flying[0, index][2] if stage else replica.version
        version = first + self._played.forward_version(window - first, replica.version - first, entered - first)
        replica.use(version)
        replica.compute_with(self._extrapolation.forward(stage, window, version))
        output = replica.module(inputs[0] if len(inputs) == 1 else inputs)
        if stage == len(self.stages) - 1:
            output = self._loss(output, self._data[index][1])
            self._losses[index] = output.detach()
            self._scales[index] = self._loss_scale(self.versions[-1])
        outputs = (output,) if isinstance(output, Tensor) else tuple(output)
        if stage < len(self.stages) - 1:
            self._messages[stage + 1, FORWARD, index] = tuple(tensor.detach().clone() for tensor in outputs)
        self._flying[stage, index] = (inputs, outputs, version)

    def _backward(self, replica: _Replica, stage: int, index: int) -> None:
        inputs, outputs, forward = self._flying.pop((stage, index))
        used = Used(forward, self._played.backward_version(forward, replica.version))
        self.used[stage, index] = used
        replica.use(used.backward)
        replica.compute_with(self._extrapolation.backward(stage, index // self.schedule.micro_batches, *used))
        if stage == len(self.stages) - 1:
            (outputs[0] / self.schedule.micro_batches * self._scales[index]).backward()
        else:
            floating = [tensor for tensor in outputs if tensor.is_floating_point()]
            torch.autograd.backward(floating, self._messages.pop((stage, BACKWARD, index)))
        if stage > 0:
            floating = [tensor for tensor in inputs if tensor.is_floating_point()]
            self._messages[stage - 1, BACKWARD, index] = tuple(
                torch.zeros_like(tensor) if tensor.grad is None else tensor.grad.clone() for tensor in floating
            )
        replica.accumulate(self._scales[index])
        self._backwards[stage] += 1
        if len(self._replicas[stage]) == 1 and self._backwards[stage] % self.schedule.micro_batches == 0:
            self._close(stage, self.versions[stage] + len(self._closed[stage]))

    def _close(self, stage: int, window: int) -> None:
        """The gradient of ``window`` is whole: the sum of the replicas' gradients. What follows is of the next."""
        gradients = [replica.take_gradients() for replica in self._replicas[stage].values()]
        self._closed[stage].append([_sum(parts) for parts in zip(*gradients, strict=True)])
        self._measured[stage, window] = self._measure(self._closed[stage][-1])

    def _update(self, rank: int, stage: int, window: int) -> None:
        """At home: step the masters with the gradients of all replicas. Everywhere: take the result as next version."""
        replica = self._replicas[stage][rank]
        if replica is self._home(stage):
            if stage not in self._loaded:
                met = range(len(self.stages)) if self.schedule.together else (stage,)
                self._before_step([master for each in met for master in self._load_gradients(each)])
            self._loaded.discard(stage)
            if self._ago is not None:
                self._decide(self._masters[stage], self._known(stage, window))
            before = [tensor.clone() for tensor in self.plain(stage)] if self._coefficient else None
            with self._extrapolation.stepping(stage, replica.version):
                self.optimizers[stage].step()
            self.optimizers[stage].zero_grad(set_to_none=True)
            self._latest[stage] = self._ahead(self.plain(stage), before)
        replica.load(self._latest[stage])

    def _ahead(self, plain: list[Tensor], before: list[Tensor] | None) -> list[Tensor]:
        """What a stage computes with after an update from ``before`` to ``plain``."""
        if before is None:
            return plain
        return [new + self._coefficient * (new - old) for new, old in zip(plain, before, strict=True)]

    def _load_gradients(self, stage: int) -> list[nn.Parameter]:
        """The masters of ``stage``, with the gradients of its oldest closed window."""
        for master, gradient in zip(self._masters[stage], self._closed[stage].popleft(), strict=True):
            master.grad = gradient
        self._loaded.add(stage)
        return self._masters[stage]

    def _known(self, stage: int, window: int) -> float:
        """The sum that the update of ``stage`` takes, over the stages of which it knows one since the pipeline was
        empty."""
        assert self._ago is not None
        windows = {other: window - late for other, late in enumerate(self._ago[stage])}
        return sum(self._measured[other, known] for other, known in windows.items() if known >= self._first)

    def _home(self, stage: int) -> _Replica:
        return self._replicas[stage][self.schedule.placement.home(stage)]

    def _mean_loss(self, window: int) -> float:
        """The sum over the directions of their sums over micro-batches, divided as they are reported."""
        size, directions = self.schedule.micro_batches, self.schedule.placement.directions
        first = self._losses[window * size]
        total = torch.zeros_like(first, dtype=torch.promote_types(first.dtype, torch.float32))
        for direction in range(directions):
            own = torch.zeros_like(first)
            for index in range(window * size + direction, (window + 1) * size, directions):
                own += self._losses[index]
            total += own / size
        return float(total)

    def _streams(self, state: Tensor) -> list[Tensor]:
        """A stream for each direction, from the state of a rank."""
        outside = torch.get_rng_state()
        torch.set_rng_state(state)
        states = split(self.schedule.placement.directions)
        torch.set_rng_state(outside)
        return states


class _Replica:
    """A stage on one of the ranks that hold it: its parameters, the latest of their versions and as many before it as
    may be in use, and the sum of their gradients."""

    def __init__(self, module: nn.Module, master_dtype: torch.dtype | None, versions: int) -> None:
        self.module, self.version, self._versions = module, 0, versions
        self._parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self._master_dtype = master_dtype
        self._sums: list[Tensor | None] = [None] * len(self._parameters)
        self._values = {0: [parameter.detach().clone() for parameter in self._parameters]}
        self._used = 0

    def use(self, version: int) -> None:
        """Compute with that version from now on."""
        if version != self._used:
            for parameter, value in zip(self._parameters, self._values[version], strict=True):
                # Through .data, so that graphs that saved the parameter read this version.
                parameter.data.copy_(value)
            self._used = version

    def compute_with(self, values: list[Tensor] | None) -> None:
        """Compute with ``values``, where there are some, which are no version, until the next :meth:`use`."""
        if values is not None:
            for parameter, value in zip(self._parameters, values, strict=True):
                parameter.data.copy_(value)
            self._used = NO_VERSION

    def accumulate(self, scale: float) -> None:
        """After a backward: with a master dtype, the sum is kept in it, without the loss scale."""
        if self._master_dtype is not None:
            for number, parameter in enumerate(self._parameters):
                if parameter.grad is not None:
                    self._sums[number] = _sum((self._sums[number], parameter.grad.to(self._master_dtype) / scale))
                    parameter.grad = None

    def take_gradients(self) -> list[Tensor | None]:
        """The sums, which begin anew."""
        if self._master_dtype is not None:
            taken, self._sums = self._sums, [None] * len(self._sums)
            return taken
        found = [parameter.grad for parameter in self._parameters]
        for parameter in self._parameters:
            parameter.grad = None
        return found

    def load(self, values: list[Tensor]) -> None:
        """Take them as the next version."""
        self.version += 1
        self._values[self.version] = [
            value.to(parameter.dtype, copy=True) for parameter, value in zip(self._parameters, values, strict=True)
        ]
        self._values.pop(self.version - self._versions - 1, None)
        self.use(self.version)


def _own(module: nn.Module, copy: bool) -> nn.Module:
    return deepcopy(module) if copy else module


def _sum(parts: Iterable[Tensor | None]) -> Tensor | None:
    """The sum, from left to right, of those that are there."""
    there = [part for part in parts if part is not None]
    return reduce(torch.add, there) if there else None


def _master(parameter: nn.Parameter, dtype: torch.dtype | None) -> nn.Parameter:
    return nn.Parameter(parameter.detach().clone().to(dtype or parameter.dtype))


def _random_state(seed: int) -> Tensor:
    return torch.Generator().manual_seed(seed).get_state()
