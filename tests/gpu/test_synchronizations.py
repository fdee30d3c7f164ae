"""How often CUDA lets a rank's host wait for its device: at most once a window more than under stock. What hosts ask
for is counted without a GPU, too (tests/synchronizations.py); here there is also what libraries do by themselves.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import devices
from tests.deepspeed import jobs as deepspeed_jobs
from tests.deepspeed.tied_layers import make_tied_engine
from tests.late_device import counting_waits
from tests.megatron import jobs as megatron_jobs
from tests.megatron.training import Trainer
from tests.processes import run_ranks

pytestmark = pytest.mark.skipif(not devices.on_gpu(), reason="counts what CUDA is asked for")
WARM_UP, COUNTED = 3, 4
"""Windows."""
Counts = Counter[str]


def count(train_window: Callable[[], object]) -> Counts:
    """Synchronizations of ``COUNTED`` windows, by the place in the code that asks for them, and what the host waits for
    by looking at events, of which CUDA says nothing."""
    for _ in range(WARM_UP):
        train_window()
    torch.cuda.set_sync_debug_mode("warn")
    own: list[str] = []
    with warnings.catch_warnings(record=True) as caught, counting_waits(lambda: own.append("watch.py:_await")):
        warnings.simplefilter("always")
        for _ in range(COUNTED):
            train_window()
    torch.cuda.set_sync_debug_mode("default")
    places = [f"{Path(each.filename).name}:{each.lineno}" for each in caught if "synchronizing" in str(each.message)]
    return Counter([*places, *own])


def count_deepspeed(rank: int, job: deepspeed_jobs.Job, tied: bool) -> Counts:
    engine = (make_tied_engine if tied else deepspeed_jobs.make_engine)(rank, job)
    batches = deepspeed_jobs.stream(engine, job)
    batches = ((devices.place(x), devices.place(y)) for x, y in batches)
    return count(lambda: engine.train_batch(batches))


def count_megatron(rank: int, job: megatron_jobs.Job, tied: bool) -> Counts:
    trainer = Trainer(rank, job)
    return count(lambda: trainer.train(1))


LATEST, RELAYED = {"name": "paci", "decisions": "latest"}, {"name": "paci", "decisions": "relayed"}
SCHEDULES: dict[str, tuple[Any, float, bool]] = {
    "1f1b": ("1f1b", 0.0, False),
    "paci": ("paci", 0.0, False),
    "amdp": ("amdp", 0.0, False),
    "latest": (LATEST, 0.05, False),
    "relayed": (RELAYED, 0.05, False),
    "tied": ("paci", 0.0, True),
}
"""A schedule, what is clipped by, and whether the first and the last stage share a weight."""


def deepspeed_job(schedule: Any, clipping: float, tied: bool) -> deepspeed_jobs.Job:
    return deepspeed_jobs.Job(schedule, 2, 4, "exact", config={"gradient_clipping": clipping})


def megatron_job(schedule: Any, clipping: float, tied: bool) -> megatron_jobs.Job:
    return megatron_jobs.Job(schedule, clip=clipping, tied=tied)


HOSTS: dict[str, tuple[Callable[..., Counts], Callable[..., Any]]] = {
    "deepspeed": (count_deepspeed, deepspeed_job),
    "megatron": (count_megatron, megatron_job),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("host", HOSTS)
def test_at_most_one_a_window_that_stock_does_not_make(
    host: str, name: str, record_property: pytest.RecordProperty
) -> None:
    count_host, make_job = HOSTS[host]
    schedule, clipping, tied = SCHEDULES[name]
    job = make_job(schedule, clipping, tied)
    stock, ours = (run_ranks(2, count_host, each, tied) for each in (job.stock, job))
    for rank, counts in enumerate(zip(stock, ours, strict=True)):
        for whose, each in zip(("stock", name), counts, strict=True):
            record_property(f"rank {rank}, {whose}", str(dict(each)))
    for theirs, each in zip(stock, ours, strict=True):
        assert each.total() <= theirs.total() + COUNTED, f"stock {dict(theirs)}, {name} {dict(each)}"
