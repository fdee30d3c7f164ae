"""Megatron's chunks compute with other weights than the latest, kept or extrapolated, as the serial oracle does."""

from __future__ import annotations

from typing import Any

import pytest

from .jobs import DISTRIBUTED, DROPOUT, Job
from .test_oracle import check


@pytest.mark.parametrize(
    ("schedule", "stages", "size"),
    [
        ("pipedream", 2, 1), ("pipedream", 4, 2), ("pipedream-2bw", 2, 2), ("pipedream-2bw", 4, 4),
        ("pipedream-2bw", 3, 2), ({"name": "pipedream", "vertical_sync": True}, 4, 1),
        ({"name": "pipedream", "decisions": "meeting"}, 3, 4),
        ({"name": "pipedream", "vertical_sync": True, "decisions": "meeting"}, 3, 3),
        ({"name": "pipedream", "vertical_sync": True}, 3, 2),
    ],
)  # fmt: skip
def test_versions_of_weights(schedule: Any, stages: int, size: int) -> None:
    check(Job(schedule, stages, size, model=DROPOUT), iterations=6)


PIPEMARE = {"name": "pipemare", "correction_decay": 0.3, "rescale_steps": 4}


@pytest.mark.parametrize(
    ("schedule", "stages", "size"),
    [
        (PIPEMARE, 4, 1), (PIPEMARE, 3, 2), ({**PIPEMARE, "flush_first": 2}, 3, 2), ("spectrain", 4, 1),
        ("spectrain", 3, 2), ("xpipe", 3, 1), ("xpipe", 4, 4), ({"name": "xpipe", "flush_first": 2}, 3, 2),
    ],
)  # fmt: skip
def test_extrapolated_weights(schedule: Any, stages: int, size: int) -> None:
    check(Job(schedule, stages, size, model=DROPOUT), iterations=6)


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("more", [{}, DISTRIBUTED], ids=["", "distributed optimizer"])
@pytest.mark.parametrize(
    ("schedule", "stages", "data"),
    [(PIPEMARE, 3, 1), ("spectrain", 3, 1), ("xpipe", 3, 1), ("xpipe", 2, 2), (PIPEMARE, 3, 2)],
)
def test_extrapolated_masters_and_parts(
    schedule: Any, stages: int, data: int, more: dict[str, Any], bf16: bool
) -> None:
    check(Job(schedule, stages, 2, data=data, alike=True, bf16=bf16, model=DROPOUT, **more))
