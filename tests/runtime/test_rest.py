"""Evaluations and checkpoints between windows: what replicas then exchange, on devices that messages occupy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from amdp_plugin.plan.planner import Planner
from amdp_plugin.plan.staleness import planned_coefficient
from amdp_plugin.runtime import pipeline as pipelines_module
from amdp_plugin.runtime.pipeline import Pipeline, Site
from amdp_plugin.runtime.plain import PlainWorker
from amdp_plugin.runtime.random_streams import generators_of
from amdp_plugin.runtime.tied import tied_guests
from amdp_plugin.runtime.tied_state import KeptState

from ..processes import run_ranks
from .models import OPTIMIZERS, data, loss, shared
from .pipelines import Case, assert_equals_oracle, make_oracle, placed, result
from .rendezvous import Rendezvous

FEEDBACK = ("compensation", "error_feedback")
CASES = [
    Case("chimera", 4, 4),
    Case("amdp", 4, 4, optimizer="adamw", options=(FEEDBACK,)),
    Case("paci", 4, 1, optimizer="adamw", options=(FEEDBACK,), tied=((0, 3),)),
    Case("paci", 4, 4, optimizer="adamw", tied=((0, 3), (1, 2))),
    Case("paci", 4, 2, optimizer="adamw", options=(("decisions", "relayed"),), clipping=0.05, tied=((0, 2, 3),)),
    Case("xpipe", 3, 2, "tuples", "adamw"),
]
WINDOW, EVALUATION, CHECKPOINT = "wec"
JOB = "wwewewcwweewcw"


class States:
    """An optimizer's, as a host reads and writes them."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer

    def read(self, parameter: nn.Parameter) -> KeptState:
        return KeptState(self._optimizer.state[parameter])

    def write(self, parameter: nn.Parameter, tensors: Mapping[str, Tensor]) -> None:
        for name, value in tensors.items():
            self._optimizer.state[parameter][name].copy_(value)


def make_pipeline(rank: int, case: Case, rendezvous: Rendezvous) -> tuple[Pipeline, PlainWorker, States]:
    pipelines_module.Transport = lambda ranks, links, *_: rendezvous.transport(links)  # type: ignore[misc, assignment]
    site = Site(rank, range(case.stages), dist.group.WORLD, torch.device("cpu"), 60)  # type: ignore[arg-type]
    micro_batches = data(case.dtype)
    generators = generators_of(case.build())
    pipeline = Pipeline(case.make(), case.costs(), site, lambda: next(micro_batches), generators)
    built, placement = case.build(), pipeline.schedule.placement
    modules = {stage: built[stage] for stage in placement.stages[rank]}
    optimizers = {rank: OPTIMIZERS[case.optimizer](list(modules[rank].parameters()))}
    worker = PlainWorker(
        pipeline.schedule, rank, modules, optimizers, loss, None, planned_coefficient(Planner(case.make())),
        case.clipping, [shared(modules[rank]) if rank in stages else None for stages in case.tied],
    )  # fmt: skip
    worker.feed, worker.streams, worker.losses = pipeline.feed, pipeline.random_streams, pipeline.losses
    states = States(optimizers[rank])
    replicated = {**modules, **worker.tied_modules}
    held = {unit: replicated[unit] for unit in worker.replicas}
    pipeline.hold(worker.replicas, held, worker.feedback[rank], states)
    pipeline.start(worker, 0, modules.values(), case.clipping > 0)
    worker.decisions = pipeline.decisions
    torch.manual_seed(100 + rank)
    return pipeline, worker, states


class Seen(NamedTuple):
    """On one rank, in an evaluation or a checkpoint.

    Args:
        own: the weights of the stage that is at home there, but for tied ones away from home.
        tied: the tied weights there, by unit.
        kept: of these, what the rank's optimizer keeps, by name.
    """

    own: list[Tensor]
    tied: dict[int, Tensor]
    kept: dict[int, dict[str, Tensor]]


def look(rank: int, worker: PlainWorker, states: States) -> Seen:
    away = [guest._parameter for guest in tied_guests(worker.replicas)]
    own = [each for each in worker.modules[rank].parameters() if not any(each is guest for guest in away)]
    tied = {unit: next(module.parameters()) for unit, module in worker.tied_modules.items()}
    return deepcopy(Seen(own, tied, {unit: dict(states.read(each).tensors) for unit, each in tied.items()}))


def run_job(rank: int, case: Case) -> dict[str, Any]:
    rendezvous, seen = Rendezvous(case.stages), []
    pipeline, worker, states = make_pipeline(rank, case, rendezvous)
    rendezvous.synchronize_after_actions(pipeline.executor)
    for step in JOB:
        if step == WINDOW:
            for action in pipeline.open_window():
                pipeline.executor.execute(action)
            pipeline.close_window()
        else:
            (pipeline.settle if step == EVALUATION else pipeline.rest)()
            rendezvous.synchronize()
            seen.append(look(rank, worker, states))
    return {**result(pipeline.executor, worker), "seen": seen}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.schedule}-{case.stages}-{case.micro_batches}")
def test_evaluations_change_nothing_and_checkpoints_hold_what_the_oracle_has(case: Case) -> None:
    """In both, all that share a weight show what its home has; in checkpoints their optimizers keep the same of it."""
    found = run_ranks(case.stages, run_job, case)
    oracle, micro_batches, windows = make_oracle(case), placed(case.dtype), 0
    schedule, all_seen = oracle.schedule, zip(*(end["seen"] for end in found), strict=True)
    for step in JOB:
        if step == WINDOW:
            windows += 1
            continue
        seen: Sequence[Seen] = next(all_seen)
        for unit, ranks in list(enumerate(schedule.sharing.holders))[case.stages :]:
            assert same([seen[rank].tied[unit] for rank in ranks])
            if step == CHECKPOINT:
                for name in seen[ranks[0]].kept[unit]:
                    assert same([seen[rank].kept[unit][name] for rank in ranks])
        if step == CHECKPOINT or schedule.relays:
            oracle.train(micro_batches, windows)
            windows = 0
            for rank, on_rank in enumerate(seen):
                assert all(map(torch.equal, on_rank.own, oracle.plain(rank))), f"rank {rank}"
    oracle.train(micro_batches, windows)
    assert_equals_oracle(found, oracle)


def same(values: Sequence[Tensor]) -> bool:
    return all(torch.equal(values[0], value) for value in values)
