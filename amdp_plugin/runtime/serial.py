"""The oracle: what a schedule means, on real modules, in one process.

It plays the programs of all ranks in any order that the laws allow. It shares nothing with the
executor, the channels or the engines but the program, so that no bug can make both agree. It is also a
tool: train any sequential model under any schedule on one device, and see what that does to convergence.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
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
from .random_streams import Generators, generators_of, split
from .runnable import check_runnable
from .serial_extrapolation import SerialExtrapolation
from .serial_replica import Replica, sum_of
from .serial_tied import SharedWeights, Tied

Tensors = tuple[Tensor, ...]
MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]



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
        tied: for every weight that stages share, the stages that the schedule names for it, each with its parameter. It
            is stepped with the first of them, and part of no other stage's optimizer.
        decide: then called with a stage's master parameters, gradients set, and the sum, before each step. An update
            that is left without gradients, by it or by ``before_step``, is skipped.
        loss_scale: with a master dtype, what the loss is multiplied with before its backward, and its gradients divided
            by as they are summed up; takes the updates that the last stage has had at the forward.
        generators: what layers draw random numbers from; by default torch's own, where ``stages`` are.

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
        tied: Tied = (),
        generators: Generators | None = None,
    ) -> None:
        check_runnable(schedule)
        if len(stages) != schedule.num_stages:
            raise ValueError(f"{len(stages)} stages for a schedule of {schedule.num_stages}")
        self.stages, self.schedule, self._costs = list(stages), Planner(schedule, costs).schedule, costs
        self.used: dict[tuple[int, int], Used] = {}
        self._loss, self._before_step, self._measure, self._decide = loss, before_step, measure, decide
        self._shared = SharedWeights(
            tied, schedule, self.stages, lambda stage, parameter: Replica(stage, [parameter], master_dtype, 1)
        )
        self._replicas = [
            {rank: self._replica_of(stage, rank != ranks[0], master_dtype, versions) for rank in ranks}
            for stage, ranks, versions in zip(
                stages, schedule.placement.holders, schedule.weight_versions, strict=True
            )
        ]
        self._masters = [
            [_master(parameter, master_dtype) for parameter in self._shared.own(stage)] for stage in self.stages
        ]
        self.optimizers = [make_optimizer(masters) for masters in self._masters]
        self._extrapolation = SerialExtrapolation(self._masters, self.optimizers)
        self._generators = generators or generators_of(self.stages)
        self.random_states = [
            self._streams(seeds[rank] if seeds else None) for rank in range(schedule.num_ranks)
        ]
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
        self._backwards = [0] * len(self.stages)
        for number in play(program.graph):
            rank, action = program.graph.places[number]
            action = action.shifted(first, size)
            if action.window(size) < first + windows:
                self._run(rank, action)
        for stage in range(len(self.stages)):
            while self._closed[stage]:  # its update stands in a window that is not run
                self._update(self.schedule.placement.home(stage), stage, self.versions[stage])
        for replicas in self._replicas:
            for replica in replicas.values():
                replica.use(replica.version)
        self._shared.take_all()
        assert not self._flying and not self._messages, "the program left work undone"
        return [self._mean_loss(window) for window in range(first, first + windows)]

    def _run(self, rank: int, action: Action) -> None:
        stage, kind, index = action
        if self.schedule.sharing.is_tied(stage):
            self._run_tied(stage, self.schedule.sharing.stage_on(rank, stage), kind, index)
        elif kind == UPDATE:
            self._update(rank, stage, index)
        elif kind == REDUCE:
            if self._replicas[stage][rank] is self._home(stage):
                self._close(stage, index)
        elif kind in (FORWARD, BACKWARD):
            outside, direction = self._generators.get(), index % self.schedule.placement.directions
            self._generators.put(self.random_states[rank][direction])
            run = self._forward if kind == FORWARD else self._backward
            run(self._replicas[stage][rank], stage, index)
            self.random_states[rank][direction] = self._generators.get()
            self._generators.put(outside)

    def _forward(self, replica: Replica, stage: int, index: int) -> None:
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

    def _backward(self, replica: Replica, stage: int, index: int) -> None:
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
        self._shared.accumulate(stage, self._scales[index])
        self._backwards[stage] += 1
        if len(self._replicas[stage]) == 1 and self._backwards[stage] % self.schedule.micro_batches == 0:
            self._close(stage, self.versions[stage] + len(self._closed[stage]))

    def _close(self, stage: int, window: int) -> None:
        """The gradient of ``window`` is whole: the sum of the replicas' gradients. What follows is of the next."""
        gradients = [replica.take_gradients() for replica in self._replicas[stage].values()]
        self._closed[stage].append([sum_of(parts) for parts in zip(*gradients, strict=True)])
        self._measured[stage, window] = self._measure(self._closed[stage][-1])

    def _run_tied(self, unit: int, stage: int, kind: str, window: int) -> None:
        """A guest sends its sum, and takes the new value; the home adds the sums to its own, and sends what it made."""
        home, parameter = self._shared.home(unit)
        if stage != home:
            if kind == REDUCE:
                self._shared.send_gradient(unit, stage, window)
            else:
                self._shared.take_value(unit, stage)
            return
        place = next(place for place, own in enumerate(self._shared.own(self.stages[home])) if own is parameter)
        if kind == UPDATE:
            self._shared.send_value(unit, self._latest[home][place])
            return
        gradients = self._closed[home][window - self.versions[home]]
        gradients[place] = sum_of((gradients[place], *self._shared.gradients(unit, window)))
        self._measured[home, window] = self._measure(gradients)

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
            steps = any(master.grad is not None for master in self._masters[stage])
            with self._extrapolation.stepping(stage, replica.version):
                self.optimizers[stage].step()
            self.optimizers[stage].zero_grad(set_to_none=True)
            if steps or stage not in self._latest:
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

    def _home(self, stage: int) -> Replica:
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

    def _replica_of(self, stage: nn.Module, copy: bool, dtype: torch.dtype | None, versions: int) -> Replica:
        module = deepcopy(stage) if copy else stage
        return Replica(module, self._shared.own(module), dtype, versions)

    def _streams(self, seed: int | None) -> list[Any]:
        """For a rank, a stream for each direction."""
        outside = self._generators.get()
        if seed is not None:
            self._generators.seed(seed)
        states = split(self.schedule.placement.directions, self._generators)
        self._generators.put(outside)
        return states


def _master(parameter: nn.Parameter, dtype: torch.dtype | None) -> nn.Parameter:
    return nn.Parameter(parameter.detach().clone().to(dtype or parameter.dtype))
