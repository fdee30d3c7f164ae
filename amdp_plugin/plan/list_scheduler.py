"""A list scheduler: every rank that falls free starts the ready action that its schedule prefers.

It runs in integer nanoseconds and breaks every tie the same way.
"""

from __future__ import annotations

import heapq
from collections import deque
from math import inf

from .action import BACKWARD, FORWARD, KINDS, REDUCE, UPDATE, Action
from .costs import CostModel, ticks
from .holding import Holding, TiedHolding
from .lane import Lane, Message
from .laws import PROGRESS, ProgramError, breach
from .priorities import Priority
from .program import Program, Row
from .schedule import Schedule

Window = tuple[Row, ...]

WAITING = 1 << 62
"""When a rank falls free that waits in a meeting."""


class ListScheduler:
    """All ranks at work: a heap of the instants at which a rank may have something to start.

    Args:
        schedule: what is simulated.
        costs: how long everything takes.
        priority: one of the schedule's.
        free_windows: after so many, every rank does the same in each: as many forwards and backwards on every lane, a
            reduction and an update of all that it holds, and nothing beyond. The first of those ends as it begins, so
            that it may repeat for ever.
    """

    def __init__(
        self, schedule: Schedule, costs: CostModel, priority: Priority, free_windows: float = inf
    ) -> None:
        self.schedule, self.priority, self.free_windows = schedule, priority, free_windows
        self.link, self.meeting_ticks = costs.link_ticks(), costs.meeting_ticks(schedule.num_ranks)
        self.directions, self.last_stage = schedule.placement.directions, schedule.num_stages - 1
        self.mean_forward = ticks(sum(costs.forward) / costs.num_stages)
        stages, ranks = range(schedule.num_stages), range(schedule.num_ranks)
        self.ticks = {
            kind: [costs.action_ticks(Action(stage, kind, 0)) for stage in stages] for kind in KINDS
        }
        self.holdings = [
            {stage: Holding(schedule, rank, stage) for stage in schedule.placement.stages[rank]} for rank in ranks
        ]
        self.units: list[dict[int, Holding | TiedHolding]] = [
            {
                unit: held.get(unit) or TiedHolding(schedule, unit, held[schedule.sharing.stage_on(rank, unit)])
                for unit in schedule.sharing.units[rank]
            }
            for rank, held in enumerate(self.holdings)
        ]
        """For every rank, the stages and the tied weights that it holds."""
        self.lanes = [
            [Lane(direction, self.holdings[rank][stage], schedule.in_flight[stage]) for stage, rank in enumerate(row)]
            for direction, row in enumerate(schedule.placement.ranks)
        ]
        self.lanes_of = [[lane for row in self.lanes for lane in row if lane.holding.rank == rank] for rank in ranks]
        self.rows: list[list[Action]] = [[] for _ in ranks]
        self.window_ends: list[deque[int]] = [deque() for _ in ranks]
        self.behind = len(self.rows)
        """Ranks that have not closed the window that is run."""
        self.closed = [0 for _ in ranks]
        self.free_at = [0 for _ in ranks]
        self.unfinished: list[list[Holding | TiedHolding]] = [[] for _ in ranks]
        """For every rank, what has all backwards of a window and not yet its update, in the order of that."""
        self.mail: list[dict[tuple[int, str], deque[tuple[Action, Message]]]] = [{} for _ in ranks]
        """For every rank, by sender and kind, the reductions and updates that wait or are under way, in the order of
        sending."""
        self.at_home = [self.holdings[holders[0]][stage] for stage, holders in enumerate(schedule.placement.holders)]
        self.homes = {rank for rank, _ in schedule.meeting(self.at_home[0].rank, Action(0, UPDATE, 0))}
        """The ranks that meet at every update, if any do."""
        self.entered: list[tuple[int, Action]] = []
        self.meetings = 0
        self.meeting_at: int | None = None
        """When the last rank can enter the next meeting, once nothing but messages is missing to it."""
        self.worked = 0
        """Nanoseconds of work that were started, of all ranks together."""
        self.events = [(0, rank) for rank in ranks]
        self.now = self.last_rank = 0

    def run_window(self) -> Window:
        """Simulate until every rank has closed one more window; return that window."""
        while self.behind:
            if not self.events:
                raise self._deadlock()
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
        self.behind = sum(not ends for ends in self.window_ends)
        return tuple(window)

    def _deadlock(self) -> ProgramError:
        """No rank can go on: what the one that is furthest behind has done since its last window."""
        behind = min(range(len(self.rows)), key=lambda rank: (self.closed[rank], len(self.rows[rank])))
        stuck = Program(self.schedule, 0, tuple(map(tuple, self.rows)))
        what = f"rank {behind} has nothing that it may start, in its window {self.closed[behind]}, nor has any other"
        return breach(stuck, behind, len(self.rows[behind]), PROGRESS, what)

    def state(self, window: int) -> object:
        """Everything that the future depends on, with time, windows and micro-batches counted from now."""
        now, micro_batches = self.now, self.schedule.micro_batches
        done = window * micro_batches // self.directions
        return (
            self.last_rank,
            window % (self.schedule.flush_every or 1),
            tuple(max(0, time - now) for time in self.free_at),
            tuple(closed - window for closed in self.closed),
            tuple(lane.state(window, done, now) for row in self.lanes for lane in row),
            tuple(holding.state(window) for held in self.units for holding in held.values()),
            tuple(tuple(action.shifted(-window, micro_batches) for action in row) for row in self.rows),
            tuple(tuple(holding.stage for holding in holdings) for holdings in self.unfinished),
            tuple(self._mail_state(boxes, window) for boxes in self.mail),
            tuple((rank, action.shifted(-window, micro_batches)) for rank, action in self.entered),
            bool(self.homes) and self.meetings - window,
            self.meeting_at and max(0, self.meeting_at - now),
        )

    def _mail_state(self, boxes: dict[tuple[int, str], deque[tuple[Action, Message]]], window: int) -> object:
        return frozenset(
            (sender, place, action.shifted(-window, 1), max(0, time - self.now), sent - window)
            for (sender, _), box in boxes.items()
            for place, (action, (time, sent)) in enumerate(box)
        )

    def _choose(self, rank: int) -> Action | None:
        """What ``rank`` starts now: a reduction or update that is due, else what the schedule prefers.

        Before a meeting, a rank starts what ends by the time the last one can enter, so that nobody waits for it.
        """
        due = self._due(rank) if self.unfinished[rank] else None
        if due is not None and not self._opens_meeting(rank, due):
            return due
        ready = self._ready(rank)
        if self.meeting_at is not None and rank in self.homes:
            ready = [entry for entry in ready if self.now + self._ticks(entry[0]) <= self.meeting_at]
        if len(ready) < 2:
            return ready[0][0] if ready else due
        return self.schedule.preferred(self.priority, [(action, since / self.mean_forward) for action, since in ready])

    def _due(self, rank: int) -> Action | None:
        """A reduction, because others wait for it, or an update that ``rank`` may start now."""
        due = [each.next for each in self.unfinished[rank] if each.may(each.next) and self._is_due(each)]
        return min(due, key=lambda action: action.kind == UPDATE, default=None)

    def _is_due(self, holding: Holding | TiedHolding) -> bool:
        """Whether the next reduction or update may start: in the window that it belongs to, and with all it needs."""
        if isinstance(holding, TiedHolding):
            action = holding.next
            return holding.is_due(lambda sender: self._has_come(holding.rank, sender, action))
        rank, action, held = holding.rank, holding.next, self.holdings[holding.rank].values()
        # Window by window, so that what a rank needs to close its window is not behind what is later's.
        if self.closed[rank] < action.index or any(other.updates < action.index for other in held):
            return False
        if rank != holding.home:
            if action.kind == UPDATE:
                return self._has_come(rank, holding.home, action)
            # Guests of several stages of one home send in one order, which it can follow.
            before = (other for other in held if other.home == holding.home and other.stage < holding.stage)
            return all(other.reductions > action.index for other in before)
        if action.kind == REDUCE:
            return all(self._has_come(rank, guest, action) for guest in holding.guests)
        if self.schedule.relays and not self._is_brought(rank, action):
            return False
        return holding.gathered > action.index and (not self._opens_meeting(rank, action) or self._may_meet())

    def _is_brought(self, rank: int, update: Action) -> bool:
        """Whether the forward could start, but for ``update``, that brings the decision on it."""
        brings = self._next_forward(rank, self.lanes[0][update.stage])
        return brings is not None and brings[0].index == self.schedule.forward_after(update.index)

    def _has_come(self, rank: int, sender: int, action: Action) -> bool:
        """Whether ``action`` of ``sender`` is the next of its messages here (law 3), and has arrived."""
        box = self.mail[rank].get((sender, action.kind))
        if not box:
            return False
        message, (time, sent) = box[0]
        return message == action and time <= self.now and sent <= self.closed[rank]

    def _opens_meeting(self, rank: int, action: Action) -> bool:
        """Whether ``action`` is an update that enters a meeting, not one that follows the rank's first in it."""
        if action.kind != UPDATE or action.index != self.meetings:
            return False
        return bool(self.schedule.meeting(rank, action))

    def _may_meet(self) -> bool:
        """Whether the homes may enter the next meeting: with all gradients of its window, and all of them in the last
        window in which it may stand, so that a run can end before."""
        return all(
            home.gathered > self.meetings and self.closed[home.rank] >= self.meetings + home.late
            for home in self.at_home
        )

    def _ready(self, rank: int) -> list[tuple[Action, int]]:
        """What ``rank`` could start now, and since when (nanoseconds)."""
        closed, now, directions, size = self.closed[rank], self.now, self.directions, self.schedule.micro_batches
        ready = []
        for lane in self.lanes_of[rank]:
            if lane.backward_arrivals and lane.backwards < lane.most_backwards:
                time, sent = lane.backward_arrivals[0]
                holding, micro_batch = lane.holding, lane.direction + directions * lane.backwards
                # Another gradient is accumulated only where the update that is due lets it (law 4), and directions
                # that share a sum of gradients go window by window, whatever the priority would start.
                most = (holding.updates + 1) * holding.per_window + holding.delay
                begins = holding.backwards < most and micro_batch // size <= holding.completed
                if begins and time <= now and sent <= closed:
                    ready.append((Action(lane.stage, BACKWARD, micro_batch), time))
            if lane.forwards < lane.most_forwards and (lane.forward_arrivals or not lane.stage):
                forward = self._next_forward(rank, lane)
                if forward and lane.holding.applied >= self.schedule.updates_before(forward[0].index):
                    ready.append(forward)
        return ready

    def _next_forward(self, rank: int, lane: Lane) -> tuple[Action, int] | None:
        """The one that there is room and a message for, and since when, whatever update it waits for."""
        if lane.forwards - lane.backwards >= lane.in_flight or (lane.stage and not lane.forward_arrivals):
            return None
        time, sent = lane.forward_arrivals[0] if lane.stage else (lane.freed_at, 0)
        if time > self.now or sent > self.closed[rank]:
            return None
        return Action(lane.stage, FORWARD, lane.direction + self.directions * lane.forwards), time

    def _start(self, rank: int, action: Action) -> None:
        self.rows[rank].append(action)
        if self._opens_meeting(rank, action):
            self._enter(rank, action)
        else:
            self._run(rank, action, self.now)

    def _enter(self, rank: int, action: Action) -> None:
        """Let ``rank`` wait in the meeting; with the last one, all update as soon as a message has gone round."""
        self.free_at[rank] = WAITING
        self.entered.append((rank, action))
        if len(self.entered) == len(self.homes):
            self.meetings, self.meeting_at = self.meetings + 1, None
            entered, self.entered = self.entered, []
            for waiting, update in entered:
                self._run(waiting, update, self.now + self.meeting_ticks)

    def _run(self, rank: int, action: Action, start: int) -> None:
        finish = start + (self._ticks(action) if self.schedule.computes(rank, action) else 0)
        self.worked += finish - start
        self.free_at[rank] = finish
        heapq.heappush(self.events, (finish, rank))
        if action.kind == FORWARD:
            self._forward(rank, action, finish)
            if self.closed[rank] < self.free_windows:
                return
        elif action.kind == BACKWARD:
            self._backward(rank, action, finish)
        elif action.kind == REDUCE:
            self._reduce(rank, action, finish)
        else:
            self._update(rank, action, finish)
        self._close(rank, self.units[rank][action.stage])
        if self.homes:
            self._look_for_meeting()

    def _ticks(self, action: Action) -> int:
        return self.ticks[action.kind][action.stage]

    def _lane(self, stage: int, micro_batch: int) -> Lane:
        return self.lanes[micro_batch % self.directions][stage]

    def _forward(self, rank: int, action: Action, finish: int) -> None:
        lane = self._lane(action.stage, action.index)
        lane.forwards += 1
        if action.stage > 0:
            lane.forward_arrivals.popleft()
        if action.stage < self.last_stage:
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
        self._note_complete(lane.holding)
        for tied in lane.holding.tied:
            self._note_complete(tied)

    def _reduce(self, rank: int, action: Action, finish: int) -> None:
        holding = self.units[rank][action.stage]
        holding.reductions += 1
        if rank == holding.home:
            for guest in holding.guests:
                self.mail[rank][guest, REDUCE].popleft()
        else:
            self._post(rank, holding.home, action, finish)

    def _update(self, rank: int, action: Action, finish: int) -> None:
        holding = self.units[rank][action.stage]
        holding.updates += 1
        self.unfinished[rank].remove(holding)
        self._note_complete(holding)
        if rank == holding.home:
            for guest in holding.guests:
                self._post(rank, guest, action, finish)
        else:
            self.mail[rank][holding.home, UPDATE].popleft()

    def _note_complete(self, holding: Holding | TiedHolding) -> None:
        if holding.completed > holding.updates and holding not in self.unfinished[holding.rank]:
            self.unfinished[holding.rank].append(holding)

    def _look_for_meeting(self) -> None:
        """Note when the last rank can enter the next meeting, as soon as all backwards that it waits for have begun,
        and wake the homes when they may enter.

        Where backwards of the next window go on meanwhile there is no hurry: it is noted when they may enter.
        """
        may_meet = self._may_meet()
        if self.meeting_at is None:
            if any(self.schedule.update_delay):
                if may_meet:
                    self.meeting_at = max(self.free_at)
            elif all(holding.completed > self.meetings for holdings in self.holdings for holding in holdings.values()):
                self.meeting_at = max(self.free_at) + (self.link if self.schedule.reduces else 0)
        if may_meet:
            for home in self.homes:
                heapq.heappush(self.events, (self.now, home))

    def _post(self, sender: int, receiver: int, action: Action, finish: int) -> None:
        message = self._arrival(sender, receiver, finish), self.closed[sender]
        self.mail[receiver].setdefault((sender, action.kind), deque()).append((action, message))

    def _send(self, sender: int, lane: Lane, messages: deque[Message], finish: int) -> None:
        messages.append((self._arrival(sender, lane.holding.rank, finish), self.closed[sender]))

    def _arrival(self, sender: int, receiver: int, finish: int) -> int:
        if sender == receiver:
            return finish
        heapq.heappush(self.events, (finish + self.link, receiver))
        return finish + self.link

    def _close(self, rank: int, latest: Holding | TiedHolding) -> None:
        """Note the end of the rank's window: its last backward, and the updates due by then.

        Most often what it did ``latest`` tells at once that there is more to do.
        """
        window = self.closed[rank] + 1
        units, lanes = self.units[rank].values(), self.lanes_of[rank]
        if not latest.closes(window) or not all(each.closes(window) for each in units):
            return
        if window > self.free_windows and not all(each.has_had_portion for each in (*units, *lanes)):
            return
        self.closed[rank] = window
        self.behind -= not self.window_ends[rank]
        self.window_ends[rank].append(len(self.rows[rank]))
        if window >= self.free_windows:
            for lane in lanes:
                lane.portion(self.schedule.micro_batches // self.directions)
            for unit in units:
                unit.portion()
