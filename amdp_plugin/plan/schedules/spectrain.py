"""SpecTrain (arXiv 1809.02839, section 3.3): forwards and backwards with weights predicted from the momentum."""

from dataclasses import replace

from ..schedule import Schedule
from .paci import paci


def spectrain(num_stages: int, micro_batches: int) -> Schedule:
    """In the order of PACI; every forward and every backward uses the weights that its stage is going to have when the
    window is complete on stage 0, as far as the optimizer's smooth direction tells. As published, a window is one
    micro-batch: with backwards as long as forwards, stage ``s`` of ``N`` then looks ``N - 1 - s + floor(s / 2)``
    updates ahead in a forward and ``floor(s / 2)`` in a backward, as the authors do."""
    return replace(paci(num_stages, micro_batches), name="spectrain", weights="predicted", options={})
