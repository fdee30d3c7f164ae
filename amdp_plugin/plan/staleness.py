"""How late gradients are, before the run: what error feedback makes up for."""

from __future__ import annotations

from collections.abc import Mapping

from .planner import Planner
from .schedule import Schedule
from .versions import Version, versions


def mean_staleness(
    schedule: Schedule, found: Mapping[tuple[int, int], Version], windows: range
) -> tuple[float, ...]:
    """For every stage, by how many updates the gradients of ``windows`` are late, in the mean over their micro-batches.

    Args:
        found: the versions of every (stage, micro-batch) of a program that goes as far as ``windows``.
    """
    size = schedule.micro_batches
    micro_batches = range(windows.start * size, windows.stop * size)
    return tuple(
        sum(found[stage, micro_batch].staleness for micro_batch in micro_batches) / len(micro_batches)
        for stage in range(schedule.num_stages)
    )


def coefficient(schedule: Schedule, staleness: tuple[float, ...]) -> float | None:
    """What error feedback multiplies the last update of every stage with; ``None`` without it.

    A stage computes with ``x = z + coefficient * (z - z_before)``, where ``z`` is what its optimizer has made and
    ``z_before`` that of the update before (for a staleness of one, arXiv 2606.30634). It is the largest of
    ``staleness``, the same on every stage, since a gradient depends on the weights of all stages; for PACI that is
    ``(num_stages - 1) / micro_batches``.

    Args:
        staleness: of :func:`mean_staleness`.
    """
    return None if schedule.compensation == "none" else schedule.strength * max(staleness)


def planned_coefficient(planner: Planner) -> float | None:
    """:func:`coefficient` of the schedule and the program of ``planner``, in its steady state."""
    windows = planner.settled_windows()
    found = versions(planner.program(windows.stop))
    return coefficient(planner.schedule, mean_staleness(planner.schedule, found, windows))
