"""The hook is called as Megatron's own schedules are, and answers as they do."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.timers import Timers

from amdp_plugin.runtime.watch import PipelineStallError
from tests.processes import run_ranks

from .jobs import DROPOUT, Job
from .oracle import assert_equals_oracle, oracle
from .test_oracle import FEEDBACK
from .test_stock import OVERLAP
from .training import Trainer, assert_same, run

PACI, AMDP = Job("paci", 3, 2, model=DROPOUT), Job("amdp", 4, 4, model=DROPOUT)
FLUSHED = Job("1f1b", 3, 2, model=DROPOUT)
by_name = pytest.mark.parametrize("job", [PACI, AMDP, FLUSHED], ids=lambda job: job.schedule)


def describe(value: Any) -> str | None:
    """A job by its schedule."""
    if not isinstance(value, Job):
        return None
    name = value.schedule if isinstance(value.schedule, str) else " ".join(map(str, value.schedule.values()))
    return f"{name}, clipping" if value.clip else name


# Evaluation


def evaluate_in_between(rank: int, job: Job, often: bool) -> tuple[dict[str, Any], list[list[float]]]:
    trainer = Trainer(rank, job)
    trainer.train(3)
    found = [trainer.evaluate(500) for _ in range(2 if often else 0)]
    trainer.train(3)
    found += [trainer.evaluate(500)] if often else []
    return trainer.result(), found


def evaluate_with_stock(rank: int, job: Job, iterations: int, first: int) -> list[float]:
    """Of the weights after ``iterations`` updates, with nothing in flight."""
    trainer = Trainer(rank, job)
    trainer.train(iterations)
    trainer.hook.detach()
    trainer.function = get_forward_backward_func()
    return trainer.evaluate(first)


@by_name
def test_evaluation_changes_nothing(job: Job) -> None:
    """In the middle of a stream; and it is that of the weights after the latest update."""
    found, evaluations = zip(*run_ranks(job.world, evaluate_in_between, job, True), strict=True)
    plainly, _ = zip(*run_ranks(job.world, evaluate_in_between, job, False), strict=True)
    assert_same(list(found), list(plainly))
    early, late = (run_ranks(job.world, evaluate_with_stock, job, count, 500)[-1] for count in (3, 6))
    assert evaluations[-1] == [early, early, late]
    assert len(early) == job.micro_batches and all(early) and early != late
    assert not any(any(values) for values in evaluations[:-1])


def collect(rank: int, job: Job) -> list[Any]:
    """What a function made of the logits, and not of a loss."""
    trainer = Trainer(rank, job)
    trainer.train(2)
    trainer.chunk.eval()

    def forward_step(iterator: Any, model: Any) -> Any:
        tokens, _ = next(iterator)
        mask = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
        return model(tokens, torch.arange(8).expand(2, -1), mask), lambda logits, non_loss_data: logits.argmax(-1)

    found = trainer.run(
        forward_step_func=forward_step, data_iterator=job.batches(), forward_only=True, collect_non_loss_data=True
    )
    return [each.tolist() for each in found]


def test_other_data_than_losses_is_collected() -> None:
    job = Job("1f1b", 2, 3)
    found, expected = run_ranks(2, collect, job), run_ranks(2, collect, job.stock)
    assert found == expected and len(expected[-1]) == 3 and expected[0] == []


# What goes in


def train_on_what_is_given(rank: int, job: Job, listed: bool) -> dict[str, Any]:
    """Chunk and iterator alone, or as lists of one; ``None`` where nothing is read, as Megatron-LM has it."""
    trainer = Trainer(rank, job, num_microbatches=job.micro_batches)
    data = trainer.data if trainer.hook.reads_data else None
    if listed:
        trainer.train(4, model=[trainer.chunk], data_iterator=[data])
    else:
        trainer.train(4, model=trainer.chunk, data_iterator=data)
    return trainer.result()


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("job", [PACI, AMDP, Job({"name": "amdp", "directions": 1}, 4, 4)], ids=describe)
def test_lists_of_one_and_data_where_it_is_read(job: Job, listed: bool) -> None:
    assert_equals_oracle(run_ranks(job.world, train_on_what_is_given, job, listed), oracle(job))


def train_without_data(rank: int, job: Job) -> str:
    trainer = Trainer(rank, job)
    try:
        trainer.train(1, data_iterator=None)
    except (ValueError, PipelineStallError) as error:
        return str(error)
    raise AssertionError("was not refused")


def test_data_that_is_missing_is_named() -> None:
    """Where it is read first; the others find that rank gone."""
    first, second = run_ranks(2, train_without_data, Job({"name": "paci", "timeout_seconds": 2.0}))
    assert "data_iterator is None" in first and "every rank that runs a first or last stage" in first
    assert "receiving a header with rank 0" in second


def train_with_a_plain_provider(rank: int, job: Job) -> dict[str, Any]:
    """One that takes nothing but where a stage stands."""

    def provider(pre_process: bool, post_process: bool) -> Any:
        return job.provider(pre_process, post_process)

    trainer = Trainer(rank, job, model_provider=provider)
    trainer.train(4)
    return trainer.result()


def test_provider_may_be_of_two_arguments() -> None:
    """Guests are built as other ranks' stages all the same."""
    assert_equals_oracle(run_ranks(AMDP.world, train_with_a_plain_provider, AMDP), oracle(AMDP))


# What changes from call to call


def train_with_other_windows(rank: int, job: Job, sizes: list[int]) -> dict[str, Any]:
    trainer = Trainer(rank, job)
    for size in sizes:
        trainer.train(2, num_microbatches=size)
    return trainer.result()


@pytest.mark.parametrize(
    ("job", "sizes"),
    [
        (PACI, [2, 4, 1]),
        (PACI, [4, 3]),
        (replace(PACI, schedule={"name": "paci", **FEEDBACK}), [2, 4, 1]),
        (AMDP, [4, 8, 2]),
        (replace(AMDP, clip=10.0), [2, 4]),
        (FLUSHED, [1, 3]),
    ],
    ids=describe,
)
def test_number_of_micro_batches_changes(job: Job, sizes: list[int]) -> None:
    """As where the batch size grows: no micro-batch is lost or used twice."""
    job = replace(job, micro_batches=sizes[0])
    found = run_ranks(job.world, train_with_other_windows, job, sizes)
    assert_equals_oracle(found, oracle(job, phases=[(2, size) for size in sizes]))


def train_with_other_lengths(rank: int, job: Job, phases: list[tuple[int, int]]) -> dict[str, Any]:
    """``phases`` are (length, micro-batches of a window)."""
    trainer, first = Trainer(rank, job), 0
    for length, size in phases:
        data = replace(job, lengths=(length,)).batches(first)
        trainer.train(2, seq_length=length, num_microbatches=size, data_iterator=data)
        first += 2 * size
    return trainer.result()


@pytest.mark.parametrize("name", ["1f1b", "chimera"])
@pytest.mark.parametrize("phases", [[(8, 4), (5, 4), (6, 4)], [(8, 2), (5, 4)]], ids=describe)
def test_length_of_sequences_changes(name: str, phases: list[tuple[int, int]]) -> None:
    """Alone, and together with the number of micro-batches."""
    job = Job(name)
    found = run_ranks(2, train_with_other_lengths, job, phases)
    expected = run_ranks(2, train_with_other_lengths, job.stock, phases)
    if name == "1f1b":
        assert_same(found, expected)
    else:
        for left, right in zip(found[-1]["losses"], expected[-1]["losses"], strict=True):
            assert left == pytest.approx(right, rel=1e-4)


VARIABLE = {"variable_seq_lengths": True, "moe_token_dispatcher_type": "alltoall"}  # Megatron asks for the latter


@pytest.mark.parametrize("name", ["1f1b", "paci", "amdp"])
def test_every_micro_batch_has_its_own_length(name: str) -> None:
    job = Job(name, 2, 4, lengths=(8, 5, 7), model={**VARIABLE, **DROPOUT})
    found = run(job)
    assert_equals_oracle(found, oracle(job))
    if name == "1f1b":
        assert_same(found, run(job.stock))


def test_a_rank_meets_the_others_before_it_waits_for_a_length() -> None:
    """That of a micro-batch which its sender forwards after the meeting, for a norm that is below the limit here."""
    job = Job({"name": "chimera", "link_cost": 0.2}, 2, 2, lengths=(8, 5, 7), clip=1e3, model=VARIABLE)
    assert_equals_oracle(run(job), oracle(job))


# What comes out


@pytest.mark.parametrize("name", ["1f1b", "paci", "amdp", "chimera"])
def test_loss_with_a_number_of_tokens(name: str) -> None:
    """The mean over the labels that count, of each micro-batch; the sum and the number are reported, in order."""
    job = Job(name, 4, 4, masked=True)
    found, expected = run(job), oracle(job)
    reported = found[-1]["losses"]
    assert len({number for window in reported for _, number in window}) > 2, "windows with different numbers"
    for window, losses in zip(reported, expected["losses"], strict=True):
        assert [total / number for total, number in window] == pytest.approx(losses)
    found[-1]["losses"] = expected["losses"]
    assert_equals_oracle(found, expected)
    if name == "1f1b":
        assert reported == run(job.stock)[-1]["losses"]


@pytest.mark.parametrize("job", [PACI, AMDP], ids=lambda job: job.schedule)
def test_outputs_may_be_kept(job: Job) -> None:
    kept = replace(job, model={**job.model, "deallocate_pipeline_outputs": False})
    assert_same(run(kept), run(job))


def train_until_the_end(rank: int, job: Job, counts: list[int], timed: bool) -> dict[str, Any]:
    """On iterators of so many micro-batches, one after the other."""
    trainer, data = Trainer(rank, job), job.batches()
    trainer.config.timers = Timers(2, "minmax") if timed else None
    for count in counts:
        try:
            trainer.data = islice(data, count)
            while True:
                trainer.train(1)
        except StopIteration as error:
            assert "data ends" in str(error)
    return trainer.result()


@pytest.mark.parametrize(
    ("job", "timed"),
    [(PACI, False), (PACI, True), (AMDP, False), (FLUSHED, False)],
    ids=["paci", "timed", "amdp", "1f1b"],
)
def test_data_ends_and_goes_on(job: Job, timed: bool) -> None:
    """Within a window: every rank says so at the same call, and what is left comes first when there is more."""
    size = job.micro_batches
    found = run_ranks(job.world, train_until_the_end, job, [2 * size + 1, 2 * size - 1, size], timed)
    assert_equals_oracle(found, oracle(job, phases=[(2, size), (2, size), (1, size)]))


# What is around it


def train_with_timers(rank: int, job: Job) -> tuple[dict[str, Any], dict[str, float], bool]:
    trainer = Trainer(rank, job)
    trainer.config.timers = timers = Timers(2, "minmax")
    trainer.train(4)
    seconds = {name: timer.elapsed(reset=False) for name, timer in timers._timers.items()}
    return trainer.result(), seconds, trainer.config.barrier_with_L1_time


@pytest.mark.parametrize("job", [PACI, FLUSHED], ids=describe)
def test_timers(job: Job) -> None:
    """Those of stock Megatron, without their barriers where stages do not wait for each other."""
    found, seconds, barriers = zip(*run_ranks(job.world, train_with_timers, job), strict=True)
    assert_same(list(found), run(job))
    _, expected, _ = zip(*run_ranks(job.world, train_with_timers, job.stock), strict=True)
    for ours, stock in zip(seconds, expected, strict=True):
        assert ours.keys() == {name for name in stock if "send" not in name and "recv" not in name}
        assert all(ours.values())
        assert ours["forward-compute"] + ours["backward-compute"] < ours["forward-backward"]
    assert set(barriers) == {job is FLUSHED}


def train_overlapped(rank: int, job: Job) -> list[bool]:
    """Whether the reductions over replicas are under way when gradients are finalized, of every update but the first,
    in which Megatron learns what is to come."""
    trainer, begun = Trainer(rank, job), []

    def finalize(*given: Any, **more: Any) -> None:
        begun.append(all(group.grad_reduce_handle is not None for group in trainer.chunk.bucket_groups))
        finalize_model_grads(*given, **more)

    trainer.config.finalize_model_grads_func = finalize
    trainer.train(3)
    return begun[1:]


@pytest.mark.parametrize(("name", "stages"), [(None, 2), ("1f1b", 2), ("paci", 2), ("amdp", 4)])
def test_reductions_overlap(name: str | None, stages: int) -> None:
    """As in stock, within the last backward; with guests, before the gradients are finalized."""
    job = Job(name, stages, data=2, ddp=OVERLAP)
    assert run_ranks(job.world, train_overlapped, job) == [[True] * 2] * job.world


def train_and_detach(rank: int, job: Job) -> tuple[dict[str, Any], dict[str, Any]]:
    """Stock trains on after the hook; and so does stock that never saw it, from the same weights and optimizer."""
    trainer = Trainer(rank, job)
    trainer.train(3)
    trainer.hook.detach()
    other = Trainer(rank, job.stock)
    other.bare.load_state_dict(copy.deepcopy(trainer.bare.state_dict()))
    other.optimizer.load_state_dict(copy.deepcopy(trainer.optimizer.state_dict()))
    trainer.function, trainer.losses, trainer.norms = get_forward_backward_func(), [], []
    for each in (trainer, other):
        torch.manual_seed(7)
        each.read_from(3 * job.micro_batches)
        each.train(3)
    assert trainer.config.barrier_with_L1_time == other.config.barrier_with_L1_time
    return trainer.result(), other.result()


@pytest.mark.parametrize("job", [PACI, replace(PACI, pipeline=2, data=2, clip=0.05), AMDP], ids=describe)
def test_optimizer_is_handed_back(job: Job) -> None:
    found, expected = zip(*run_ranks(job.world, train_and_detach, job), strict=True)
    assert_same(list(found), list(expected))
    assert len({tuple(result["norms"]) for result in found}) == 1, "stock has one norm for all"
