"""The pipeline stops and goes on without losing or repeating anything."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest
import torch

from tests.processes import run_ranks

from .pipelines import (
    Case,
    Parts,
    assert_equals_oracle,
    make_executor,
    make_oracle,
    oracle_of_parts,
    placed,
    result,
    run_to_the_ends,
)

CASES = [
    Case("paci", 2, 2),
    Case("paci", 3, 1, "tuples"),
    Case("paci", 4, 2, "counting"),
    Case("1f1b", 3, 4),
    Case("amdp", 4, 4, "counting"),
    Case("amdp", 8, 8, "tuples"),
    Case("amdp", 4, 2),
    Case("chimera", 4, 4),
    Case("paci", 3, 2, "counting", options=(("flush_every", 2),)),
]
IDS = ["-".join(map(str, (case.schedule, case.stages, case.micro_batches, *dict(case.options)))) for case in CASES]


def train_and_quiesce(rank: int, case: Case, parts: tuple[int, ...]) -> dict[str, Any]:
    executor, worker = make_executor(rank, case)
    for windows in parts:
        for _ in range(windows):
            executor.run_window()
        executor.quiesce()
        executor.quiesce()  # with nothing in flight it does nothing
    return result(executor, worker)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_quiesce_is_a_cut(case: Case) -> None:
    """Cancelling leaves weights, data and random state as if no forward had run ahead."""
    parts = (3, 1, 4)
    found = run_ranks(case.stages, train_and_quiesce, case, parts)
    assert_equals_oracle(found, oracle_of_parts(case, parts))


def train_to_the_end(rank: int, case: Case, counts: tuple[int, ...]) -> dict[str, Any]:
    feed = Parts.of(counts)
    executor, worker = make_executor(rank, case, feed)
    windows = run_to_the_ends(executor, feed)
    return {**result(executor, worker), "windows": windows}


@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.parametrize("rest", [0, 1])
def test_data_that_ends_loses_nothing(case: Case, rest: int) -> None:
    """Every rank stops at the same window; new data continues with what was left over."""
    size = case.micro_batches
    count, more = 3 * size + rest % size, 2 * size
    found = run_ranks(case.stages, train_to_the_end, case, (count, more))
    assert [end["windows"] for end in found] == [[3, 5]] * case.stages
    oracle, micro_batches = make_oracle(case), placed()
    oracle.train(micro_batches, 3)
    oracle.train(micro_batches, 2)
    assert_equals_oracle(found, oracle)


def train_one_iterator_a_window(rank: int, case: Case, windows: int) -> dict[str, Any]:
    feed = Parts.of([case.micro_batches] * windows)
    executor, worker = make_executor(rank, case, feed)
    for _ in range(windows):
        executor.run_window()
        feed.parts.pop(0)
    return result(executor, worker)


def test_an_iterator_for_every_window() -> None:
    """What stock users may do: it trains on all data, and costs a flush a window."""
    case = Case("paci", 3, 2)
    found = run_ranks(3, train_one_iterator_a_window, case, 4)
    oracle, micro_batches = make_oracle(case), placed()
    for _ in range(4):
        oracle.train(micro_batches, 1)
    assert_equals_oracle(found, oracle)


def train_without_data(rank: int, case: Case) -> str:
    executor, _ = make_executor(rank, case, iter(()))
    with pytest.raises(StopIteration) as caught:
        executor.run_window()
    return str(caught.value)


def test_no_data_at_all() -> None:
    found = run_ranks(3, train_without_data, Case("paci", 3, 2))
    assert found == ["the data ends before the 2 micro-batches of window 0"] * 3


def train_on_unequal_data(rank: int, case: Case) -> str:
    count = 8 if rank == 0 else 5
    executor, _ = make_executor(rank, case, islice(placed(), count), timeout_seconds=5)
    try:
        for _ in range(4):
            executor.run_window()
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_unequal_data_on_the_two_ends_is_told() -> None:
    first, last = run_ranks(2, train_on_unequal_data, Case("paci", 2, 2))
    assert "the data of the last stage ends before it" in last
    assert "rank 1" in first


def test_losses_belong_to_their_micro_batches() -> None:
    case = Case("paci", 3, 2)
    losses = run_ranks(3, train_and_quiesce, case, (4,))[-1]["losses"]
    assert sorted(losses) == list(range(8))
    assert len(set(losses.values())) == 8
    means = make_oracle(case).train(placed(), 4)
    measured = [(losses[2 * window] + losses[2 * window + 1]) / 2 for window in range(4)]
    assert measured == pytest.approx(means, rel=1e-6)


def take_buffers(rank: int) -> dict[int, list[list[float]]]:
    """Of every stage here, a buffer whose memory is that of its transpose, which differed on every rank."""
    executor, worker = make_executor(rank, Case("chimera", 2, 2))
    for module in worker.modules.values():
        module.register_buffer("table", torch.arange(6.0).view(2, 3).t() + 10 * rank)
    assert executor._exchange is not None
    executor._exchange.copy_home(worker.modules)
    return {stage: module.table.tolist() for stage, module in worker.modules.items()}


def test_guests_take_buffers_of_any_layout_from_their_homes() -> None:
    for found in run_ranks(2, take_buffers):
        assert found == {stage: [[10.0 * stage + column + 3 * row for row in range(2)] for column in range(3)]
                         for stage in range(2)}  # fmt: skip
