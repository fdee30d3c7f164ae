"""How often hosts would wait for their GPUs, beside stock: at most once a window, where a sum of gradients is told, or
else where the window ends and its loss is not there yet; never for every micro-batch."""

from __future__ import annotations

import pytest
import torch

from tests import devices
from tests.processes import run_ranks
from tests.synchronizations import Counts, Reads, assert_at_most_one_more

from .jobs import Job, make_engine, stream
from .test_oracle import BF16
from .tied_layers import make_tied_engine

LOSS, SUM = "engine.py:_aggregate_total_loss", "decisions.py:tell"
CLIPPED = {"gradient_clipping": 0.05}
ZERO = {"zero_optimization": {"stage": 1}}
pytestmark = pytest.mark.skipif(devices.on_gpu(), reason="tests/gpu counts what CUDA is asked for")


def count_reads(rank: int, job: Job, tied: bool) -> tuple[Counts, list[str]]:
    """What is counted, and where more may be asked than in stock."""
    with Reads() as reads:
        engine = make_tied_engine(rank, job) if tied else make_engine(rank, job)
        batches = stream(engine, job)
        counts = reads.count(lambda: engine.train_batch(batches))
    if job.schedule is None:
        return counts, []
    placement = engine.executor.schedule.placement
    # Where there are several directions, each ends some actions before the window does, and its loss comes meanwhile.
    ends = placement.directions == 1 and placement.ranks[0][-1] == rank
    return counts, [SUM] if job.config.get("gradient_clipping") else [LOSS] if ends else []


def decided(decisions: str, **more: str) -> dict[str, str]:
    return {"name": "paci", "decisions": decisions, **more}


@pytest.mark.parametrize(
    ("job", "tied"),
    [
        (Job("1f1b", 2, 8), False),
        (Job("paci", 2, 8), False),
        (Job("amdp", 4, 8), False),
        (Job(decided("latest"), 2, 8, config=CLIPPED), False),
        (Job(decided("relayed"), 2, 8, optimizer="adamw", config=CLIPPED), False),
        (Job(decided("relayed"), 2, 8, config={**BF16, **CLIPPED}, dtype=torch.bfloat16), False),
        (Job(decided("relayed"), 2, 8, optimizer="adamw", config={**ZERO, **CLIPPED}), False),
        (Job(decided("relayed", compensation="error_feedback"), 2, 8, config=CLIPPED), True),
        (Job({"name": "amdp", "decisions": "latest"}, 4, 2, config=CLIPPED), False),
        (Job("xpipe", 2, 8, optimizer="adamw"), False),
    ],
    ids=["1f1b", "paci", "amdp", "latest", "relayed", "relayed, bf16", "ZeRO-1", "tied", "amdp, latest", "xpipe"],
)
def test_what_is_asked_of_a_device_beside_stock(job: Job, tied: bool) -> None:
    found = run_ranks(job.stages, count_reads, job, tied)
    stock = run_ranks(job.stages, count_reads, job.stock, tied)
    (ours, expected), (theirs, _) = zip(*found, strict=True), zip(*stock, strict=True)
    assert_at_most_one_more(list(ours), list(theirs), list(expected))
