"""Schedules and costs to try, named and made by hand, in one direction and in several."""

from __future__ import annotations

from hypothesis import strategies as st

from amdp_plugin.plan import schedules
from amdp_plugin.plan.action import Action
from amdp_plugin.plan.costs import CostModel
from amdp_plugin.plan.placement import Placement
from amdp_plugin.plan.priorities import backward_first, forward_first
from amdp_plugin.plan.program import Program
from amdp_plugin.plan.schedule import Schedule

BIDIRECTIONAL = Placement(((0, 1, 2, 3), (3, 2, 1, 0)))
ROUND = Placement(((0, 1, 2), (1, 2, 0)))
"""Any two ranks share one stage, so that three of them can wait in a circle and no two disagree."""
ONE_HOME = Placement(((0, 0, 1), (1, 2, 0), (2, 1, 0)))
"""Rank 0 is the home of two stages with the same guests, which finish them in different orders."""
TWICE = Placement(((0, 2, 1, 2), (1, 2, 2, 1), (2, 2, 0, 1)))
"""Ranks run one stage in several directions, which share a sum of gradients there."""

TIMES = st.sampled_from([0.25, 0.5, 1.0, 1.5, 2.0, 2.5])
DELAYS = st.sampled_from([0.0, 0.1, 0.5])


def shifted_pairs(depth: int) -> Placement:
    """The placement of AMDP (arXiv 2605.29664): depth / 2 directions, every other one the mirror of the last."""
    return Placement(
        tuple(
            tuple((2 * j + i if j % 2 == 0 else 2 * (j - 1) + depth - 1 - i) % depth for i in range(depth))
            for j in range(depth // 2)
        )
    )


def by_micro_batch(action: Action, since: float) -> int:
    return action.index


def made(
    placement: Placement,
    micro_batches: int,
    *,
    flush: bool = False,
    flush_every: int | None = None,
    admitted: int = 2,
    update_delay: int = 0,
    together: bool = False,
    priority=by_micro_batch,
    max_gap: int = 99,
) -> Schedule:
    """A schedule made by hand that admits ``admitted`` micro-batches a direction."""
    stages, every = placement.num_stages, int(flush) if flush_every is None else flush_every
    return Schedule(
        name="made",
        placement=placement,
        micro_batches=micro_batches,
        flush_every=every,
        in_flight=tuple(min(admitted, stages - stage) for stage in range(stages)),
        max_gap=(every - 1 if every else max_gap,) * stages,
        priorities=(priority,),
        update_delay=(update_delay,) * stages,
        decisions="meeting" if together else "local",
    )


@st.composite
def named(draw) -> Schedule:
    """A schedule of one direction, by name."""
    name = draw(st.sampled_from(["paci", "1f1b", "gpipe", "pipedream", "pipedream-2bw", "xpipe"]))
    stages, micro_batches = draw(st.integers(1, 6)), draw(st.integers(1, 9))
    of_names = {
        "paci": {"extra_in_flight": st.integers(0, 4), "flush_every": st.integers(0, 3)},
        "pipedream": {"vertical_sync": st.booleans()},
    }
    options = {key: draw(values) for key, values in of_names.get(name, {}).items()}
    if name == "paci" and options["flush_every"] != 1:
        options["decisions"] = draw(st.sampled_from(["local", "latest", "relayed", "meeting"]))
    return schedules.make(name, stages, micro_batches, **options)


@st.composite
def several_directions(draw) -> Schedule:
    """A schedule of several directions, whose replicas reduce and update."""
    pairs = [shifted_pairs(depth) for depth in (4, 6, 8)]
    placement = draw(st.sampled_from([BIDIRECTIONAL, ROUND, ONE_HOME, TWICE, *pairs]))
    per_direction = draw(st.integers(1, 4))
    flush_every = draw(st.sampled_from([0, 0, 1, 2, 3]))
    return made(
        placement,
        per_direction * placement.directions,
        flush_every=flush_every,
        admitted=draw(st.integers(1, 4)),
        update_delay=0 if flush_every else draw(st.integers(0, per_direction)),
        together=draw(st.booleans()),
        priority=draw(st.sampled_from([backward_first, forward_first, by_micro_batch])),
    )


@st.composite
def delayed(draw) -> Schedule:
    """One direction whose updates stand later than their windows close."""
    return made(
        Placement.one_direction(draw(st.integers(1, 5))),
        draw(st.integers(1, 5)),
        admitted=draw(st.integers(1, 6)),
        update_delay=draw(st.integers(1, 8)),
        together=draw(st.booleans()),
    )


@st.composite
def costs_of(draw, schedule: Schedule) -> CostModel:
    """Uneven stages, updates that take time, slow links."""
    stages = schedule.num_stages
    if draw(st.booleans()):
        return CostModel.uniform(stages, link_latency=draw(DELAYS), update=draw(DELAYS))
    each = st.tuples(*[TIMES] * stages)
    return CostModel(draw(each), draw(each), draw(st.tuples(*[DELAYS] * stages)), draw(DELAYS))


@st.composite
def cases(draw) -> tuple[Schedule, CostModel]:
    """(schedule, costs), of any sort."""
    schedule = draw(st.one_of(named(), several_directions(), delayed()))
    return schedule, draw(costs_of(schedule))


def with_row(program: Program, rank: int, row) -> Program:
    """``program`` with another row for ``rank``."""
    rows = list(program.rows)
    rows[rank] = tuple(row)
    return Program(program.schedule, program.windows, tuple(rows))
