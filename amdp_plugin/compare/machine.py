"""The machine that a measurement was made on, and who else was using it."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import psutil


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def others_seconds() -> float | None:
    """Seconds that all cores of the machine have worked, without the work of this process and its ended children.

    ``None`` where the system's count covers more cores than this process may use. The difference between two calls
    is what others did meanwhile.
    """
    if psutil.cpu_count() != cores():
        return None
    system, own = psutil.cpu_times(), os.times()
    return system.user + system.system - own.user - own.system - own.children_user - own.children_system


def describe() -> dict[str, Any]:
    """What a reader of the figures wants to know."""
    return {
        "cores": cores(),
        "processor": platform.machine(),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "deepspeed", "megatron-core", "amdp_plugin")},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
