"""PACI (arXiv 2606.07881, section 3): 1F1B that never flushes; every stage updates itself."""

from ..placement import Placement
from ..schedule import Schedule


def paci(num_stages: int, micro_batches: int, *, extra_in_flight: int = 0, flush_every: int = 0) -> Schedule:
    """Stage ``s`` admits a forward while fewer than ``num_stages - s`` micro-batches are in flight, prefers
    a waiting backward, and steps its own optimizer after every ``micro_batches`` backwards.

    Args:
        extra_in_flight: micro-batches that every stage admits beyond that. They hide the latency of slow
            links, cost activation memory, and raise the largest gap.
        flush_every: windows after which the pipeline is emptied; no gap outlasts that. 0: never, 1: as 1F1B.
    """
    if extra_in_flight < 0:
        raise ValueError(f"paci: extra_in_flight cannot be negative, got {extra_in_flight}")
    in_flight = [num_stages - stage + extra_in_flight for stage in range(num_stages)]
    max_gap = [-(-(admitted - 1) // micro_batches) for admitted in in_flight]
    if flush_every:
        in_flight = [min(admitted, flush_every * micro_batches) for admitted in in_flight]
        max_gap = [min(gap, flush_every - 1) for gap in max_gap]
    return Schedule(
        name="paci",
        placement=Placement.one_direction(num_stages),
        micro_batches=micro_batches,
        flush_every=flush_every,
        in_flight=tuple(in_flight),
        max_gap=tuple(max_gap),
        options={"extra_in_flight": extra_in_flight, **({"flush_every": flush_every} if flush_every else {})},
    )
