"""Orders in which a rank starts what it could start."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .action import BACKWARD, FORWARD, Action

Priority = Callable[[Action, float], tuple[Any, ...]]
"""Orders what a rank could start now, the least first. Takes the action, and the instant since which it could
be started, in mean forwards of a stage."""


def backward_first(action: Action, since: float) -> tuple[int, int]:
    """A waiting backward before a forward, then the oldest micro-batch."""
    return (action.kind != BACKWARD, action.index)


def forward_first(action: Action, since: float) -> tuple[int, int]:
    """A waiting forward before a backward, then the oldest micro-batch."""
    return (action.kind != FORWARD, action.index)


def oldest_first(action: Action, since: float) -> tuple[int, int]:
    """The oldest micro-batch, then its backward."""
    return (action.index, action.kind != BACKWARD)
