"""Tied embeddings under paci, whose stages never meet: Megatron's chunks equal the oracle bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from amdp_plugin.megatron.tied import tied_parameters
from amdp_plugin.megatron.tied_state import MegatronStates
from tests.processes import run_ranks

from .jobs import DISTRIBUTED, DROPOUT, Job
from .oracle import assert_equals_oracle, oracle
from .test_checkpoints import change_hands, check_resumed
from .test_oracle import FEEDBACK, LIMIT, LOOSE, of_own_stages
from .test_stock import FULL, OVERLAP
from .training import Trainer, assert_same, run


def check(job: Job, iterations: int = 4) -> None:
    job = replace(job, tied=True)
    found = run(job, iterations)
    assert_equals_oracle(found, oracle(job, iterations))
    for result in found:  # nothing is left under way
        if result["stage"] == job.pipeline - 1:
            assert torch.equal(result["weights"][job.pipeline - 1][-1], found[0]["weights"][0][0])


@pytest.mark.parametrize(("stages", "size"), [(2, 1), (2, 2), (2, 5), (3, 3), (4, 1), (4, 4), (4, 6)])
def test_paci(stages: int, size: int) -> None:
    """Windows below, at and above the number of stages, with dropout."""
    check(Job("paci", stages, size, model=DROPOUT), iterations=6)


def test_a_deep_pipeline() -> None:
    check(Job("paci", 8, 3, model=DROPOUT))


@pytest.mark.parametrize("more", [{}, DISTRIBUTED], ids=["", "distributed optimizer"])
@pytest.mark.parametrize("size", [1, 3])
def test_bf16_with_sums_and_masters_in_fp32(size: int, more: dict[str, Any]) -> None:
    check(Job("paci", 3, size, bf16=True, model=DROPOUT, **more))


BOTH = {**DISTRIBUTED, "ddp": {**DISTRIBUTED["ddp"], **OVERLAP}}


@pytest.mark.parametrize("more", [{}, DISTRIBUTED, {"ddp": OVERLAP}, BOTH], ids=["", "distributed", "overlap", "both"])
def test_replicas_that_are_alike(more: dict[str, Any]) -> None:
    """Each pipeline sends its own sums, before anything is reduced over replicas."""
    check(Job("paci", 2, 2, data=2, alike=True, model=DROPOUT, **more))


def test_recomputation() -> None:
    check(Job("paci", 3, 2, model={**DROPOUT, **FULL}))


@pytest.mark.parametrize("more", [{}, {"bf16": True}, {"bf16": True, **DISTRIBUTED}], ids=["fp32", "bf16", "parts"])
def test_error_feedback(more: dict[str, Any]) -> None:
    check(Job({"name": "paci", **FEEDBACK}, 3, 2, model=DROPOUT, **more))


@pytest.mark.parametrize("schedule", [{"flush_first": 3}, {"flush_every": 2}], ids=str)
def test_flushes(schedule: dict[str, int]) -> None:
    check(Job({"name": "paci", **schedule}, 3, 2, model=DROPOUT), iterations=6)


def test_replicas_with_data_of_their_own() -> None:
    """To rounding: the gradient of the window is the mean over them, of the tied weight, too."""
    job = Job("paci", 2, 2, data=2, tied=True, optimizer=LOOSE)
    found, expected = run(job), oracle(job)
    for result in found:
        stage = result["stage"]
        for value, other in zip(result["weights"][stage], expected["weights"][stage][stage], strict=True):
            torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-6)


def test_the_norm_counts_it_once_and_whole() -> None:
    """By what each stage knows of the others, to the rounding of a norm."""
    job = Job({"name": "paci", "decisions": "latest"}, 4, 4, clip=LIMIT, tied=True, optimizer=LOOSE)
    for value, other, far in of_own_stages(run(job), oracle(job), oracle(replace(job, clip=0.0))):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(value, far, rtol=1e-5, atol=1e-6)


RELAYED = {"name": "paci", "decisions": "relayed"}


@pytest.mark.parametrize(("stages", "size"), [(2, 1), (3, 2), (4, 4)])
def test_relayed_decisions(stages: int, size: int) -> None:
    """What is tied is sent before a window is parked."""
    check(Job(RELAYED, stages, size, model=DROPOUT), iterations=6)


@pytest.mark.parametrize("more", [{"bf16": True}, {"bf16": True, **DISTRIBUTED}, DISTRIBUTED], ids=str)
def test_relayed_decisions_with_masters_and_parts(more: dict[str, Any]) -> None:
    check(Job({**RELAYED, **FEEDBACK}, 2, 2, data=2, alike=True, model=DROPOUT, **more))


def test_tensor_parallel() -> None:
    """Each rank of a stage exchanges its own part of the words with its like: both copies stay equal."""
    found = run(Job("paci", 2, 2, tensor=2, tied=True, model=DROPOUT))
    for first, last in zip(found[:2], found[2:], strict=True):
        assert torch.equal(first["weights"][0][0], last["weights"][1][-1])
    assert all(loss for result in found if result["stage"] == 1 for loss in result["losses"])


def evaluate(rank: int, job: Job) -> dict[str, Any]:
    """Between two windows, with values on their way to the last stage."""
    trainer = Trainer(rank, job)
    trainer.train(3)
    before = [trainer.evaluate(500) for _ in range(2)]
    trainer.train(2)
    result = trainer.result()
    after = trainer.evaluate(500)
    return {**result, "evaluated": before, "at the end": after}


def test_an_evaluation_sees_one_weight_and_changes_nothing() -> None:
    """On both ends that of the home; the training goes on with what each had."""
    job = Job("paci", 4, 1, tied=True, model=DROPOUT)
    found = run_ranks(4, evaluate, job)
    assert_equals_oracle(found, oracle(job, 5))
    three = run_ranks(4, evaluate_at_rest, job)
    assert found[-1]["evaluated"][0] == found[-1]["evaluated"][1] == three[-1]


def evaluate_at_rest(rank: int, job: Job) -> list[float]:
    trainer = Trainer(rank, job)
    trainer.train(3)
    trainer.hook.quiesce()
    return trainer.evaluate(500)


RESUMED = {
    "": Job("paci", 4, 1, tied=True, model=DROPOUT),
    "bf16": Job("paci", 3, 2, bf16=True, tied=True, model=DROPOUT),
    "distributed optimizer": Job("paci", 2, 2, data=2, tied=True, clip=0.05, model=DROPOUT, **DISTRIBUTED),
    "error feedback": Job({"name": "paci", **FEEDBACK}, 3, 2, tied=True, model=DROPOUT),
    "error feedback, bf16": Job({"name": "paci", **FEEDBACK}, 3, 2, bf16=True, tied=True, model=DROPOUT),
    "relayed": Job({**RELAYED, **FEEDBACK}, 4, 1, tied=True, clip=0.05, model=DROPOUT),
}


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        *((case, "torch") for case in RESUMED if case not in ("distributed optimizer", "relayed")),
        *((case, "torch_dist") for case in RESUMED),
    ],
)
def test_resumed_run_equals_the_one_that_went_on(case: str, kind: str, tmp_path: Path) -> None:
    check_resumed(RESUMED[case], kind, tmp_path)


def kept_at_rest(rank: int, job: Job) -> dict[str, Any]:
    """What this rank's optimizer keeps for the words, with nothing in flight."""
    trainer = Trainer(rank, job)
    trainer.train(3)
    trainer.hook.quiesce()
    (parameter,) = tied_parameters(trainer.chunk, trainer.stage, trainer.hook.schedule.tied)
    assert parameter is not None
    return {name: value.clone() for name, value in MegatronStates(trainer.optimizer).read(parameter).tensors.items()}


KEPT = {
    "fp32": Job("paci", 2, 1, tied=True),
    "bf16": Job("paci", 2, 1, tied=True, bf16=True),
    "distributed": Job("paci", 2, 1, data=2, tied=True, **DISTRIBUTED),
    "distributed, bf16": Job("paci", 2, 1, data=2, tied=True, bf16=True, **DISTRIBUTED),
    "error feedback, bf16": Job({"name": "paci", **FEEDBACK}, 2, 1, tied=True, bf16=True),
    "tensor parallel": Job("paci", 2, 1, tensor=2, tied=True),
}


@pytest.mark.parametrize("case", KEPT)
def test_at_rest_both_optimizers_keep_what_the_homes_does(case: str) -> None:
    """Masters and moments, whole or in the same parts."""
    job = KEPT[case]
    found = run_ranks(job.world, kept_at_rest, job)
    names = {"exp_avg", "exp_avg_sq", *(["param"] if job.bf16 or job.distributed_optimizer else [])}
    for first, last in zip(found[: job.world // 2], found[job.world // 2 :], strict=True):
        assert first.keys() == last.keys() == names
        assert all(torch.equal(value, last[name]) and value.any() for name, value in first.items())


@pytest.mark.parametrize(
    ("first", "second", "kind", "more"),
    [
        ("paci", None, "torch", {}),
        ("paci", None, "torch", {"bf16": True}),
        ("paci", None, "torch_dist", {"bf16": True, "data": 2, **DISTRIBUTED}),
        ({"name": "paci", **FEEDBACK}, None, "torch", {}),
        (None, "paci", "torch", {}),
        ("paci", "1f1b", "torch_dist", {}),
    ],
    ids=str,
)
def test_schedules_load_each_other(first: Any, second: Any, kind: str, more: dict[str, Any], tmp_path: Path) -> None:
    """Under stock each stage steps a copy of its own, which stay alike only where all that they go on from is."""
    job = Job(first, 2, 2, clip=0.05, tied=True, **more)
    found = run_ranks(job.world, change_hands, job, second, tmp_path, kind)
    kept, loaded = zip(*found, strict=True)
    assert_same(list(loaded), list(kept))
    half = job.world // 2
    for first_stage, last_stage in zip(loaded[:half], loaded[half:], strict=True):
        assert torch.equal(first_stage["weights"][0][0], last_stage["weights"][1][-1])
