"""Ranks whose messages occupy their devices until they are received, synchronized after every action."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from torch import Tensor

from amdp_plugin.plan.devices import ON_HOSTS, Provision, provide
from amdp_plugin.plan.planner import Planner
from amdp_plugin.plan.postings import Postings

from ..processes import run_ranks
from .models import data
from .pipelines import (
    Case,
    Parts,
    assert_equals_oracle,
    make_executor,
    oracle_of_parts,
    result,
    run_parts,
    run_to_the_ends,
)
from .rendezvous import Rendezvous

FEEDBACK = ("compensation", "error_feedback")
CASES = [
    Case("1f1b", 3, 4),
    Case("gpipe", 2, 3),
    Case("paci", 4, 2, "tuples"),
    Case("paci", 3, 6),
    Case("chimera", 4, 4),
    Case("amdp", 4, 8),
    Case("amdp", 8, 8),
    Case("amdp", 6, 12),
    Case("amdp", 8, 8, options=(("directions", 2),)),
    Case("amdp", 4, 4, optimizer="adamw", options=(FEEDBACK, ("flush_first", 4))),
    Case("1f1b", 3, 4, dynamic_shapes=True),
    Case("paci", 4, 2, "tuples", dynamic_shapes=True),
    Case("amdp", 4, 8, dynamic_shapes=True),
    Case("paci", 3, 2, "counting", options=(("flush_every", 2),)),
    Case("paci", 4, 4, "tuples", "adamw", options=(FEEDBACK, ("flush_first", 4))),
    Case("pipedream", 4, 1, "counting"),
    Case("pipedream", 3, 2, options=(("vertical_sync", True),)),
    Case("pipedream-2bw", 4, 4, "tuples", options=(FEEDBACK,)),
    Case("pipemare", 3, 2, "recomputed"),
    Case("xpipe", 4, 2, optimizer="adamw"),
]
DECIDED = [
    Case(schedule, stages, size, kind, "adamw", options=(("decisions", decisions), *options), clipping=0.05, tied=tied)
    for schedule, stages, size, kind, decisions, options, tied in (
        ("paci", 4, 1, "tuples", "latest", (FEEDBACK,), ()),
        ("paci", 3, 4, "plain", "latest", (("flush_every", 3),), ()),
        ("amdp", 4, 8, "plain", "latest", (), ()),
        ("paci", 4, 1, "counting", "relayed", (FEEDBACK,), ()),
        ("paci", 3, 4, "tuples", "relayed", (("flush_first", 4),), ()),
        ("paci", 4, 3, "plain", "relayed", (), ((0, 2, 3),)),
    )
]
TIED = [Case("paci", 4, 1, tied=((0, 3),)), Case("paci", 4, 4, tied=((0, 3), (1, 2)))]
PARTS = (2, 1, 4)
"""Windows with nothing in flight between them; where there is an opening, it ends within the third part."""


def micro_batches(case: Case) -> Iterator[tuple[Tensor, Tensor]]:
    """As ever, or with a row more or less from one to the next."""
    for index, (x, y) in enumerate(data(case.dtype)):
        rows = 1 + index % len(x) if case.dynamic_shapes else len(x)
        yield x[:rows], y[:rows]


def name(case: Case) -> str:
    chosen = [str(value) for option in case.options for value in option]
    chosen += ["dynamic"] * case.dynamic_shapes + ["tied"] * bool(case.tied)
    return "-".join(map(str, [case.schedule, case.stages, case.micro_batches, *chosen]))


def provision(case: Case) -> Provision:
    """What the proof asks for."""
    opening = case.make().opening()
    return provide([Planner(each, case.costs()) for each in (case.make(), opening) if each is not None])


def train(rank: int, case: Case, provided: Provision, timeout_seconds: float = 60) -> dict[str, Any]:
    """Windows in several parts, with nothing in flight between them; before the third, shapes are forgotten."""
    rendezvous = Rendezvous(case.stages, timeout_seconds)
    executor, worker = make_executor(
        rank, case, micro_batches(case), timeout_seconds, rendezvous.transport, provided
    )
    rendezvous.synchronize_after_actions(executor)
    run_parts(executor, PARTS[:2])
    executor._channels.forget_shapes()  # type: ignore[union-attr]
    run_parts(executor, PARTS[2:])
    return result(executor, worker)


@pytest.mark.parametrize("case", [*CASES, *DECIDED, *TIED], ids=name)
def test_a_device_may_be_synchronized_after_any_action(case: Case) -> None:
    """No rank waits for ever, and all compute what the oracle says."""
    found = run_ranks(case.stages, train, case, provision(case))
    assert_equals_oracle(found, oracle_of_parts(case, PARTS, micro_batches(case)))


def train_to_the_ends(rank: int, case: Case, provided: Provision, counts: tuple[int, ...]) -> dict[str, Any]:
    rendezvous, feed = Rendezvous(case.stages), Parts.of(counts)
    executor, worker = make_executor(rank, case, feed, 60, rendezvous.transport, provided)
    rendezvous.synchronize_after_actions(executor)
    windows = run_to_the_ends(executor, feed)
    return {**result(executor, worker), "windows": windows}


ENDING = [
    Case("1f1b", 3, 4), Case("paci", 4, 2, "tuples"), Case("amdp", 4, 4, "counting"), Case("chimera", 4, 4),
    Case("pipedream-2bw", 3, 3), Case("xpipe", 3, 2), *DECIDED[::3], DECIDED[5],
]  # fmt: skip


@pytest.mark.parametrize("rest", [0, 1])
@pytest.mark.parametrize("case", ENDING, ids=name)
def test_data_that_ends_between_windows_or_in_one(case: Case, rest: int) -> None:
    """Ranks are ahead of each other then, with messages under way; more data goes on with what was left over."""
    size, rest = case.micro_batches, rest % case.micro_batches
    found = run_ranks(case.stages, train_to_the_ends, case, provision(case), (3 * size + rest, size, 2 * size - rest))
    assert [end["windows"] for end in found] == [[3, 4, 6]] * case.stages
    assert_equals_oracle(found, oracle_of_parts(case, (3, 1, 2)))


def train_receiving_at_once(rank: int, case: Case) -> str:
    planned = Planner.postings

    def at_once(planner: Planner, index: int, of_rank: int, landing: bool) -> Postings:
        begun = planned(planner, index, of_rank, landing)
        return {None: tuple(message for received in begun.values() for message in received)}

    Planner.postings = at_once  # type: ignore[method-assign]
    try:
        train(rank, case, ON_HOSTS, timeout_seconds=2)
    except RuntimeError as error:
        return str(error)
    return ""


def test_the_model_shows_receives_that_begin_too_early() -> None:
    """With them, the same ranks wait for each other: what the plan says is what keeps them from it."""
    assert any("imed out" in error for error in run_ranks(4, train_receiving_at_once, Case("paci", 4, 4)))
