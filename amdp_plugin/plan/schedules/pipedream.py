"""PipeDream (arXiv 1806.03377, section 3.3): a micro-batch is forwarded and backwarded with the same weights."""

from ..placement import Placement
from ..schedule import Schedule


def pipedream(num_stages: int, micro_batches: int) -> Schedule:
    """In the order of PACI, with weight stashing: stage ``s`` keeps a version for each that is in flight, so that the
    gap is 0 everywhere, and gradients are as late as PACI's. As published, a window is one micro-batch."""
    in_flight = tuple(num_stages - stage for stage in range(num_stages))
    return Schedule(
        name="pipedream",
        placement=Placement.one_direction(num_stages),
        micro_batches=micro_batches,
        flush_every=0,
        in_flight=in_flight,
        max_gap=(0,) * num_stages,
        weights="stashed",
        weight_versions=tuple(1 + -(-(admitted - 1) // micro_batches) for admitted in in_flight),
    )
