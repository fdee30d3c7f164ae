"""How often a rank's host waits for its whole device: at most once a window more than stock does."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests import devices
from tests.deepspeed import jobs as deepspeed_jobs
from tests.megatron import jobs as megatron_jobs
from tests.megatron.training import Trainer
from tests.processes import run_ranks

pytestmark = pytest.mark.skipif(not devices.on_gpu(), reason="counts what CUDA is asked for")
WARM_UP, COUNTED = 3, 4
"""Windows."""
Counts = Counter[str]


def count(train_window: Callable[[], object]) -> Counts:
    """Synchronizations of ``COUNTED`` windows, by the place in the code that asks for them."""
    for _ in range(WARM_UP):
        train_window()
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(COUNTED):
            train_window()
    torch.cuda.set_sync_debug_mode("default")
    return Counter(
        f"{Path(each.filename).name}:{each.lineno}" for each in caught if "synchronizing" in str(each.message)
    )


def count_deepspeed(rank: int, job: deepspeed_jobs.Job) -> Counts:
    engine = deepspeed_jobs.make_engine(rank, job)
    batches = deepspeed_jobs.stream(engine, job)
    batches = ((devices.place(x), devices.place(y)) for x, y in batches)
    return count(lambda: engine.train_batch(batches))


def count_megatron(rank: int, job: megatron_jobs.Job) -> Counts:
    trainer = Trainer(rank, job)
    return count(lambda: trainer.train(1))


HOSTS = {
    "deepspeed": (count_deepspeed, lambda schedule: deepspeed_jobs.Job(schedule, 2, 4, "exact")),
    "megatron": (count_megatron, lambda schedule: megatron_jobs.Job(schedule)),
}


@pytest.mark.parametrize("schedule", ["1f1b", "paci", "amdp"])
@pytest.mark.parametrize("host", HOSTS)
def test_at_most_one_a_window_that_stock_does_not_make(
    host: str, schedule: str, record_property: pytest.RecordProperty
) -> None:
    count_host, make_job = HOSTS[host]
    counts = {name: run_ranks(2, count_host, make_job(name)) for name in (None, schedule)}
    for rank, (stock, ours) in enumerate(zip(counts[None], counts[schedule], strict=True)):
        record_property(f"rank {rank}, stock", str(dict(stock)))
        record_property(f"rank {rank}, {schedule}", str(dict(ours)))
    for stock, ours in zip(counts[None], counts[schedule], strict=True):
        assert ours.total() <= stock.total() + COUNTED, f"stock {dict(stock)}, {schedule} {dict(ours)}"
