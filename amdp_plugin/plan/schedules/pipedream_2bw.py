"""PipeDream-2BW (arXiv 2006.09503, section 3.1): two versions of the weights, and a delay of one on every stage."""

from ..placement import Placement
from ..schedule import Schedule


def pipedream_2bw(num_stages: int, micro_batches: int) -> Schedule:
    """In the order of PACI; the micro-batches of window ``k`` use the weights before the update of window ``k - 1``, on
    all stages. With fewer micro-batches than stages a forward may have to wait for these weights."""
    return Schedule(
        name="pipedream-2bw",
        placement=Placement.one_direction(num_stages),
        micro_batches=micro_batches,
        flush_every=0,
        in_flight=tuple(num_stages - stage for stage in range(num_stages)),
        max_gap=(0,) * num_stages,
        weights="previous",
        weight_versions=(2,) * num_stages,
    )
