"""Python's search for garbage, put off while a plan is made."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Look for no circles of garbage in the enclosed block, or decorated function. The program of a deep pipeline is
    hundreds of thousands of small values, all of them in use, and looking through them again and again takes as long as
    making them."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
