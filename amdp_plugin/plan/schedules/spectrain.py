"""SpecTrain (arXiv 1809.02839): forwards and backwards with weights that are predicted from the momentum."""

from dataclasses import replace

from ..schedule import Schedule
from .paci import paci


def spectrain(num_stages: int, micro_batches: int) -> Schedule:
    """In the order of PACI; every forward and every backward uses the weights that its stage is going to have when the
    window is complete on stage 0, as far as the optimizer's smooth direction tells. As published, a window is one
    micro-batch: with backwards as long as forwards, stage ``s`` of ``N`` then looks ``N - 1 - s + floor(s / 2)``
    updates ahead in a forward and ``floor(s / 2)`` in a backward, as the authors' own code does, in its first version
    (github.com/ntueclab/SpecTrain-PyTorch)."""
    return replace(paci(num_stages, micro_batches), name="spectrain", weights="predicted", options={})
