"""When actions run under a cost model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .action import KINDS, Action
from .costs import CostModel
from .graph import Graph

Span = tuple[int, int]
"""(start, end), in nanoseconds."""


def spans(graph: Graph, order: Iterable[int], costs: CostModel) -> Sequence[Span]:
    """The earliest span of every action of ``graph``, every rank keeping to its row.

    An update of a meeting begins one message after the last rank has entered; what went before was waiting.

    Args:
        order: in which each comes after what it needs, as :func:`.play` yields them.
    """
    schedule, link, stages = graph.schedule, costs.link_ticks(), range(costs.num_stages)
    work_of = {kind: [costs.action_ticks(Action(stage, kind, 0)) for stage in stages] for kind in KINDS}
    free_at = [0] * len(graph.numbers)
    found: list[Span] = [(0, 0)] * len(graph.places)
    met: dict[int, int] = {}

    def ready(number: int) -> int:
        time = free_at[graph.places[number][0]]
        for need in graph.needs[number]:  # of other ranks
            time = max(time, found[need][1] + link)
        return time

    for number in order:
        rank, action = graph.places[number]
        start = ready(number)
        if schedule.together and (meeting := graph.meeting(number)):
            # Here the first of them to go on finds the others where they wait.
            if action.index not in met:
                met[action.index] = max(map(ready, meeting)) + costs.meeting_ticks(schedule.num_ranks)
            start = max(start, met[action.index])
        work = work_of[action.kind][action.stage] if schedule.computes(rank, action) else 0
        found[number] = start, start + work
        free_at[rank] = start + work
    return found
