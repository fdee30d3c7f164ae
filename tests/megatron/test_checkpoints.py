"""A run that is resumed, or handed to stock and back, goes on as if nothing had been."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from tests.processes import run_ranks

from .checkpoints import load, save
from .jobs import DISTRIBUTED, DROPOUT, Job
from .oracle import assert_equals_oracle, oracle
from .test_oracle import FEEDBACK, assert_ahead
from .test_other_weights import PIPEMARE
from .test_stock import FULL
from .training import Beside, Trainer, assert_same, assert_same_weights, copies, same_state

HALF = 3
AHEAD_PACI, AHEAD_AMDP = {"name": "paci", **FEEDBACK}, {"name": "amdp", **FEEDBACK}
RELAYED = {"name": "paci", "decisions": "relayed", "compensation": "error_feedback"}
FLUSHED = {f"flushed first, {at}": {**AHEAD_PACI, "flush_first": first} for at, first in
           {"saved before": HALF + 1, "saved there": HALF, "saved after": HALF - 1}.items()}  # fmt: skip
"""With a flush at every window at first, until shortly before or after the checkpoint."""
JOBS = {
    "1f1b": Job("1f1b", 3, 2, model=DROPOUT),
    "paci": Job("paci", 3, 2, model=DROPOUT),
    "paci, deep": Job("paci", 4, 1, model=DROPOUT),
    "paci, recomputation": Job("paci", 3, 2, model={**DROPOUT, **FULL}),
    "paci, bf16": Job("paci", 2, 2, bf16=True, model=DROPOUT),
    "paci, distributed optimizer": Job("paci", 2, 2, data=2, clip=0.05, model=DROPOUT, **DISTRIBUTED),
    "paci, tensor parallel": Job("paci", 2, 2, tensor=2, model={**DROPOUT, "attention_dropout": 0.1}),
    "amdp": Job("amdp", 4, 4, model=DROPOUT),
    "amdp, tied, clipping": Job("amdp", 4, 4, clip=0.05, tied=True, model=DROPOUT),
    "amdp, bf16, distributed optimizer": Job("amdp", 4, 4, bf16=True, model=DROPOUT, **DISTRIBUTED),
    "error feedback": Job(AHEAD_PACI, 3, 2, model=DROPOUT),
    "error feedback, bf16": Job(AHEAD_PACI, 2, 2, bf16=True, model=DROPOUT),
    "error feedback, distributed optimizer": Job(AHEAD_PACI, 2, 2, data=2, clip=0.05, model=DROPOUT, **DISTRIBUTED),
    "error feedback, distributed, bf16": Job(AHEAD_PACI, 2, 2, data=2, bf16=True, model=DROPOUT, **DISTRIBUTED),
    **{name: Job(schedule, 3, 2, model=DROPOUT) for name, schedule in FLUSHED.items()},
    "latest": Job({"name": "paci", "decisions": "latest"}, 3, 2, clip=0.05, model=DROPOUT),
    "relayed": Job(RELAYED, 3, 2, clip=0.05, model=DROPOUT),
    "relayed, deep": Job(RELAYED, 4, 1, clip=0.05, model=DROPOUT),
    "relayed, distributed optimizer, bf16": Job(RELAYED, 2, 2, data=2, bf16=True, model=DROPOUT, **DISTRIBUTED),
    "error feedback, amdp": Job(AHEAD_AMDP, 4, 4, model=DROPOUT),
    "pipemare": Job(PIPEMARE, 3, 2, model=DROPOUT),
    "pipemare, distributed, bf16": Job(PIPEMARE, 3, 2, data=2, bf16=True, model=DROPOUT, **DISTRIBUTED),
    "xpipe": Job("xpipe", 3, 2, model=DROPOUT),
    "spectrain, deep": Job("spectrain", 4, 1, model=DROPOUT),
}
BESIDE_AS_TORCH = ["error feedback", "error feedback, bf16", "error feedback, amdp", "pipemare", "xpipe"]


def save_and_go_on(rank: int, job: Job, directory: Path, kind: str) -> dict[str, Any]:
    """Train, save, train on with the same model."""
    trainer = Trainer(rank, job)
    trainer.train(HALF)
    save(trainer, directory, kind)
    trainer.losses, trainer.norms = [], []
    trainer.train(HALF)
    return trainer.result()


def load_and_go_on(rank: int, job: Job, directory: Path, kind: str, used: bool) -> dict[str, Any]:
    """Load at once, or when something else has been trained; train on with the data from there."""
    trainer = Trainer(rank, job)
    if used:
        trainer.read_from(77)
        trainer.train(2)
    torch.manual_seed(999)
    load(trainer, directory, kind)
    assert trainer.iteration == HALF
    trainer.train(HALF)
    return trainer.result()


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        *((case, "torch") for case in ("paci", "amdp", "paci, bf16", *BESIDE_AS_TORCH)),
        *((case, "torch_dist") for case in JOBS),
    ],
)
def test_resumed_run_equals_the_one_that_went_on(case: str, kind: str, tmp_path: Path) -> None:
    check_resumed(JOBS[case], kind, tmp_path)


def check_resumed(job: Job, kind: str, directory: Path) -> None:
    written = run_ranks(job.world, save_and_go_on, job, directory, kind)
    read = run_ranks(job.world, load_and_go_on, job, directory, kind, kind == "torch")
    if isinstance(job.schedule, dict) and job.schedule.get("decisions") == "relayed":
        # The updates that the checkpoint hastened are told in the calls that follow it.
        for result in (*written, *read):
            result["norms"] = result["norms"][job.pipeline - 1 :]
    assert_same(read, written)


def load_and_save(rank: int, job: Job, directory: Path) -> tuple[Beside, Beside]:
    """What a checkpoint holds beside model and optimizer, and what one would that is written as soon as that is loaded.
    """
    trainer = Trainer(rank, job)
    trainer.train(HALF)
    save(trainer, directory, "torch")
    written, fresh = trainer.beside(), Trainer(rank, job)
    load(fresh, directory, "torch")
    return written, fresh.beside()


@pytest.mark.parametrize("case", ["error feedback, amdp", "pipemare"])
def test_what_was_loaded_can_be_saved_at_once(case: str, tmp_path: Path) -> None:
    """Random states of all directions, and what a schedule computes with."""
    for written, again in run_ranks(JOBS[case].world, load_and_save, JOBS[case], tmp_path):
        assert all(map(same_state, written[0], again[0])) and len(written[0]) == len(again[0])
        for left, right in zip(written[1:], again[1:], strict=True):
            assert_same_weights(left or [], right or [], "beside")


@pytest.mark.parametrize("case", ["paci", "amdp"])
def test_saving_is_a_flush_to_the_oracle(case: str, tmp_path: Path) -> None:
    """What was in flight is cancelled and forwarded anew, random numbers included."""
    job = JOBS[case]
    found = run_ranks(job.world, save_and_go_on, job, tmp_path, "torch")
    expected = oracle(job, phases=[(HALF, job.micro_batches)] * 2)
    assert_equals_oracle(found, {**expected, "losses": expected["losses"][HALF:]})


def change_hands(rank: int, job: Job, second: Any, directory: Path, kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train and save, and hand the model over to ``second`` in this process; a fresh one of ``second`` that loads."""
    trainer = Trainer(rank, job)
    trainer.train(HALF)
    save(trainer, directory, kind)
    if trainer.is_scheduled:
        trainer.hook.detach()
    trainer.function, trainer.losses, trainer.norms = get_forward_backward_func(), [], []
    fresh = Trainer(rank, replace(job, schedule=second))
    load(fresh, directory, kind)
    for left, right in zip(trainer.bare.parameters(), fresh.bare.parameters(), strict=True):
        assert torch.equal(left, right)
    if second is not None:
        trainer.attach(second)
    trainer.read_from(HALF * job.micro_batches)
    results = []
    for each in (trainer, fresh):
        each.train(HALF)
        results.append(copy.deepcopy(each.result()))
    return results[0], results[1]


@pytest.mark.parametrize(
    ("first", "second", "kind", "more"),
    [
        ("paci", None, "torch", {}),
        (None, "paci", "torch", {}),
        ("amdp", None, "torch", {}),
        (None, "amdp", "torch", {}),
        ("paci", "amdp", "torch", {}),
        ("amdp", "paci", "torch_dist", {}),
        ("paci", None, "torch_dist", DISTRIBUTED),
        (None, "amdp", "torch_dist", DISTRIBUTED),
    ],
    ids=str,
)
def test_schedules_load_each_other(
    first: str | None, second: str | None, kind: str, more: dict[str, Any], tmp_path: Path
) -> None:
    """``None`` is stock: weights and optimizer are those that were saved, and training goes on from them."""
    stages = 4 if "amdp" in (first, second) else 2
    job = Job(first, stages, 4, clip=0.05, **more)
    found = run_ranks(stages, change_hands, job, second, tmp_path, kind)
    kept, loaded = zip(*found, strict=True)
    assert_same(list(loaded), list(kept))


@pytest.mark.parametrize(
    ("first", "second", "kind", "more"),
    [
        (AHEAD_PACI, None, "torch", {}),
        (AHEAD_PACI, None, "torch", {"bf16": True}),
        (AHEAD_PACI, "paci", "torch_dist", DISTRIBUTED),
        (AHEAD_AMDP, None, "torch_dist", {"bf16": True, **DISTRIBUTED}),
        (None, AHEAD_PACI, "torch", {}),
    ],
    ids=str,
)
def test_checkpoints_hold_the_plain_iterate(
    first: Any, second: Any, kind: str, more: dict[str, Any], tmp_path: Path
) -> None:
    """What another schedule loads, or goes on with in the same process, is what the optimizer went on from."""
    stages = 4 if first == AHEAD_AMDP else 2
    job = Job(first, stages, 4, **more)
    kept, loaded = zip(*run_ranks(stages, change_hands, job, second, tmp_path, kind), strict=True)
    assert_same(list(loaded), list(kept))
    if second is None:
        for stage, weights in enumerate(run_ranks(stages, loaded_weights, job, tmp_path, kind)):
            expected = oracle(job, HALF)
            plain = [master.to(weight) for master, weight in zip(expected["plain"][stage], weights, strict=True)]
            assert_same_weights(weights, plain, f"stage {stage}")
            assert not any(map(torch.equal, weights, expected["weights"][stage][stage]))


def loaded_weights(rank: int, job: Job, directory: Path, kind: str) -> list[torch.Tensor]:
    """What stock loads."""
    trainer = Trainer(rank, job.stock)
    load(trainer, directory, kind)
    return copies(trainer.bare)


def with_evaluation(rank: int, job: Job, often: bool) -> tuple[dict[str, Any], list[Any]]:
    """Train, with evaluations in between and at the end, or with none."""
    trainer, evaluations = Trainer(rank, job), []
    for _ in range(2):
        trainer.train(HALF)
        if often:
            evaluations.append([trainer.evaluate(500), trainer.evaluate(500), copies(trainer.bare)])
    return trainer.result(), evaluations


@pytest.mark.parametrize(
    "job",
    [
        Job(AHEAD_PACI, 3, 2, model=DROPOUT),
        Job(AHEAD_AMDP, 4, 4, bf16=True, model=DROPOUT),
        Job(AHEAD_PACI, 2, 2, data=2, alike=True, model=DROPOUT, **DISTRIBUTED),
    ],
    ids=["paci", "amdp, bf16", "paci, distributed optimizer"],
)
def test_evaluations_see_the_plain_iterate_and_change_nothing(job: Job) -> None:
    plainly, _ = zip(*run_ranks(job.world, with_evaluation, job, False), strict=True)
    found, evaluations = zip(*run_ranks(job.world, with_evaluation, job, True), strict=True)
    assert_same(list(found), list(plainly))
    for number in range(2):
        expected = oracle(job, (number + 1) * HALF)["plain"]
        for result, values in zip(found, evaluations, strict=True):
            first, again, weights = values[number]
            assert first == again
            plain = [master.to(weight) for master, weight in zip(expected[result["stage"]], weights, strict=True)]
            assert_same_weights(weights, plain, f"evaluation {number}, stage {result['stage']}")
    for result in found:
        assert_ahead(result)
