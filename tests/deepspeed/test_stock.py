"""``1f1b`` is stock DeepSpeed, bit for bit, whatever else the configuration asks for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .jobs import Job, assert_same, run
from .test_oracle import BF16, NON_REENTRANT, REENTRANT, WARMUP

ADAMW = {"optimizer": {"type": "AdamW", "params": {"lr": 0.02, "torch_adam": True, "fused": True}}}
ZERO = {"zero_optimization": {"stage": 1}}
CASES: dict[str, dict[str, Any]] = {
    "small window": {"size": 1},
    "long window": {"stages": 3, "size": 6, "optimizer": "adamw"},
    "four stages": {"stages": 4, "size": 4, "optimizer": "fused"},
    "several layers": {"layers_per_stage": 3, "size": 3},
    "optimizer of the configuration": {"optimizer": None, "config": ADAMW},
    "clipping": {"config": {"gradient_clipping": 0.05}},
    "clipping by default": {"stages": 3, "config": {"gradient_clipping": None}},
    "tuples with a mask": {"stages": 3, "kind": "masked"},
    "two paths": {"stages": 3, "kind": "two paths"},
    "reentrant recomputation": {"stages": 3, "config": REENTRANT},
    "recomputation": {"stages": 3, "config": NON_REENTRANT},
    "learning rates": {"config": {"scheduler": {"type": "WarmupDecayLR", "params": WARMUP}}},
    "seeds of layers": {"module": {"seed_layers": True}},
    "ZeRO-1": {"optimizer": "adamw", "config": ZERO},
    "ZeRO-1, clipping": {"config": {**ZERO, "gradient_clipping": 0.05}},
    "bf16": {"config": {"bf16": {"enabled": True}}},
    "bf16, ZeRO-1": {"config": {"bf16": {"enabled": True}, **ZERO}},
    "bf16, sums in fp32": {"stages": 3, "config": {**BF16, "gradient_clipping": 0.05}},
    "two replicas": {"replicas": 2, "config": {"gradient_clipping": 0.05}},
    "two replicas, ZeRO-1": {"replicas": 2, "optimizer": "adamw", "config": {**ZERO, "gradient_clipping": 0.05}},
    "two replicas, bf16, ZeRO-1": {"replicas": 2, "config": {"bf16": {"enabled": True}, **ZERO}},
    "two replicas, bf16, sums in fp32": {"replicas": 2, "config": BF16},
}


@pytest.mark.parametrize("case", CASES)
def test_1f1b_is_stock(case: str) -> None:
    """Weights, losses, learning rates and random states."""
    chosen = dict(CASES[case])
    if "bf16" in chosen.get("config", {}):
        chosen["dtype"] = torch.bfloat16
    job = Job("1f1b", **chosen)
    found, expected = run(job), run(job.stock)
    assert {result["engine"] for result in found} == {"ScheduledPipelineEngine"}
    assert {result["engine"] for result in expected} == {"PipelineEngine"}
    assert_same(found, expected)


@pytest.mark.parametrize("name", ["gpipe", "paci"])
def test_comparison_can_fail(name: str) -> None:
    """With the same job, gpipe is stock too, and paci is not."""
    job = Job(name, 2, 2, windows=3)
    found, expected = run(job), run(job.stock)
    if name == "gpipe":
        assert_same(found, expected)
    else:
        with pytest.raises(AssertionError):
            assert_same(found, expected)
