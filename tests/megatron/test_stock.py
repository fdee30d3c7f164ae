"""``1f1b`` through the hook is stock Megatron, bit for bit, whatever else the job asks for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .jobs import DISTRIBUTED, DROPOUT, Job
from .training import assert_same, run

FULL: dict[str, Any] = {
    "recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1
}  # fmt: skip
SELECTIVE: dict[str, Any] = {"recompute_granularity": "selective"}
OVERLAP = {"overlap_grad_reduce": True}
SEQUENCE_PARALLEL = {"sequence_parallel": True}
HALF = {"fp16": True, "params_dtype": torch.float16}
FP16: dict[str, Any] = {
    "model": {**HALF, "pipeline_dtype": torch.float16},
    "optimizer": {**HALF, "initial_loss_scale": 2.0**20, "min_loss_scale": 1.0, "hysteresis": 1},
}
CASES: dict[str, dict[str, Any]] = {
    "two stages": {},
    "four stages": {"pipeline": 4},
    "window of one": {"micro_batches": 1},
    "long window": {"pipeline": 3, "micro_batches": 7},
    "no clipping": {"clip": 0.0},
    "dropout": {"model": {**DROPOUT, "attention_dropout": 0.1}},
    "tensor parallel": {"tensor": 2, "model": {**DROPOUT, "attention_dropout": 0.1}},
    "sequence parallel": {"tensor": 2, "model": {**DROPOUT, **SEQUENCE_PARALLEL}},
    "data parallel": {"data": 2},
    "distributed optimizer": {"data": 2, **DISTRIBUTED},
    "distributed optimizer, alone": {**DISTRIBUTED},
    "overlapped reduction": {"data": 2, "ddp": OVERLAP},
    "distributed optimizer, overlapped reduction": {**DISTRIBUTED, "data": 2, "ddp": {**DISTRIBUTED["ddp"], **OVERLAP}},
    "bf16": {"bf16": True},
    "bf16, distributed optimizer": {"bf16": True, "data": 2, **DISTRIBUTED},
    "bf16, sums in bf16": {"bf16": True, "ddp": {"grad_reduce_in_fp32": False}},
    "fp16": FP16,
    "full recomputation": {"model": {**DROPOUT, **FULL}},
    "selective recomputation": {"model": {**DROPOUT, **SELECTIVE}},
    "tied embeddings": {"tied": True},
    "outputs kept": {"model": {"deallocate_pipeline_outputs": False}},
}


@pytest.mark.parametrize("case", CASES)
def test_1f1b_is_stock(case: str) -> None:
    """Weights, losses of all micro-batches, norms of gradients and random states."""
    job = Job("1f1b", **{"clip": 0.5, **CASES[case]})
    found, expected = run(job), run(job.stock)
    assert_same(found, expected)
    made = [norm for norm in expected[0]["norms"] if norm is not None]
    assert made[0] > job.clip, "the case must clip"
    assert (len(made) < 4) == (case == "fp16"), "a loss scale that is too high skips updates"


@pytest.mark.parametrize("name", ["gpipe", "paci"])
def test_comparison_can_fail(name: str) -> None:
    """With the same job, gpipe is stock too, and paci is not."""
    job = Job(name, micro_batches=2)
    found, expected = run(job), run(job.stock)
    if name == "gpipe":
        assert_same(found, expected)
    else:
        with pytest.raises(AssertionError, match="rank 0"):
            assert_same(found, expected)
