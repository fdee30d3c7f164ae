"""A list scheduler: every rank that falls free starts the ready action that its schedule prefers.

It runs in integer nanoseconds and breaks every tie the same way.
"""

from __future__ import annotations

import heapq
from collections import deque

from .action import BACKWARD, FORWARD, REDUCE, UPDATE, Action
from .costs import CostModel, ticks
from .program import Row
from .schedule import Priority, Schedule

Window = tuple[Row, ...]
Message = tuple[int, int]


class Holding:
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


class Lane:
    """One direction's stage on its rank: its micro-batches so far, and the messages that wait or are under way.

    A message is (nanosecond of its arrival, window in which its sender sent it).
    """

    def __init__(self, direction: int, holding: Holding) -> None:
        self.direction, self.holding = direction, holding
        self.forwards = self.backwards = 0
        self.freed_at = 0
        """On a first stage, when its latest backward made room for a forward (nanoseconds)."""
        self.forward_arrivals: deque[Message] = deque()
        self.backward_arrivals: deque[Message] = deque()

    def state(self, window: int, done: int, now: int) -> tuple[object, ...]:
        waiting = (self.forward_arrivals, self.backward_arrivals)
        messages = (tuple((time - now, sent - window) for time, sent in arrivals) for arrivals in waiting)
        return self.forwards - done, self.backwards - done, self.freed_at and self.freed_at - now, *messages


class Simulation:
    """All ranks at work: a heap of the instants at which a rank may have something to start.

    Args:
        schedule: what is simulated.
        costs: how long everything takes.
        priority: one of the schedule's.
    """

    def __init__(self, schedule: Schedule, costs: CostModel, priority: Priority) -> None:
        self.schedule, self.link, self.priority = schedule, costs.link_ticks(), priority
        self.mean_forward = ticks(sum(costs.forward) / costs.num_stages)
        stages, ranks = range(schedule.num_stages), range(schedule.num_ranks)
        self.ticks = {
            kind: [costs.action_ticks(Action(stage, kind, 0)) for stage in stages]
            for kind in (FORWARD, BACKWARD, REDUCE, UPDATE)
        }
        self.holdings = [
            {stage: Holding(schedule, rank, stage) for stage in schedule.placement.stages[rank]} for rank in ranks
        ]
        self.lanes = [
            [Lane(direction, self.holdings[rank][stage]) for stage, rank in enumerate(row)]
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
        ready = [entry for lane in self.lanes_of[rank] for entry in self._ready(lane)]
        if len(ready) < 2:
            return ready[0][0] if ready else None
        return min(ready, key=lambda entry: self.priority(entry[0], entry[1] / self.mean_forward))[0]

    def _may_enter(self, rank: int, action: Action) -> bool:
        """Whether ``rank`` may start a reduction or update: in the window that it belongs to, once it is open."""
        window = action.index + self.holdings[rank][action.stage].late
        return self.closed[rank] >= window and self.opened.get((rank, action), self.now + 1) <= self.now

    def _has_arrived(self, lane: Lane, messages: deque[Message]) -> bool:
        """Whether ``lane`` may use its next message: not before the window in which it was sent."""
        return bool(messages) and messages[0][0] <= self.now and messages[0][1] <= self.closed[lane.holding.rank]

    def _ready(self, lane: Lane) -> list[tuple[Action, int]]:
        """What ``lane`` could start now, and since when (nanoseconds)."""
        stage, directions, ready = lane.holding.stage, self.schedule.placement.directions, []
        if self._has_arrived(lane, lane.backward_arrivals) and lane.holding.may_backward:
            action = Action(stage, BACKWARD, lane.direction + directions * lane.backwards)
            ready.append((action, lane.backward_arrivals[0][0]))
        admits = lane.forwards - lane.backwards < self.schedule.in_flight[stage]
        if admits and (stage == 0 or self._has_arrived(lane, lane.forward_arrivals)):
            micro_batch = lane.direction + directions * lane.forwards
            if not self.schedule.flush or micro_batch // self.schedule.micro_batches <= lane.holding.updates:
                since = lane.forward_arrivals[0][0] if stage else lane.freed_at
                ready.append((Action(stage, FORWARD, micro_batch), since))
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

    def _lane(self, stage: int, micro_batch: int) -> Lane:
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
        lane.freed_at = finish if action.stage == 0 else 0
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

    def _send(self, sender: int, lane: Lane, messages: deque[Message], finish: int) -> None:
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
