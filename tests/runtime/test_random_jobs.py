"""Jobs drawn at random, on ranks whose messages occupy their devices, compute what the oracle says: what nobody thought
of combining."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from amdp_plugin.plan.devices import Provision

from ..processes import run_ranks
from .pipelines import Case, assert_equals_oracle, largest_gap, make_executor, oracle_of_parts, result, run_parts
from .rendezvous import Rendezvous
from .test_rendezvous import micro_batches, provision

FLUSHED, EXTRAPOLATING = ("1f1b", "gpipe", "chimera"), ("pipemare", "spectrain", "xpipe")
SEVERAL_DIRECTIONS = ("amdp", "chimera")
OWN_OPTIONS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "paci": {"extra_in_flight": st.integers(0, 3), "flush_every": st.sampled_from([0, 2, 3])},
    "pipedream": {"vertical_sync": st.booleans()},
}
CLIPPING = 0.01


@st.composite
def jobs(draw: st.DrawFn) -> Case:
    """A schedule with options, stages, and a size of windows that go together, and what is trained."""
    name = draw(st.sampled_from(["paci", "amdp", "pipedream", "pipedream-2bw", *FLUSHED, *EXTRAPOLATING]))
    stages = draw(st.sampled_from([2, 4])) if name in SEVERAL_DIRECTIONS else draw(st.integers(2, 5))
    size = draw(st.integers(1, 7))
    options = {key: draw(values) for key, values in OWN_OPTIONS.get(name, {}).items()}
    if name == "amdp":
        options["directions"] = draw(st.sampled_from([each for each in (1, stages // 2) if stages % each == 0]))
        options["preload"] = draw(st.integers(0, 2))
        size *= options["directions"]
    elif name == "chimera":
        size *= 2
    if name not in FLUSHED:
        options |= draw(common_options(name, stages, size))
    decides = options.get("decisions") in ("latest", "relayed")
    return Case(
        name, stages, size, draw(st.sampled_from(["plain", "tuples", "counting", "recomputed"])),
        draw(st.sampled_from(["sgd", "adamw", "fused"])), options=tuple(options.items()),
        stage_costs=tuple(draw(st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=stages, max_size=stages))),
        dynamic_shapes=draw(st.booleans()), clipping=CLIPPING if decides and draw(st.booleans()) else 0.0,
    )  # fmt: skip


@st.composite
def common_options(draw: st.DrawFn, name: str, stages: int, size: int) -> dict[str, Any]:
    """Of schedules that run freely."""
    relays = name == "paci" and size >= stages
    options = {"decisions": draw(st.sampled_from(["local", "latest", "meeting", *["relayed"] * relays]))}
    if draw(st.booleans()):
        options["flush_first"] = draw(st.integers(1, 4))
    if name not in EXTRAPOLATING and draw(st.booleans()):
        options |= {"compensation": "error_feedback", "strength": draw(st.sampled_from([0.5, 1.0]))}
    return options


def train(rank: int, case: Case, provided: Provision, parts: list[int]) -> dict[str, Any]:
    rendezvous = Rendezvous(case.stages)
    executor, worker = make_executor(rank, case, micro_batches(case), 60, rendezvous.transport, provided)
    rendezvous.synchronize_after_actions(executor)
    run_parts(executor, parts)
    return result(executor, worker)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(jobs(), st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_random_jobs_equal_the_oracle(case: Case, parts: list[int]) -> None:
    """In several parts, with nothing in flight between them."""
    found = run_ranks(case.stages, train, case, provision(case), parts)
    oracle = oracle_of_parts(case, parts, micro_batches(case))
    bound = max(oracle.schedule.max_gap)
    for rank, end in enumerate(found):
        # What is cancelled at the end of a part may have had a gap, too.
        used = largest_gap(oracle, rank)
        assert used <= end["gap"] <= max(bound, used)
        end["gap"] = used
    assert_equals_oracle(found, oracle)
