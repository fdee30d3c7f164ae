"""The first windows of a job end with a flush, and then the pipeline runs freely, from nothing in flight."""

from __future__ import annotations

import pytest

from .jobs import Job
from .test_oracle import FEEDBACK, check


@pytest.mark.parametrize(
    ("name", "stages", "size"), [("paci", 2, 2), ("paci", 4, 2), ("amdp", 4, 4), ("pipedream-2bw", 3, 3)]
)
def test_flushes_at_first(name: str, stages: int, size: int) -> None:
    check(Job({"name": name, **FEEDBACK, "flush_first": 3}, stages, size, "counting", optimizer="adamw"))


def test_what_was_forwarded_ahead_of_the_last_flush() -> None:
    """By a rank that waits for the weights of its guest, of its own stage: it is cancelled."""
    schedule = {"name": "amdp", "decisions": "meeting", "link_cost": 0.5, "flush_first": 2}
    check(Job(schedule, 4, 4, optimizer="adamw"))
