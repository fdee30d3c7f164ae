"""PipeMare (arXiv 1910.05124, section 3): the latest weights, smaller steps at first, and backwards that go back."""

from dataclasses import replace
from math import exp

from ..schedule import Schedule
from .paci import paci


def pipemare(
    num_stages: int, micro_batches: int, *, rescale_steps: int = 250, correction_decay: float = round(exp(-2), 3)
) -> Schedule:
    """In the order of PACI. T1 (section 3.1): a stage divides its learning rate by ``tau ** (1 - min(k / K, 1))`` at
    its update ``k``. T2 (section 3.2): its backwards use ``w - gap * delta``, ``delta`` a running mean of its updates.
    T3 (section 3.3) is ``flush_first``. See :mod:`..extrapolation` for how the plan's figures stand for the paper's.

    Args:
        rescale_steps: K of T1; 0 for no T1. The paper's rule is five times the warm-up of the learning rate: by default
            that of the warm-up of 50 updates in ``ds_configs/``.
        correction_decay: D of T2, what the mean still holds of an update after the stage's gap. By default the
            paper's 0.135, which is exp(-2), from its analysis of quadratics.
    """
    return replace(
        paci(num_stages, micro_batches),
        name="pipemare",
        weights="corrected",
        correction_decay=correction_decay,
        rescale_steps=rescale_steps,
        options={"rescale_steps": rescale_steps, "correction_decay": correction_decay},
    )
