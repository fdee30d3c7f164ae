"""A rank's executor on plain PyTorch stages, as the tests of the runtime use it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from itertools import accumulate, islice, pairwise
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from amdp_plugin.plan.costs import CostModel
from amdp_plugin.plan.decisions import windows_ago
from amdp_plugin.plan.devices import ON_HOSTS, Provision
from amdp_plugin.plan.extrapolation import planned_extrapolation
from amdp_plugin.plan.messages import Link, Stream, links
from amdp_plugin.plan.planner import Choice, Planner
from amdp_plugin.plan.schedules import make
from amdp_plugin.plan.staleness import planned_coefficient
from amdp_plugin.runtime.channels import Channels, keep_sent
from amdp_plugin.runtime.decisions import Decisions
from amdp_plugin.runtime.exchange import Exchange
from amdp_plugin.runtime.executor import Executor
from amdp_plugin.runtime.feedback import ErrorFeedback
from amdp_plugin.runtime.plain import PlainWorker
from amdp_plugin.runtime.random_streams import Generators
from amdp_plugin.runtime.serial import SerialPipeline
from amdp_plugin.runtime.tied import tied_guests
from amdp_plugin.runtime.transport import Transport
from amdp_plugin.runtime.watch import Watch
from tests import devices

from .models import OPTIMIZERS, build_stages, data, loss, shared

AMDP_SHAPES: list[tuple[int, int, dict[str, Any]]] = [
    (2, 2, {}),
    (4, 2, {}),
    (4, 8, {}),
    (4, 4, {"directions": 1}),
    (6, 6, {}),
    (8, 8, {}),
    (8, 8, {"directions": 2}),
]
"""Stages, micro-batches of a window and options: windows below, at and above the stages, from one direction to N/2."""


class Case(NamedTuple):
    """One training job: the same on every rank and in the oracle."""

    schedule: str
    stages: int
    micro_batches: int
    kind: str = "plain"
    optimizer: str = "sgd"
    dtype: torch.dtype = torch.float32
    options: tuple[tuple[str, Any], ...] = ()
    stage_costs: tuple[float, ...] = ()
    dynamic_shapes: bool = False
    clipping: float = 0.0
    tied: tuple[tuple[int, ...], ...] = ()

    def make(self) -> Any:
        return make(self.schedule, self.stages, self.micro_batches, tied=self.tied, **dict(self.options))

    def build(self) -> list[nn.Module]:
        built = build_stages(self.kind, self.stages, self.dtype)
        for home, *guests in self.tied:
            for guest in guests:
                shared(built[guest]).data.copy_(shared(built[home]).data)
        return built

    def costs(self) -> CostModel:
        return CostModel.relative(self.stages, stage_costs=self.stage_costs)

    def planners(self) -> tuple[Planner, Planner | None]:
        """New ones, of the schedule and of its opening."""
        planned = self._replace(kind="", optimizer="", dtype=torch.float32, dynamic_shapes=False, clipping=0.0)
        choices = _choices(planned)
        planner = Planner(self.make(), self.costs(), choices[0])
        opening = planner.schedule.opening()
        return planner, Planner(opening, self.costs(), choices[1]) if opening else None

    def prepare(self) -> None:
        """Let ranks that are forked from here inherit what trials find, which takes longer than to train. The oracle
        tries by itself."""
        self.planners()


@cache
def _choices(case: Case) -> tuple[Choice, Choice | None]:
    """What the trials of ``case`` and of its opening find."""
    planner = Planner(case.make(), case.costs())
    opening = planner.schedule.opening()
    return planner.choice, Planner(opening, case.costs()).choice if opening else None


def make_channels(
    rank: int, stages: int, timeout_seconds: float = 30, keep_sent: int | None = None, **chosen: Any
) -> tuple[Channels, Watch]:
    watch = Watch(rank, timeout_seconds)
    neighbours = links(make("1f1b", stages, 1), Stream.PIPELINE)
    transport = Transport(range(stages), neighbours, devices.device(), watch)
    return Channels(transport, watch, keep_sent=keep_sent or stages + 1, **chosen), watch


def make_executor(
    rank: int,
    case: Case,
    feed: Iterator[Any] | None = None,
    timeout_seconds: float = 30,
    make_transport: Callable[[set[Link]], Transport] | None = None,
    provision: Provision = ON_HOSTS,
    generators: Generators | None = None,
) -> tuple[Executor, PlainWorker]:
    """Rank ``rank`` of ``case``; ``feed`` are its micro-batches, endless by default."""
    watch = Watch(rank, timeout_seconds)

    def transport(chosen: set[Link]) -> Transport:
        return Transport(range(case.stages), chosen, devices.device(), watch)

    make_transport = make_transport or transport
    planner, first = case.planners()
    schedule, placement = planner.schedule, planner.schedule.placement
    neighbours = make_transport(links(schedule, Stream.PIPELINE))
    channels = Channels(neighbours, watch, keep_sent(schedule), case.dynamic_shapes)
    built = case.build()
    modules = {stage: built[stage].to(devices.device()) for stage in placement.stages[rank]}
    optimizers = {
        stage: OPTIMIZERS[case.optimizer](list(module.parameters()))
        for stage, module in modules.items()
        if placement.home(stage) == rank
    }
    reads = any(placement.is_end(rank, micro_batch) for micro_batch in range(placement.directions))
    micro_batches = (placed(case.dtype) if feed is None else feed) if reads else None
    tied = [shared(modules[rank]) if rank in stages else None for stages in case.tied]
    worker = PlainWorker(
        schedule, rank, modules, optimizers, loss, micro_batches, planned_coefficient(planner), case.clipping, tied,
        generators,
    )  # fmt: skip
    exchange = None
    if schedule.reduces or schedule.tied:
        exchanged = make_transport(links(schedule, Stream.GRADIENTS, Stream.WEIGHTS))
        exchange = Exchange(schedule, worker.replicas, exchanged, watch)
        exchange.provide(provision)
    torch.manual_seed(100 + rank)
    extrapolation = worker.extrapolation.get(rank)
    if extrapolation is not None:
        extrapolation.begin(planned_extrapolation(planner))
    if case.clipping:
        ago = windows_ago(planner)
        assert ago is not None, "only what decides clips here"
        worker.decisions = Decisions(schedule, ago, windows_ago(first) if first else None, rank, channels, watch)
    return Executor(
        planner, rank, worker, channels, watch, exchange, first, worker.decisions, extrapolation
    ), worker


def run_parts(executor: Executor, parts: Iterable[int]) -> None:
    """So many windows at a time, with nothing in flight between them."""
    for windows in parts:
        for _ in range(windows):
            executor.run_window()
        executor.quiesce()


class Parts:
    """An iterator that ends at the end of each part, and goes on when the job takes up the next."""

    def __init__(self, *parts: Any) -> None:
        self.parts = list(parts)

    def __iter__(self) -> Parts:
        return self

    def __next__(self) -> Any:
        return next(self.parts[0])

    @classmethod
    def of(cls, counts: Iterable[int]) -> Parts:
        """:func:`placed`, in parts of so many micro-batches."""
        ends = [0, *accumulate(counts)]
        return cls(*(islice(placed(), first, last) for first, last in pairwise(ends)))


def run_to_the_ends(executor: Executor, feed: Parts) -> list[int]:
    """Run all parts of its data; returns the windows at which it found their ends."""
    windows = []
    while feed.parts:
        with pytest.raises(StopIteration, match="the data ends before"):
            while True:
                executor.run_window()
        windows.append(executor.window)
        feed.parts.pop(0)
    return windows


def make_oracle(case: Case, generators: Generators | None = None) -> SerialPipeline:
    """The same job in one process."""
    stages = [stage.to(devices.device()) for stage in case.build()]
    return SerialPipeline(
        stages,
        OPTIMIZERS[case.optimizer],
        loss,
        case.make(),
        costs=case.costs(),
        seeds=[100 + stage for stage in range(case.stages)],
        measure=squares,
        decide=partial(clip, case.clipping),
        tied=[[(stage, shared(stages[stage])) for stage in weight] for weight in case.tied],
        generators=generators,
    )


def squares(gradients: list[Tensor | None]) -> float:
    """The sum that stages tell each other."""
    return float(torch.stack([gradient.norm() for gradient in gradients if gradient is not None]).square().sum())


def clip(limit: float, parameters: list[nn.Parameter], total: float) -> None:
    """By the sum that is known of all stages."""
    if limit:
        norm = devices.place(torch.tensor(total)).sqrt()
        assert norm > limit, "the case must clip"
        for parameter in parameters:
            parameter.grad = parameter.grad * (limit / norm)


def oracle_of_parts(
    case: Case, parts: Iterable[int], micro_batches: Iterator[tuple[Tensor, Tensor]] | None = None
) -> SerialPipeline:
    """:func:`make_oracle`, trained for so many windows at a time, with nothing in flight between them."""
    oracle, micro_batches = make_oracle(case), micro_batches or placed(case.dtype)
    for windows in parts:
        oracle.train(micro_batches, windows)
    return oracle


def placed(dtype: torch.dtype = torch.float32, count: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """:func:`data`, on the device of this process."""
    return ((devices.place(x), devices.place(y)) for x, y in data(dtype, count))


def result(executor: Executor, worker: PlainWorker) -> dict[str, Any]:
    """What a rank ends with, for :func:`assert_equals_oracle`."""
    executor.quiesce()
    return {
        "weights": {
            stage: {key: value.to("cpu", copy=True) for key, value in module.state_dict().items()}
            for stage, module in worker.modules.items()
        },
        "plain": {
            stage: [value.to("cpu") for value in plain(worker, stage, feedback)]
            for stage, feedback in worker.feedback.items()
        },
        "random": worker.streams.states(),
        "losses": dict(worker.reported),
        "gap": executor.largest_gap,
        "peak": executor.peak_in_flight,
    }


def plain(worker: PlainWorker, stage: int, feedback: ErrorFeedback) -> list[Tensor]:
    """The plain iterate, as an evaluation sees it, of what has its home here."""
    guests = [guest._parameter for guest in tied_guests(worker.replicas)]
    own = [each for each in worker.modules[stage].parameters() if not any(each is guest for guest in guests)]
    feedback.put_plain()
    seen = [parameter.detach().clone() for parameter in own]
    feedback.put_ahead()
    return seen


def assert_equals_oracle(found: list[dict[str, Any]], oracle: SerialPipeline) -> None:
    """Weights and buffers of every replica, what every home's optimizer made, random states and measured gap of every
    rank, bit for bit."""
    placement = oracle.schedule.placement
    for rank, end in enumerate(found):
        assert tuple(end["weights"]) == placement.stages[rank]
        for stage, weights in end["weights"].items():
            for key, value in oracle.replica(stage, rank).state_dict().items():
                assert torch.equal(weights[key], value.cpu()), f"rank {rank}, stage {stage}: {key}"
        for stage, values in end["plain"].items():
            for value, expected in zip(values, oracle.plain(stage), strict=True):
                assert torch.equal(value, expected.cpu()), f"rank {rank}, stage {stage}: plain iterate"
        assert_same_random(end["random"], oracle.random_states[rank], f"rank {rank}")
        assert end["gap"] == largest_gap(oracle, rank), f"rank {rank}: gap"


def largest_gap(oracle: SerialPipeline, rank: int) -> int:
    """Of all that ``rank`` has backwarded, but for what was cancelled."""
    rank_of = oracle.schedule.placement.rank_of
    return max(used.backward - used.forward for place, used in oracle.used.items() if rank_of(*place) == rank)


def assert_same_random(found: list[Sequence[Tensor]], expected: list[Sequence[Tensor]], where: str) -> None:
    """The states of all directions, each of all generators."""
    for direction, (states, others) in enumerate(zip(found, expected, strict=True)):
        same = [torch.equal(state, other) for state, other in zip(states, others, strict=True)]
        assert all(same), f"{where}, direction {direction}: random state"
