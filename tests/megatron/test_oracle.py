"""Megatron's chunks compute under a schedule, bit for bit, what the serial oracle computes on the same stages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from .jobs import DISTRIBUTED, DROPOUT, Job
from .oracle import assert_equals_oracle, nothing, oracle
from .test_stock import FULL, OVERLAP, SELECTIVE
from .training import run

LOOSE = {"adam_eps": 1e-3}
"""For comparisons to rounding: with a small epsilon, Adam makes whole steps of gradients that are rounding alone (those
of the keys' biases are zero but for it)."""


def check(job: Job, iterations: int = 4) -> list[dict[str, Any]]:
    found = run(job, iterations)
    assert_equals_oracle(found, oracle(job, iterations))
    return found


@pytest.mark.parametrize(("stages", "size"), [(2, 1), (2, 2), (2, 5), (3, 1), (3, 3), (3, 4), (4, 1), (4, 2), (4, 6)])
def test_paci(stages: int, size: int) -> None:
    """Windows below, at and above the number of stages, with dropout."""
    found = check(Job("paci", stages, size, model=DROPOUT), iterations=6)
    assert found[0]["gap"] == -(-(stages - 1) // size)


@pytest.mark.parametrize(
    ("stages", "size", "options"),
    [
        (2, 2, {}),
        (2, 4, {}),
        (4, 2, {}),
        (4, 4, {}),
        (4, 8, {"decisions": "meeting"}),
        (4, 4, {"directions": 1}),
        (4, 4, {"preload": 0}),
        (8, 8, {}),
    ],
)
def test_amdp(stages: int, size: int, options: dict[str, Any]) -> None:
    """Home and guests of every stage, with dropout from a stream of random numbers for each direction."""
    check(Job({"name": "amdp", **options}, stages, size, model=DROPOUT), iterations=3 if stages == 8 else 4)


@pytest.mark.parametrize(
    ("name", "stages", "size"), [("gpipe", 3, 4), ("1f1b", 3, 2), ("chimera", 2, 2), ("chimera", 4, 4)]
)
def test_flushed(name: str, stages: int, size: int) -> None:
    found = check(Job(name, stages, size, model=DROPOUT))
    assert {result["gap"] for result in found} == {0}


def test_more_in_flight() -> None:
    check(Job({"name": "paci", "extra_in_flight": 2}, 3, 2, model=DROPOUT), iterations=6)


def test_program_for_other_costs() -> None:
    check(Job({"name": "amdp", "stage_costs": [1.0, 1.0, 1.0, 3.0], "backward_ratio": 1.5}, 4, 4, model=DROPOUT))


@pytest.mark.parametrize(
    "job", [Job("paci", 3, 2), Job("amdp", 4, 4), Job("chimera", 2, 2)], ids=lambda job: job.schedule
)
@pytest.mark.parametrize("more", [{}, DISTRIBUTED], ids=["", "distributed optimizer"])
def test_bf16_with_sums_and_masters_in_fp32(job: Job, more: dict[str, Any]) -> None:
    check(replace(job, bf16=True, model=DROPOUT, **more))


@pytest.mark.parametrize("name", ["paci", "amdp"])
@pytest.mark.parametrize("recomputation", [FULL, SELECTIVE], ids=["full", "selective"])
def test_recomputation(name: str, recomputation: dict[str, Any]) -> None:
    """A forward with the new weights, and the random numbers of the first."""
    check(Job(name, 4, 4, model={**DROPOUT, **recomputation}))


@pytest.mark.parametrize(
    ("name", "stages", "more"),
    [
        ("paci", 2, {}),
        ("paci", 2, DISTRIBUTED),
        ("paci", 2, {"ddp": OVERLAP}),
        ("amdp", 4, {}),
        ("amdp", 4, DISTRIBUTED),
    ],
    ids=str,
)
def test_replicas_that_are_alike(name: str, stages: int, more: dict[str, Any]) -> None:
    """Their mean is each of them: the oracle of one, bit for bit."""
    check(Job(name, stages, 4, data=2, alike=True, model=DROPOUT, **more))


FEEDBACK = {"compensation": "error_feedback"}


@pytest.mark.parametrize(
    ("name", "stages", "size"), [("paci", 2, 2), ("paci", 4, 2), ("amdp", 4, 4), ("pipedream-2bw", 3, 3)]
)
def test_flushes_at_first(name: str, stages: int, size: int) -> None:
    check(Job({"name": name, **FEEDBACK, "flush_first": 3}, stages, size, model=DROPOUT))


@pytest.mark.parametrize(("stages", "size"), [(2, 1), (2, 4), (3, 2), (4, 2), (4, 6)])
def test_error_feedback(stages: int, size: int) -> None:
    job = Job({"name": "paci", **FEEDBACK, "strength": 0.7}, stages, size, model=DROPOUT)
    for result in check(job):
        assert_ahead(result)


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("more", [{}, DISTRIBUTED], ids=["", "distributed optimizer"])
@pytest.mark.parametrize(("name", "stages", "data"), [("paci", 3, 1), ("amdp", 4, 1), ("paci", 2, 2)])
def test_error_feedback_with_masters_and_parts(
    name: str, stages: int, data: int, more: dict[str, Any], bf16: bool
) -> None:
    """Masters in fp32 are the plain iterate; with the distributed optimizer each of two replicas keeps a part of it.
    Guests get what their home computes with."""
    job = Job({"name": name, **FEEDBACK}, stages, 4, data=data, alike=True, bf16=bf16, model=DROPOUT, **more)
    for result in check(job):
        assert_ahead(result)


def assert_ahead(result: dict[str, Any]) -> None:
    """A stage computes with other weights than its optimizer goes on from."""
    assert not any(map(torch.equal, result["weights"][result["stage"]], result["plain"]))


LIMIT = 0.05


def clip(parameters: list[nn.Parameter]) -> None:
    """Of what updates at once: a stage, or all of them where updates meet."""
    assert nn.utils.clip_grad_norm_(parameters, LIMIT) > LIMIT, "the case must clip"


def clip_whole_model(parameters: list[nn.Parameter]) -> None:
    assert len(parameters) > 40, "the parameters of all stages"
    clip(parameters)


def of_own_stages(found: list[dict[str, Any]], *expected: dict[str, Any]) -> Iterator[tuple[Tensor, ...]]:
    """Every parameter of every rank's own stage: as found, and as each of the oracles has it."""
    for result in found:
        stage = result["stage"]
        yield from zip(result["weights"][stage], *(each["weights"][stage][stage] for each in expected), strict=True)


@pytest.mark.parametrize(
    ("name", "decisions", "clipping"),
    [
        ("paci", "local", clip), ("paci", "latest", nothing), ("paci", "relayed", nothing),
        ("amdp", "latest", nothing), ("amdp", "meeting", clip_whole_model), ("paci", "meeting", clip_whole_model),
    ],
)  # fmt: skip
def test_clipping(name: str, decisions: str, clipping: Any) -> None:
    """By the norm of the stage, of the whole model where updates meet, or by what is known of it. Megatron sums the
    squares in another order than the oracle, so norms, and all that comes of them, are equal to the rounding of
    fp32. The oracle knows no distributed optimizer: it is one for the job without and the job with it."""
    job = Job({"name": name, "decisions": decisions}, 4, 4, clip=LIMIT, optimizer=LOOSE)
    expected, unclipped = oracle(job, before_step=clipping), oracle(replace(job, clip=0.0))
    in_parts = replace(job, ddp=DISTRIBUTED["ddp"], optimizer={**DISTRIBUTED["optimizer"], **LOOSE})
    for found in map(run, (job, in_parts)):
        for value, other, far in of_own_stages(found, expected, unclipped):
            torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-6)
            assert not torch.allclose(value, far, rtol=1e-5, atol=1e-6) or torch.equal(other, far)
        norms = {tuple(result["norms"]) for result in found}
        if decisions == "relayed":
            assert {result["norms"][0] for result in found[1:]} == {None}, "the first update is still to come"
            norms = {norms[1:] if norms[0] is None else norms[:-1] for norms in norms}
        alike = decisions in ("meeting", "relayed")
        assert len(norms) == (1 if alike else 4), "one norm for all, or each stage has one"


@pytest.mark.parametrize(("stages", "size"), [(2, 1), (2, 4), (3, 1), (3, 3), (4, 2), (4, 6)])
def test_relayed_decisions(stages: int, size: int) -> None:
    """Windows below, at and above the number of stages, with dropout: updates stand elsewhere, whatever they do."""
    check(Job({"name": "paci", "decisions": "relayed"}, stages, size, model=DROPOUT), iterations=6)


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("more", [{}, DISTRIBUTED, {"ddp": OVERLAP}], ids=["", "distributed optimizer", "overlap"])
def test_relayed_decisions_with_masters_and_parts(more: dict[str, Any], bf16: bool) -> None:
    schedule = {"name": "paci", "decisions": "relayed", **FEEDBACK}
    check(Job(schedule, 2, 4, data=2, alike=True, bf16=bf16, model=DROPOUT, **more))


@pytest.mark.parametrize(
    ("name", "stages", "options"),
    [("amdp", 2, {"decisions": "meeting"}), ("amdp", 4, {}), ("amdp", 4, FEEDBACK), ("chimera", 2, {})],
)
def test_tied_embeddings(name: str, stages: int, options: dict[str, Any]) -> None:
    """The first and the last stage sum their gradients of the one weight, guests' included: they meet at every update,
    so that the copies stay equal bit for bit. In one process the sum is made by hand."""
    job = Job({"name": name, **options}, stages, 4, tied=True, model=DROPOUT)
    found = run(job)
    assert_equals_oracle(found, oracle(job, before_step=sum_tied))
    assert torch.equal(found[0]["weights"][0][0], found[-1]["weights"][stages - 1][-1])


def sum_tied(parameters: list[nn.Parameter]) -> None:
    first, last = parameters[0], parameters[-1]
    assert first.shape == last.shape and torch.equal(first, last), "the word embedding, and the output layer"
    first.grad = last.grad = first.grad + last.grad
