"""1F1B with a flush (PipeDream-Flush, arXiv 2006.09503): what DeepSpeed and Megatron run."""

from ..placement import Placement
from ..schedule import Schedule


def one_f_one_b(num_stages: int, micro_batches: int) -> Schedule:
    """Stage ``s`` holds at most ``num_stages - s`` micro-batches in flight and waits for its update."""
    return Schedule(
        name="1f1b",
        placement=Placement.one_direction(num_stages),
        micro_batches=micro_batches,
        flush_every=1,
        in_flight=tuple(min(num_stages - stage, micro_batches) for stage in range(num_stages)),
        max_gap=(0,) * num_stages,
    )
