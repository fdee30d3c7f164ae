"""GPipe (arXiv 1811.06965): all forwards of a window, then all backwards, then a flush."""

from ..placement import Placement
from ..priorities import forward_first
from ..schedule import Schedule


def gpipe(num_stages: int, micro_batches: int) -> Schedule:
    """Every stage holds the whole window in flight, and no version ever differs."""
    return Schedule(
        name="gpipe",
        placement=Placement.one_direction(num_stages),
        micro_batches=micro_batches,
        flush_every=1,
        in_flight=(micro_batches,) * num_stages,
        max_gap=(0,) * num_stages,
        priorities=(forward_first,),
    )
