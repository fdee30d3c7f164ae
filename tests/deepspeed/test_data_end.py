"""Data that ends: every rank stops at the same window, no micro-batch is lost, and training goes on with more."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from tests.processes import run_ranks
from tests.runtime.models import data

from .jobs import Job, assert_equals_oracle, finish, make_engine, make_oracle, weights


def train_until_the_end(engine: Any, batches: Any = None) -> list[float]:
    """The losses of all windows for which there is data."""
    losses = []
    try:
        while True:
            losses.append(float(engine.train_batch(batches)))
    except StopIteration as error:
        assert "data ends" in str(error)
        return losses


def train(rank: int, job: Job, count: int, more: int) -> dict[str, Any]:
    """Train on ``count`` micro-batches, and then on those that follow, up to ``more`` in all."""
    engine = make_engine(rank, job)
    batches = data()
    losses = train_until_the_end(engine, itertools.islice(batches, count))
    at_the_end = {"losses": list(losses), "steps": engine.global_steps, "weights": weights(engine)}
    assert train_until_the_end(engine) == [], "there was nothing to train on"
    losses += train_until_the_end(engine, itertools.islice(batches, more - count))
    return {**finish(engine, losses), "at_the_end": at_the_end}


def check(job: Job, count: int, more: int) -> None:
    """``count`` and then ``more`` micro-batches make as many windows as are full, as in the oracle."""
    found = run_ranks(job.world, train, job, count, more, timeout=60.0)
    pipeline, batches = make_oracle(job), data()
    first, second = count // job.size, more // job.size - count // job.size
    losses = pipeline.train(batches, first) if first else []
    for stage, result in enumerate(found):
        assert result["at_the_end"]["losses"] == losses
        assert result["at_the_end"]["steps"] == first
        for value, expected in zip(
            result["at_the_end"]["weights"][stage].values(), pipeline.stages[stage].state_dict().values(), strict=True
        ):
            assert value.equal(expected), f"stage {stage}"
    losses = losses + pipeline.train(batches, second)
    assert_equals_oracle(found, pipeline, losses)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_data_ends_with_a_window(stages: int, size: int) -> None:
    check(Job("paci", stages, size), count=3 * size, more=6 * size)


@pytest.mark.parametrize(("size", "rest"), [(2, 1), (4, 1), (4, 3)])
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_data_ends_within_a_window(stages: int, size: int, rest: int) -> None:
    """The rest comes first when there is more, and what then remains is kept again."""
    check(Job("paci", stages, size), count=3 * size + rest, more=6 * size + size - 1)


@pytest.mark.parametrize(("stages", "size", "rest"), [(4, 4, 0), (4, 4, 3), (4, 8, 1), (8, 8, 0)])
def test_data_of_several_directions_ends(stages: int, size: int, rest: int) -> None:
    """What was backwarded for a window that never begins is forgotten, too."""
    check(Job("amdp", stages, size), count=3 * size + rest, more=6 * size + size - 1)


@pytest.mark.parametrize(("name", "count"), [("1f1b", 7), ("1f1b", 8), ("gpipe", 7), ("paci", 3), ("paci", 0)])
def test_flushed_schedules_and_no_window_at_all(name: str, count: int) -> None:
    check(Job(name, 3, 4), count=count, more=17)
