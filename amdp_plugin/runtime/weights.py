"""Weights that change while graphs of earlier forwards are alive.

The delayed backward shall use the new weights for the input gradient (DESIGN.md, section 3: live updates).
Autograd refuses tensors that changed in place since they were saved; keeping their version counters
still, for just the optimizer step, lets it use their present values.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager

from torch import Tensor

from .torch_private import keep_versions


def live_update(parameters: Iterable[Tensor]) -> AbstractContextManager[None]:
    """A context for one optimizer step, in place, on parameters that live graphs have saved.

    Every backward of a graph built before it then uses the updated values. The context remembers the
    version counters it was made with: make a new one for every step.
    """
    return keep_versions(parameters)
