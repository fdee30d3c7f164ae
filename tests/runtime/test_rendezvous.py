"""Ranks whose messages occupy their devices until they are received, synchronized after every action."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from torch import Tensor

from amdp_plugin.plan.devices import gradient_buffers
from amdp_plugin.plan.messages import Link
from amdp_plugin.plan.planner import Planner
from amdp_plugin.plan.postings import Postings

from ..processes import run_ranks
from .models import data
from .pipelines import Case, assert_equals_oracle, make_executor, oracle_of_parts, result
from .rendezvous import RendezvousTransport

CASES = [
    Case("1f1b", 3, 4),
    Case("gpipe", 2, 3),
    Case("paci", 4, 2, "tuples"),
    Case("paci", 3, 6),
    Case("chimera", 4, 4),
    Case("amdp", 4, 8),
    Case("amdp", 8, 8),
    Case("1f1b", 3, 4, dynamic_shapes=True),
    Case("paci", 4, 2, "tuples", dynamic_shapes=True),
    Case("amdp", 4, 8, dynamic_shapes=True),
    Case("paci", 4, 1, tied=((0, 3),)),
    Case("paci", 4, 4, tied=((0, 3), (1, 2))),
]
PARTS = (2, 1, 3)
_made: list[RendezvousTransport] = []
"""Until the process ends: a transport that goes closes connections that others may still look at."""


def micro_batches(case: Case) -> Iterator[tuple[Tensor, Tensor]]:
    """As ever, or with a row more or less from one to the next."""
    for index, (x, y) in enumerate(data(case.dtype)):
        rows = 1 + index % len(x) if case.dynamic_shapes else len(x)
        yield x[:rows], y[:rows]


def train(rank: int, case: Case, buffers: int, timeout_seconds: float = 60) -> dict[str, Any]:
    """Windows in several parts, with nothing in flight between them; before the third, shapes are forgotten."""
    transports: list[RendezvousTransport] = []

    def transport(links: set[Link]) -> RendezvousTransport:
        transports.append(RendezvousTransport(range(case.stages), links, timeout_seconds))
        _made.append(transports[-1])
        return transports[-1]

    executor, worker = make_executor(rank, case, micro_batches(case), timeout_seconds, transport, buffers)
    for part, windows in enumerate(PARTS):
        if part == 2:
            executor._channels.forget_shapes()  # type: ignore[union-attr]
        for _ in range(windows):
            for action in executor.open_window():
                executor.execute(action)
                for each in transports:
                    each.synchronize()
            executor.close_window()
        executor.quiesce()
    return result(executor, worker)


def name(case: Case) -> str:
    grown = "-dynamic" if case.dynamic_shapes else ""
    return f"{case.schedule}-{case.stages}-{case.micro_batches}{grown}{'-tied' if case.tied else ''}"


@pytest.mark.parametrize("case", CASES, ids=name)
def test_a_device_may_be_synchronized_after_any_action(case: Case) -> None:
    """No rank waits for ever, and all compute what the oracle says."""
    found = run_ranks(case.stages, train, case, gradient_buffers(Planner(case.make(), case.costs())))
    assert_equals_oracle(found, oracle_of_parts(case, PARTS, micro_batches(case)))


def train_receiving_at_once(rank: int, case: Case) -> str:
    planned = Planner.postings

    def at_once(planner: Planner, index: int, of_rank: int) -> Postings:
        begun = planned(planner, index, of_rank)
        return {None: tuple(message for received in begun.values() for message in received)}

    Planner.postings = at_once  # type: ignore[method-assign]
    try:
        train(rank, case, 1, timeout_seconds=2)
    except RuntimeError as error:
        return str(error)
    return ""


def test_the_model_shows_receives_that_begin_too_early() -> None:
    """With them, the same ranks wait for each other: what the plan says is what keeps them from it."""
    assert any("imed out" in error for error in run_ranks(4, train_receiving_at_once, Case("paci", 4, 4)))
