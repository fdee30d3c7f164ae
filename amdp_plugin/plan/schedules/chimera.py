"""Chimera (arXiv 2107.06925): two pipelines in opposite directions, and a flush."""

from ..placement import Placement
from ..priorities import backward_first, oldest_first
from ..schedule import Schedule


def chimera(num_stages: int, micro_batches: int) -> Schedule:
    """Every rank holds two stages, one early and one late; each direction takes half of the micro-batches.

    Raises:
        ValueError: for an odd number of stages or of micro-batches.
    """
    if num_stages % 2:
        raise ValueError(
            f"chimera: two mirrored directions need an even number of stages, got {num_stages}; 1f1b takes any number"
        )
    return Schedule(
        name="chimera",
        placement=Placement.complementary(num_stages, 2),
        micro_batches=micro_batches,
        flush_every=1,
        in_flight=tuple(min(num_stages - stage, max(1, micro_batches // 2)) for stage in range(num_stages)),
        max_gap=(0,) * num_stages,
        priorities=(backward_first, oldest_first),
        decisions="meeting",
        smaller=lambda stages: chimera(stages, max(1, round(micro_batches * stages / num_stages / 2)) * 2),
    )
