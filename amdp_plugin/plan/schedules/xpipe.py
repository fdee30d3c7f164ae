"""XPipe (arXiv 1911.04610): the weights of a whole window are predicted by its first micro-batch, the bellwether."""

from dataclasses import replace

from ..schedule import Schedule
from .spectrain import spectrain


def xpipe(num_stages: int, micro_batches: int) -> Schedule:
    """As SpecTrain, to the same instant, but for windows of several micro-batches: all forwards of a window use what
    was predicted at its first one. Its backwards come between two updates, so that one prediction is
    theirs, too. Published with Adam."""
    return replace(spectrain(num_stages, micro_batches), name="xpipe", weights="predicted_by_window")
