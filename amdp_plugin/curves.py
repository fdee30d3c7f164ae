"""Where curves of a loss come to."""

from __future__ import annotations

from collections.abc import Iterable


def reached(curve: Iterable[tuple[float, float]], target: float) -> float | None:
    """Where ``curve``, pairs of a place and a loss, first is as low as ``target``; straight between its points.

    ``None`` where it never is.
    """
    before: tuple[float, float] | None = None
    for place, loss in curve:
        if loss <= target:
            if before is None or before[1] <= loss:
                return place
            return before[0] + (place - before[0]) * (before[1] - target) / (before[1] - loss)
        before = (place, loss)
    return None
