"""DeepSpeed engines compute with other weights than the latest, kept or extrapolated, as the serial oracle does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from .jobs import Job
from .test_oracle import MASTERS, check


@pytest.mark.parametrize(
    ("schedule", "stages", "size", "kind"),
    [
        ("pipedream", 2, 1, "plain"), ("pipedream", 4, 1, "masked"), ("pipedream", 3, 2, "recomputed"),
        ({"name": "pipedream", "vertical_sync": True}, 4, 1, "plain"),
        ({"name": "pipedream", "vertical_sync": True}, 3, 2, "masked"),
        ({"name": "pipedream", "decisions": "meeting"}, 3, 2, "plain"),
        ("pipedream-2bw", 2, 2, "plain"), ("pipedream-2bw", 4, 4, "masked"), ("pipedream-2bw", 3, 2, "recomputed"),
    ],
)  # fmt: skip
def test_versions_of_weights(schedule: Any, stages: int, size: int, kind: str) -> None:
    check(Job(schedule, stages, size, kind, optimizer="adamw"))


PIPEMARE = {"name": "pipemare", "correction_decay": 0.3, "rescale_steps": 4}


@pytest.mark.parametrize(
    ("schedule", "stages", "size", "kind"),
    [
        (PIPEMARE, 4, 1, "plain"), (PIPEMARE, 3, 2, "recomputed"), ({**PIPEMARE, "flush_first": 2}, 3, 2, "masked"),
        ("spectrain", 2, 1, "plain"), ("spectrain", 4, 2, "masked"),
        ("xpipe", 4, 1, "plain"), ("xpipe", 4, 4, "masked"), ({"name": "xpipe", "flush_first": 2}, 3, 2, "counting"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("optimizer", ["sgd", "fused"])
def test_extrapolated_weights(schedule: Any, stages: int, size: int, kind: str, optimizer: str) -> None:
    check(Job(schedule, stages, size, kind, optimizer=optimizer))


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("masters", ["bf16", "ZeRO-1"])
@pytest.mark.parametrize("schedule", [PIPEMARE, "spectrain", "xpipe"], ids=["pipemare", "spectrain", "xpipe"])
def test_extrapolated_masters(schedule: Any, masters: str, replicas: int) -> None:
    """They are moved, and copied into the weights; of two replicas each moves its part of them."""
    job = Job(schedule, 3, 2, optimizer="adamw", replicas=replicas, alike=True)
    job = replace(job, **MASTERS[masters])
    check(job, master_dtype=torch.float32 if masters == "bf16" else None)
