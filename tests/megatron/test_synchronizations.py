"""How often hosts would wait for their GPUs, beside stock: once a window where a sum of gradients is told; never for
every micro-batch, nor for losses that another rank than the last reports, which come while the host goes on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests import devices
from tests.processes import run_ranks
from tests.synchronizations import Counts, Reads, assert_at_most_one_more

from .jobs import DROPOUT, Job
from .test_stock import HALF
from .training import Trainer

SUM = "decisions.py:tell"
LOCAL = {"name": "paci", "decisions": "local"}
STEADY: dict[str, Any] = {**HALF, "initial_loss_scale": 256.0}
FP16: dict[str, Any] = {"model": {**HALF, "pipeline_dtype": torch.float16}, "optimizer": STEADY}
LATEST, RELAYED = {"name": "paci", "decisions": "latest"}, {"name": "paci", "decisions": "relayed"}
pytestmark = pytest.mark.skipif(devices.on_gpu(), reason="tests/gpu counts what CUDA is asked for")


def count_reads(rank: int, job: Job) -> tuple[Counts, list[str]]:
    """What is counted, and where more may be asked than in stock."""
    with Reads() as reads:
        trainer = Trainer(rank, job)
        counts = reads.count(lambda: trainer.train(1))
    if job.schedule is None:
        return counts, []
    decides = job.clip and trainer.hook.pipeline.schedule.decisions != "local"
    return counts, [SUM] if decides else []


@pytest.mark.parametrize(
    "job",
    [
        Job("1f1b", micro_batches=8, model=DROPOUT),
        Job("paci", micro_batches=8, model=DROPOUT),
        Job("amdp", 4, 8, model=DROPOUT),
        Job(LOCAL, micro_batches=8, clip=0.05),
        Job(LATEST, micro_batches=8, clip=0.05),
        Job(RELAYED, micro_batches=8, clip=0.05, bf16=True),
        Job({**RELAYED, "compensation": "error_feedback"}, micro_batches=8, clip=0.05, tied=True),
        Job({"name": "amdp", "decisions": "latest"}, 4, 2, clip=0.05),
        Job(RELAYED, micro_batches=8, clip=0.05, **FP16),
        Job("paci", micro_batches=4, tensor=2),
        Job("xpipe", micro_batches=8),
    ],
    ids=[
        "1f1b", "paci", "amdp", "local", "latest", "relayed, bf16", "tied", "amdp, latest", "relayed, fp16",
        "tensor parallel", "xpipe",
    ],
)
def test_what_is_asked_of_a_device_beside_stock(job: Job) -> None:
    found, stock = run_ranks(job.world, count_reads, job), run_ranks(job.world, count_reads, job.stock)
    (ours, expected), (theirs, _) = zip(*found, strict=True), zip(*stock, strict=True)
    assert_at_most_one_more(list(ours), list(theirs), list(expected))
