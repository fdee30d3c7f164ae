"""One list scheduler for the whole family: windows of actions, on demand, for ever.

A rank that falls free starts the ready action that its schedule prefers. The simulation runs in
integer nanoseconds and breaks every tie the same way, so all ranks that hold the same schedule and
costs generate the same program. As soon as the state at the end of a window repeats, up to a shift in
time and in micro-batches, the windows between repeat for ever and are no longer computed.
"""

from __future__ import annotations

import heapq
from collections import deque

from .action import BACKWARD, FORWARD, REDUCE, UPDATE, Action
from .costs import CostModel
from .program import Program, Row
from .schedule import Schedule

Window = tuple[Row, ...]
Message = tuple[int, int]


class Scheduler:
    """Yields the windows of ``schedule`` under ``costs`` (equal stages, backward = 2 forwards, by default).

    ``window(k)[rank]`` is what that rank executes from the end of its window ``k - 1`` to the end of its
    window ``k``: its last backward of the window and the updates that are due by then. What a rank does in
    window ``k`` needs nothing that another does in a later window, so a run may end with any window.

    Raises:
        ValueError: when ``costs`` are of another number of stages.
    """

    def __init__(self, schedule: Schedule, costs: CostModel | None = None) -> None:
        self.schedule = schedule
        self.costs = costs or CostModel.uniform(schedule.num_stages)
        if self.costs.num_stages != schedule.num_stages:
            raise ValueError(f"costs of {self.costs.num_stages} stages for a schedule of {schedule.num_stages}")
        self.period: int | None = None
        """Windows after which the program repeats; ``None`` until that is known."""
        self._windows: list[Window] = []
        self._states: dict[object, int] = {}
        self._simulation = _Simulation(schedule, self.costs)

    def row(self, index: int, rank: int) -> Row:
        """What ``rank`` does in window ``index``."""
        while index >= len(self._windows) and self.period is None:
            self._generate()
        if index < len(self._windows):
            return self._windows[index][rank]
        assert self.period is not None
        shift = -(-(index + 1 - len(self._windows)) // self.period) * self.period
        row, micro_batches = self._windows[index - shift][rank], self.schedule.micro_batches
        return tuple(action.shifted(shift, micro_batches) for action in row)

    def window(self, index: int) -> Window:
        """The actions of window ``index``, one row a rank."""
        return tuple(self.row(index, rank) for rank in range(self.schedule.num_ranks))

    def program(self, windows: int) -> Program:
        """The first ``windows`` windows as one value."""
        parts = [self.window(index) for index in range(windows)]
        rows = (tuple(action for part in parts for action in part[rank]) for rank in range(self.schedule.num_ranks))
        return Program(self.schedule, windows, tuple(rows))

    def steady_windows(self, limit: int = 512) -> tuple[int, int]:
        """(first, last + 1) of the windows that repeat for ever.

        Where none was seen to repeat within ``limit`` windows, the later half of those.
        """
        while self.period is None and len(self._windows) < limit:
            self._generate()
        count = len(self._windows)
        return (count - self.period, count) if self.period else (count // 2, count)

    def _generate(self) -> None:
        index = len(self._windows)
        self._windows.append(self._simulation.run_window())
        state = self._simulation.state(index + 1)
        first = self._states.setdefault(state, index)
        if first != index:
            self.period = index - first
            self._states.clear()


class _Holding:
    """A stage on one of the ranks that hold it: how far its windows have come."""

    def __init__(self, schedule: Schedule, rank: int, stage: int) -> None:
        self.rank, self.stage = rank, stage
        self.per_window = schedule.backwards_per_window(rank, stage)
        self.delay = schedule.update_delay
        self.late = schedule.windows_late(rank, stage)
        self.backwards = self.updates = 0

    @property
    def may_backward(self) -> bool:
        """Whether another gradient may be accumulated before the update that is due (law 4)."""
        return self.backwards < (self.updates + 1) * self.per_window + self.delay

    @property
    def due(self) -> int | None:
        """The window whose update became due with the latest backward."""
        window, rest = divmod(self.backwards - self.delay, self.per_window)
        return window - 1 if rest == 0 and window > 0 else None

    def state(self, window: int) -> tuple[int, int]:
        return self.backwards - window * self.per_window, self.updates - window


class _Lane:
    """One direction's stage on its rank: its micro-batches so far, and the messages that wait or are under way.

    A message is (nanosecond of its arrival, window in which its sender sent it).
    """

    def __init__(self, direction: int, holding: _Holding) -> None:
        self.direction, self.holding = direction, holding
        self.forwards = self.backwards = 0
        self.forward_arrivals: deque[Message] = deque()
        self.backward_arrivals: deque[Message] = deque()

    def state(self, window: int, done: int, now: int) -> tuple[object, ...]:
        waiting = (self.forward_arrivals, self.backward_arrivals)
        messages = (tuple((max(0, time - now), sent - window) for time, sent in arrivals) for arrivals in waiting)
        return self.forwards - done, self.backwards - done, *messages


class _Simulation:
    """All ranks at work: a heap of the instants at which a rank may have something to start."""

    def __init__(self, schedule: Schedule, costs: CostModel) -> None:
        self.schedule, self.link = schedule, costs.link_ticks()
        stages, ranks = range(schedule.num_stages), range(schedule.num_ranks)
        self.ticks = {
            kind: [costs.action_ticks(Action(stage, kind, 0)) for stage in stages]
            for kind in (FORWARD, BACKWARD, REDUCE, UPDATE)
        }
        self.holdings = [
            {stage: _Holding(schedule, rank, stage) for stage in schedule.placement.stages[rank]} for rank in ranks
        ]
        self.lanes = [
            [_Lane(direction, self.holdings[rank][stage]) for stage, rank in enumerate(row)]
            for direction, row in enumerate(schedule.placement.ranks)
        ]
        self.lanes_of = [[lane for row in self.lanes for lane in row if lane.holding.rank == rank] for rank in ranks]
        self.rows: list[list[Action]] = [[] for _ in ranks]
        self.window_ends: list[deque[int]] = [deque() for _ in ranks]
        self.closed = [0 for _ in ranks]
        self.free_at = [0 for _ in ranks]
        self.queues: list[deque[Action]] = [deque() for _ in ranks]
        self.opened: dict[tuple[int, Action], int] = {}
        self.arrived: dict[Action, list[int]] = {}
        self.events = [(0, rank) for rank in ranks]
        self.now = self.last_rank = 0

    def run_window(self) -> Window:
        """Simulate until every rank has closed one more window; return that window."""
        while not all(self.window_ends):
            if not self.events:
                raise ValueError(f"{self.schedule.name}: no rank can go on; its in-flight limits deadlock")
            self.now, rank = heapq.heappop(self.events)
            if self.free_at[rank] <= self.now:
                action = self._choose(rank)
                if action is not None:
                    self.last_rank = rank
                    self._start(rank, action)
        window = []
        for rank, row in enumerate(self.rows):
            end = self.window_ends[rank].popleft()
            window.append(tuple(row[:end]))
            self.rows[rank] = row[end:]
            self.window_ends[rank] = deque(later - end for later in self.window_ends[rank])
        return tuple(window)

    def state(self, window: int) -> object:
        """Everything that the future depends on, with time and micro-batches counted from now."""
        now, micro_batches = self.now, self.schedule.micro_batches
        done = window * micro_batches // self.schedule.placement.directions
        return (
            self.last_rank,
            tuple(max(0, time - now) for time in self.free_at),
            tuple(closed - window for closed in self.closed),
            tuple(lane.state(window, done, now) for row in self.lanes for lane in row),
            tuple(holding.state(window) for holdings in self.holdings for holding in holdings.values()),
            tuple(tuple(action.shifted(-window, micro_batches) for action in row) for row in self.rows),
            tuple(tuple(action.shifted(-window, micro_batches) for action in queue) for queue in self.queues),
            frozenset(
                (rank, action.shifted(-window, micro_batches), max(0, time - now))
                for (rank, action), time in self.opened.items()
            ),
            frozenset(
                (action.shifted(-window, micro_batches), len(times), max(0, max(times) - now))
                for action, times in self.arrived.items()
            ),
        )

    def _choose(self, rank: int) -> Action | None:
        """What ``rank`` starts now: an update or reduction that is due, else what the schedule prefers."""
        due = min(self.queues[rank], key=lambda action: action.index, default=None)
        if due is not None and self._may_enter(rank, due):
            return due
        ready = [action for lane in self.lanes_of[rank] for action in self._ready(lane)]
        return min(ready, key=self.schedule.priority) if len(ready) > 1 else (ready[0] if ready else None)

    def _may_enter(self, rank: int, action: Action) -> bool:
        """Whether ``rank`` may start a reduction or update: in the window that it belongs to, once it is open."""
        window = action.index + self.holdings[rank][action.stage].late
        return self.closed[rank] >= window and self.opened.get((rank, action), self.now + 1) <= self.now

    def _has_arrived(self, lane: _Lane, messages: deque[Message]) -> bool:
        """Whether ``lane`` may use its next message: not before the window in which it was sent."""
        return bool(messages) and messages[0][0] <= self.now and messages[0][1] <= self.closed[lane.holding.rank]

    def _ready(self, lane: _Lane) -> list[Action]:
        stage, directions, ready = lane.holding.stage, self.schedule.placement.directions, []
        if self._has_arrived(lane, lane.backward_arrivals) and lane.holding.may_backward:
            ready.append(Action(stage, BACKWARD, lane.direction + directions * lane.backwards))
        admits = lane.forwards - lane.backwards < self.schedule.in_flight[stage]
        if admits and (stage == 0 or self._has_arrived(lane, lane.forward_arrivals)):
            micro_batch = lane.direction + directions * lane.forwards
            if not self.schedule.flush or micro_batch // self.schedule.micro_batches <= lane.holding.updates:
                ready.append(Action(stage, FORWARD, micro_batch))
        return ready

    def _start(self, rank: int, action: Action) -> None:
        finish = self.now + self.ticks[action.kind][action.stage]
        self.rows[rank].append(action)
        self.free_at[rank] = finish
        heapq.heappush(self.events, (finish, rank))
        if action.kind == FORWARD:
            self._forward(rank, action, finish)
        elif action.kind == BACKWARD:
            self._backward(rank, action, finish)
        else:
            self.queues[rank].remove(action)
            del self.opened[rank, action]
            if action.kind == REDUCE:
                self._reduce(rank, action, finish)
            else:
                self._update(rank, action, finish)
        self._close(rank)

    def _lane(self, stage: int, micro_batch: int) -> _Lane:
        return self.lanes[micro_batch % self.schedule.placement.directions][stage]

    def _forward(self, rank: int, action: Action, finish: int) -> None:
        lane = self._lane(action.stage, action.index)
        lane.forwards += 1
        if action.stage > 0:
            lane.forward_arrivals.popleft()
        if action.stage < self.schedule.num_stages - 1:
            below = self._lane(action.stage + 1, action.index)
            self._send(rank, below, below.forward_arrivals, finish)
        else:
            self._send(rank, lane, lane.backward_arrivals, finish)

    def _backward(self, rank: int, action: Action, finish: int) -> None:
        lane = self._lane(action.stage, action.index)
        lane.backwards += 1
        lane.backward_arrivals.popleft()
        if action.stage > 0:
            above = self._lane(action.stage - 1, action.index)
            self._send(rank, above, above.backward_arrivals, finish)
        lane.holding.backwards += 1
        window = lane.holding.due
        if window is not None:
            shared = len(self.schedule.placement.holders[action.stage]) > 1
            self._arrive(Action(action.stage, REDUCE if shared else UPDATE, window), finish)

    def _reduce(self, rank: int, action: Action, finish: int) -> None:
        home = self.schedule.placement.home(action.stage)
        self._arrive(action._replace(kind=UPDATE), self._arrival(rank, home, finish))

    def _update(self, rank: int, action: Action, finish: int) -> None:
        self.holdings[rank][action.stage].updates += 1
        home, *guests = self.schedule.placement.holders[action.stage]
        if rank == home:
            for guest in guests:
                self._open(guest, action, self._arrival(rank, guest, finish))

    def _arrive(self, action: Action, time: int) -> None:
        """Note that one more holder of the stage has done, at ``time``, what ``action`` waits for.

        With the last of them the action joins the queues of all holders. They take from their queues window by
        window, in the order of joining, so that any two meet in the same collectives in one order (law 3).
        """
        holders = self.schedule.placement.holders[action.stage]
        times = self.arrived.setdefault(action, [])
        times.append(time)
        if len(times) == len(holders):
            del self.arrived[action]
            for holder in holders:
                self.queues[holder].append(action)
            for holder in holders if action.kind == REDUCE else holders[:1]:
                self._open(holder, action, max(times))

    def _open(self, rank: int, action: Action, time: int) -> None:
        """Let ``rank`` start a reduction or update from ``time`` on."""
        self.opened[rank, action] = time
        heapq.heappush(self.events, (time, rank))

    def _send(self, sender: int, lane: _Lane, messages: deque[Message], finish: int) -> None:
        messages.append((self._arrival(sender, lane.holding.rank, finish), self.closed[sender]))

    def _arrival(self, sender: int, receiver: int, finish: int) -> int:
        if sender == receiver:
            return finish
        heapq.heappush(self.events, (finish + self.link, receiver))
        return finish + self.link

    def _close(self, rank: int) -> None:
        """Note the end of the rank's window: its last backward, and the updates due by then."""
        window, holdings = self.closed[rank] + 1, self.holdings[rank].values()
        if any(holding.backwards < window * holding.per_window for holding in holdings):
            return
        if any(holding.updates < window - holding.late for holding in holdings):
            return
        self.closed[rank] = window
        self.window_ends[rank].append(len(self.rows[rank]))
