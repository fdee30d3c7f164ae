"""PipeDream (arXiv 1806.03377, section 3.3): a micro-batch is forwarded and backwarded with the same weights."""

from ..placement import Placement
from ..schedule import Schedule


def pipedream(num_stages: int, micro_batches: int, *, vertical_sync: bool = False) -> Schedule:
    """In the order of PACI, with weight stashing: stage ``s`` keeps a version for each that is in flight, so that the
    gap is 0 everywhere, and gradients are as late as PACI's. As published, a window is one micro-batch.

    Args:
        vertical_sync: all stages use that version which the micro-batch met on stage 0, so that its gradient is one of
            the whole model. Gradients are then as late on all stages as there, and all keep as many versions.
    """
    in_flight = tuple(num_stages - stage for stage in range(num_stages))
    behind = [num_stages - 1 if vertical_sync else admitted - 1 for admitted in in_flight]
    return Schedule(
        name="pipedream",
        placement=Placement.one_direction(num_stages),
        micro_batches=micro_batches,
        flush_every=0,
        in_flight=in_flight,
        max_gap=(0,) * num_stages,
        weights="synchronized" if vertical_sync else "stashed",
        weight_versions=tuple(1 + -(-late // micro_batches) for late in behind),
        options={"vertical_sync": True} if vertical_sync else {},
    )
