"""PACI (arXiv 2606.07881, section 3): 1F1B that never flushes; every stage updates itself."""

from ..placement import Placement
from ..schedule import Schedule


def paci(num_stages: int, micro_batches: int, *, extra_in_flight: int = 0) -> Schedule:
    """Stage ``s`` admits a forward while fewer than ``num_stages - s`` micro-batches are in flight, prefers
    a waiting backward, and steps its own optimizer after every ``micro_batches`` backwards.

    Args:
        extra_in_flight: micro-batches that every stage admits beyond that. They hide the latency of slow
            links, cost activation memory, and raise the largest gap.
    """
    if extra_in_flight < 0:
        raise ValueError(f"paci: extra_in_flight cannot be negative, got {extra_in_flight}")
    in_flight = tuple(num_stages - stage + extra_in_flight for stage in range(num_stages))
    return Schedule(
        name="paci",
        placement=Placement.one_direction(num_stages),
        micro_batches=micro_batches,
        flush=False,
        in_flight=in_flight,
        max_gap=tuple(-(-(admitted - 1) // micro_batches) for admitted in in_flight),
        options={"extra_in_flight": extra_in_flight},
    )
