"""Every program that the planner generates obeys the laws, whatever the schedule and the costs."""

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amdp_plugin.plan import schedules
from amdp_plugin.plan.action import Action
from amdp_plugin.plan.costs import CostModel
from amdp_plugin.plan.laws import ProgramError
from amdp_plugin.plan.placement import Placement
from amdp_plugin.plan.planner import Planner
from amdp_plugin.plan.report import report
from amdp_plugin.plan.simulate import in_flight, simulate
from amdp_plugin.plan.verify import verify
from amdp_plugin.plan.versions import versions

from .strategies import BIDIRECTIONAL, ONE_HOME, TWICE, cases, made, named, shifted_pairs

SLOW = settings(deadline=None, max_examples=120)


@SLOW
@given(cases(), st.integers(1, 6))
def test_generated_programs_obey_the_laws(case, windows):
    schedule, costs = case
    verify(Planner(schedule, costs).program(windows))


@SLOW
@given(cases())
def test_windows_cover_every_action_once_and_in_turn(case):
    """Independent of ``verify``: what the rows hold, counted."""
    schedule, costs = case
    size, windows = schedule.micro_batches, 4
    program = Planner(schedule, costs).program(windows)
    counts = Counter(action for row in program.rows for action in row)
    for stage in range(schedule.num_stages):
        for micro_batch in range(windows * size):
            assert counts[Action(stage, "F", micro_batch)] == 1
            assert counts[Action(stage, "B", micro_batch)] == 1
    for rank, row in enumerate(program.rows):
        for stage in schedule.placement.stages[rank]:
            updates = [action.index for action in row if action.stage == stage and action.kind == "U"]
            assert updates == list(range(len(updates)))
            assert any(schedule.update_delay) or len(updates) == windows


@SLOW
@given(cases())
def test_two_schedulers_agree(case):
    schedule, costs = case
    first, second = Planner(schedule, costs), Planner(schedule, costs)
    second.window(7)
    assert [first.window(index) for index in range(8)] == [second.window(index) for index in range(8)]


class _Forgetful(dict):
    """Never recognizes a state, so that every window is simulated."""

    def setdefault(self, key, default=None):
        return default


@SLOW
@given(cases())
def test_repeated_windows_equal_simulated_ones(case):
    schedule, costs = case
    recognizing, simulating = Planner(schedule, costs), Planner(schedule, costs)
    simulating._states = _Forgetful()
    windows = 40
    assert [recognizing.window(index) for index in range(windows)] == [
        simulating.window(index) for index in range(windows)
    ]
    assert simulating.period is None


@pytest.mark.parametrize("stages,micro_batches", [(1, 1), (2, 1), (4, 4), (8, 8), (5, 3), (16, 4)])
@pytest.mark.parametrize("name", ["paci", "1f1b", "gpipe"])
def test_equal_stages_repeat_soon(name, stages, micro_batches):
    planner = Planner(schedules.make(name, stages, micro_batches))
    first, last = planner.steady_windows()
    assert planner.period == last - first == 1
    assert last <= stages + 3


@SLOW
@given(cases())
def test_in_flight_and_gap_stay_within_the_stated_bounds(case):
    """Independent of ``verify``: counted per direction and stage from the rows alone."""
    schedule, costs = case
    program = Planner(schedule, costs).program(5)
    flying: Counter = Counter()
    for rank, row in enumerate(program.rows):
        for stage, kind, index in row:
            lane = (rank, stage, index % schedule.placement.directions)
            flying[lane] += {"F": 1, "B": -1}.get(kind, 0)
            assert flying[lane] <= schedule.in_flight[stage]
    for (stage, _), version in versions(program).items():
        assert 0 <= version.gap <= min(schedule.max_gap[stage], version.staleness)
        assert not schedule.flush or version.staleness == 0


@SLOW
@given(named(), st.data())
def test_paci_gap_is_stated_exactly_for_any_costs(schedule, data):
    """The stated bound holds for uneven stages too, and nothing smaller would."""
    costs = CostModel(
        tuple(data.draw(st.sampled_from([0.5, 1.0, 3.0])) for _ in range(schedule.num_stages)),
        tuple(data.draw(st.sampled_from([0.5, 2.0, 5.0])) for _ in range(schedule.num_stages)),
        (0.0,) * schedule.num_stages,
    )
    found = versions(Planner(schedule, costs).program(8))
    assert all(version.gap <= schedule.max_gap[stage] for (stage, _), version in found.items())


@SLOW
@given(cases())
def test_times_respect_order_durations_and_messages(case):
    """Independent of ``play``: every time checked against the definition."""
    schedule, costs = case
    program = Planner(schedule, costs).program(3)
    timing = simulate(program, costs)
    times = {
        (rank, action): span
        for rank, row in enumerate(program.rows)
        for action, span in zip(row, timing.spans[rank], strict=True)
    }
    link = round(costs.link_latency * 1e9)
    seconds = {"F": costs.forward, "B": costs.backward, "U": costs.update, "R": (0.0,) * schedule.num_stages}
    for (rank, action), (start, end) in times.items():
        away = action.kind == "U" and rank != schedule.placement.ranks[0][action.stage]  # a guest receives weights
        assert end - start == (0 if away else round(seconds[action.kind][action.stage] * 1e9))
        target = schedule.message(rank, action)
        if target in times:
            assert times[target][0] >= end + link
    for spans in timing.spans:
        assert all(before[1] <= after[0] for before, after in pairwise(spans))


@SLOW
@given(cases())
def test_the_scheduler_starts_everything_when_it_can(case):
    """Its own clock, message arrivals included, agrees with the times worked out from the finished program.

    Ranks that share stages or meet may start later than they could, for the sake of one order, and never earlier.
    """
    schedule, costs = case
    planner = Planner(schedule, costs)
    planner._states = _Forgetful()
    list_scheduler, started = planner._list_scheduler, {}
    run = list_scheduler._run

    def noted(rank, action, start):
        started[rank, action] = start
        run(rank, action, start)

    list_scheduler._run = noted
    program = planner.program(4)
    timing = simulate(program, costs)
    for rank, row in enumerate(program.rows):
        for action, (begin, _) in zip(row, timing.spans[rank], strict=True):
            assert started[rank, action] >= begin
            assert schedule.reduces or schedule.together or started[rank, action] == begin


@SLOW
@given(cases())
def test_a_stage_forwards_beyond_a_flush_after_its_update_and_else_does_not_wait(case):
    """Independent of ``Schedule``: what is in flight never belongs to windows on both sides of a flush."""
    schedule, costs = case
    planner = Planner(schedule, costs)
    every = schedule.flush_every
    for row in planner.program(7).rows:
        flying: dict[int, set[int]] = {stage: set() for stage in range(schedule.num_stages)}
        for stage, kind, index in row:
            window = index // schedule.micro_batches
            if kind == "F":
                flying[stage].add(index)
                if every:
                    done = {micro_batch // schedule.micro_batches // every for micro_batch in flying[stage]}
                    assert done == {window // every}
            elif kind == "B":
                flying[stage].remove(index)
    planner.steady_windows()
    assert planner.period is None or planner.period % (every or 1) == 0


@pytest.mark.parametrize("every", [1, 2, 3, 4])
def test_windows_between_two_flushes_flow(every):
    """The bubble of a flush is paid once in ``every`` windows, and no gap outlasts it."""
    stages, size = 4, 4
    planner = Planner(schedules.make("paci", stages, size, flush_every=every))
    found = report(planner, 1)
    assert found.forwards_per_window == pytest.approx(3 * (size + (stages - 1) / every))
    assert planner.period == every
    assert found.max_version_gap == found.max_version_gap_stated == min(every - 1, 1)
    if every == 1:
        assert planner.program(3).rows == Planner(schedules.make("1f1b", stages, size)).program(3).rows


def sided(action: Action, since: float) -> tuple[int, ...]:
    """Always the last direction, if it has anything at all to do."""
    return (-(action.index % 3), action.index)


@pytest.mark.parametrize("placement", [Placement(((0,),) * 3), TWICE])
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("delay", [0, 1, 2])
def test_a_priority_that_would_starve_a_direction_cannot(placement, together, delay):
    """Directions that share a sum of gradients finish a window before any of them adds to the next."""
    schedule = made(placement, 6, admitted=4, priority=sided, together=together, update_delay=delay)
    program = Planner(schedule).program(5)
    verify(program)
    for row in program.rows:
        for stage in range(placement.num_stages):
            windows = [action.window(6) for action in row if action.stage == stage and action.kind == "B"]
            assert windows == sorted(windows)


def test_ranks_that_cannot_go_on_are_named_with_the_grid():
    """No schedule is known that gets there, so the counts are bent."""
    planner = Planner(schedules.make("paci", 2, 2))
    planner._list_scheduler.lanes[0][1].in_flight = 0
    with pytest.raises(ProgramError) as caught:
        planner.program(1)
    message, *grid = str(caught.value).splitlines()
    assert caught.value.law == 3
    assert "breaks law 3 (progress: no rank waits for ever" in message
    assert "rank 1 has nothing that it may start, in its window 0, nor has any other" in message
    assert [line.split() for line in grid[1:]] == [["rank", "0", "0F0", "0F1"], ["rank", "1", "[end]"]]


def test_in_flight_counts_forwards_not_yet_backwarded():
    program = Planner(schedules.make("paci", 2, 2)).program(1)
    assert [str(action) for action in program.rows[0]] == ["0F0", "0F1", "0B0", "0F2", "0B1", "0U0"]
    assert in_flight(program, 0) == [1, 2, 1, 2, 1, 1]


@pytest.mark.parametrize("placement", [BIDIRECTIONAL, shifted_pairs(4), shifted_pairs(8)])
@pytest.mark.parametrize("flush", [False, True])
def test_replicas_reduce_then_the_home_updates_then_the_guests(placement, flush):
    schedule = made(placement, 2 * placement.directions, flush=flush)
    costs = CostModel.uniform(placement.num_stages, link_latency=0.1, update=0.5)
    program = Planner(schedule, costs).program(3)
    verify(program)
    times = {
        (rank, action): span
        for rank, row in enumerate(program.rows)
        for action, span in zip(row, simulate(program, costs).spans[rank], strict=True)
    }
    for stage, (home, *guests) in enumerate(placement.holders):
        assert guests
        for window in range(3):
            gathered, update = times[home, Action(stage, "R", window)], times[home, Action(stage, "U", window)]
            assert gathered[1] <= update[0]
            for guest in guests:
                assert times[guest, Action(stage, "R", window)][1] + 100_000_000 <= gathered[0]
                assert times[guest, Action(stage, "U", window)][0] >= update[1] + 100_000_000


def test_guests_of_two_stages_of_one_home_send_in_one_order():
    """Rank 1 finishes stage 0 first, and rank 2 stage 1."""
    schedule = made(ONE_HOME, 3, flush=True, priority=lambda action, since: action.index % 3)
    program = Planner(schedule).program(2)
    verify(program)
    for rank in (1, 2):
        sent = [action.stage for action in program.rows[rank] if action.kind == "R" and action.stage < 2]
        assert sent == [0, 1, 0, 1]
    ends = [[action.stage for action in program.rows[rank] if action.kind == "B"][:2] for rank in (1, 2)]
    assert ends[0] != ends[1]


def test_a_guest_sends_its_gradients_without_waiting_for_anyone():
    """Right behind its own last backward of the window, also where the home still has many."""
    schedule = made(BIDIRECTIONAL, 8, flush=True)
    costs = CostModel((1.0, 1.0, 1.0, 3.0), (2.0, 2.0, 2.0, 9.0), (0.0,) * 4)
    program = Planner(schedule, costs).program(1)
    spans = simulate(program, costs).spans
    for stage, (_, *guests) in enumerate(schedule.placement.holders):
        for guest in guests:
            own = [action for action in program.rows[guest] if action.stage == stage]
            last = [action.kind for action in own].index("R") - 1
            assert own[last].kind == "B" and all(action.kind == "U" for action in own[last + 2 :])
            ends = dict(zip(program.rows[guest], spans[guest], strict=True))
            assert ends[own[last + 1]][1] == ends[own[last]][1]


@pytest.mark.parametrize("placement", [Placement.one_direction(4), BIDIRECTIONAL, ONE_HOME, shifted_pairs(8)])
@pytest.mark.parametrize("flush", [False, True])
def test_homes_update_together_once_all_have_entered(placement, flush):
    """All begin at one instant, a message after the last has entered, and a rank does nothing in between."""
    schedule = made(placement, 2 * placement.directions, flush=flush, together=True)
    stages = placement.num_stages
    costs = CostModel.uniform(stages, link_latency=0.1)
    program = Planner(schedule, costs).program(3)
    verify(program)
    spans = simulate(program, costs).spans
    gathering = "BR"[schedule.reduces]
    for window in range(3):
        entered, begun, gathered = [], [], []
        for stage in range(stages):
            rank = placement.home(stage)
            row = program.rows[rank]
            at = row.index(Action(stage, "U", window))
            begun.append(spans[rank][at][0])
            entered.append(spans[rank][at - 1][1])
            own = [at for at, action in enumerate(row) if action.stage == stage and action.kind == gathering]
            gathered += [spans[rank][at][1] for at in own if row[at].window(schedule.micro_batches) == window]
        assert len(set(begun)) == 1
        assert begun[0] >= max(gathered) + 100_000_000
        if placement != ONE_HOME:
            assert begun[0] == max(*entered, *gathered) + 100_000_000


def test_nobody_makes_others_wait_for_a_meeting():
    """It begins two messages after the window's last backward: the gradients go home, and the word goes round."""
    costs = CostModel.uniform(8, link_latency=0.1)
    program = Planner(made(shifted_pairs(8), 32, admitted=3, together=True), costs).program(5)
    timing = simulate(program, costs)
    for window in range(5):
        begun = dict(zip(program.rows[0], timing.spans[0], strict=True))[Action(0, "U", window)][0]
        assert begun == timing.window_end(window) + 200_000_000


@pytest.mark.parametrize("placement", [Placement.one_direction(3), BIDIRECTIONAL, shifted_pairs(6)])
@pytest.mark.parametrize("delay", [1, 2, 3])
def test_a_delayed_update_stands_at_most_that_many_backwards_later(placement, delay):
    schedule = made(placement, 4 * placement.directions, admitted=3, update_delay=delay, together=True)
    costs = CostModel.uniform(placement.num_stages, link_latency=0.5)
    program = Planner(schedule, costs).program(4)
    verify(program)
    later = []
    for rank, row in enumerate(program.rows):
        for stage in placement.stages[rank]:
            own = [action for action in row if action.stage == stage]
            per_window = schedule.backwards_per_window(rank, stage)
            for window in range(3):
                before = own[: own.index(Action(stage, "U", window))]
                done = sum(action.kind == "B" for action in before)
                later.append(done - (window + 1) * per_window)
    assert min(later) >= 0
    assert 1 <= max(later) <= delay


def test_a_shared_stage_updates_at_most_one_window_late():
    with pytest.raises(ValueError, match="at most one window late, so update_delay is at most 2, got 3"):
        made(BIDIRECTIONAL, 4, update_delay=3)


def test_the_scheduler_plans_with_the_links():
    """While the first backward is still under way, the first rank goes on with what it may have in flight."""
    schedule = schedules.make("paci", 2, 8, extra_in_flight=4)
    first = {
        link: [action.kind for action in Planner(schedule, CostModel.uniform(2, link_latency=link)).window(0)[0]]
        for link in (0.0, 3.0)
    }
    assert first[0.0].index("B") == 4
    assert first[3.0].index("B") == 6


def test_a_message_takes_the_latency_and_the_time_of_its_bytes():
    costs = CostModel((1.0,), (1.0,), (0.0,), link_latency=0.1, message_bytes=100, link_bandwidth=1000)
    assert costs.link_ticks() == 200_000_000


def test_costs_of_another_depth_are_refused():
    with pytest.raises(ValueError, match="costs of 3 stages for a schedule of 4"):
        Planner(schedules.make("paci", 4, 4), CostModel.uniform(3))


@pytest.mark.parametrize(
    "change,message",
    [
        ({"forward": (0.0, 1.0)}, "that of stage 0 takes 0"),
        ({"backward": (1.0, float("inf"))}, "that of stage 1 takes inf"),
        ({"update": (0.0, -1.0)}, "cannot be negative"),
        ({"link_latency": float("nan")}, "finite"),
        ({"link_latency": 1e300}, "a message takes at most"),
        ({"link_bandwidth": 0.0}, "must be positive"),
        ({"update": (0.0,)}, "one entry a stage; got 2, 2 and 1"),
    ],
)
def test_costs_that_make_no_sense_are_refused(change, message):
    good = {"forward": (1.0, 1.0), "backward": (2.0, 2.0), "update": (0.0, 0.0)}
    with pytest.raises(ValueError, match=message):
        CostModel(**{**good, **change})
