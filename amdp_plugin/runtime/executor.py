"""Runs one rank's program, window after window: says when its worker does what."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ..plan.action import BACKWARD, FORWARD, REDUCE, UPDATE, Action
from ..plan.planner import Planner
from ..plan.postings import Postings, shifted
from .channels import Channels, Tensors
from .decisions import Decisions
from .exchange import Exchange
from .extrapolation import ExtrapolatedWeights
from .kept_weights import KeptWeights
from .timeline import Timeline
from .watch import Watch
from .worker import StagesWorker


class Executor:
    """One rank's side of a schedule.

    Args:
        planner: the program, the same on every rank.
        rank: this rank in the pipeline.
        worker: what computes.
        channels: messages; ``None`` in a pipeline of one rank.
        watch: what is being done and waited for.
        exchange: gradients and weights of stages that several ranks hold; ``None`` where there are none.
        opening: the program of :meth:`.Schedule.opening`, where the schedule has one.
        decisions: sums of other stages, where updates take some.
        extrapolation: of the stage at home here, where the schedule has some.
    """

    def __init__(
        self,
        planner: Planner,
        rank: int,
        worker: StagesWorker,
        channels: Channels | None,
        watch: Watch,
        exchange: Exchange | None = None,
        opening: Planner | None = None,
        decisions: Decisions | None = None,
        extrapolation: ExtrapolatedWeights | None = None,
    ) -> None:
        self.planner, self.schedule, self.rank = planner, planner.schedule, rank
        self._opening, self._decisions = opening, decisions
        self._worker, self._channels, self._watch, self._exchange = worker, channels, watch, exchange
        self._last_stage = self.schedule.num_stages - 1
        self.versions = dict.fromkeys(self.schedule.placement.stages[rank], 0)
        """Updates that each stage on this rank has had since the job's start."""
        self.kept = KeptWeights(self.schedule, worker.parameters, extrapolation)
        """Other weights than those that optimizers step, where some are in use."""
        self.largest_gap = 0
        """The largest (version at backward) - (version at forward) that was measured."""
        self.peak_in_flight = 0
        """The most micro-batches that were forwarded and not yet backwarded on this rank."""
        self.restart(0)

    @property
    def timeline(self) -> Timeline:
        return self._watch.timeline

    def restart(self, window: int) -> None:
        """Let the program begin anew, with an empty pipeline, at ``window``; nothing may be in flight."""
        self.window = window
        self._begin_program()
        self.versions = dict.fromkeys(self.versions, window)
        self.kept.clear()
        self._in_flight: dict[Action, int] = {}
        self._early: list[Action] = []
        self._whole = dict.fromkeys(self.versions, 0)
        self._snapshots: dict[tuple[int, int], Any] = {}
        self._exists: dict[tuple[int, int], bool] = {}
        self._read: dict[tuple[int, int], bool] = {}
        self._headers: list[tuple[int, int]] = []
        self._postings: Postings = {}

    def _begin_program(self) -> None:
        """Nothing is in flight: from this window on, one of the two programs is run from its start."""
        opens = self.window < self.schedule.flush_first
        if self._exchange is not None:
            self._exchange.drain()  # a tied weight may be on its way to those that close their windows early
        self._running = self._opening if self._opening is not None and opens else self.planner
        self._base = self.window
        if self._decisions is not None:
            self._decisions.begin(self.window)

    def run_window(self) -> None:
        """Execute one window. Raises ``StopIteration``, with nothing lost, when there is no data for it."""
        for action in self.open_window():
            self.execute(action)
        self.close_window()

    def open_window(self) -> Sequence[Action]:
        """This rank's actions of the next window.

        Raises:
            StopIteration: when the data ends before the window does. All ranks raise it at the same window;
                what was forwarded ahead is cancelled, and its data is kept for when there is more.
        """
        if not self._all_exist():
            # The data may have ended while it was read ahead, and have gone on since.
            self.quiesce()
            if not self._all_exist():
                self.restart(self.window)
                size = self.schedule.micro_batches
                raise StopIteration(f"the data ends before the {size} micro-batches of window {self.window}")
        self._look_up_postings()
        self._read_ahead()
        self._begin_to_receive(None)
        early, self._early = self._early, []
        for action in early:
            self._count(action)
        return self._row(self.rank)

    def execute(self, action: Action) -> None:
        """Do one action: receive what it needs, compute, send what others need."""
        tied = self.schedule.sharing.is_tied(action.stage)
        self._watch.keep_pace()
        if action.kind == UPDATE and not tied:
            self._watch.pass_messages()  # a step may ask the device for a norm, and such a question has no limit
        if action.kind == FORWARD:
            self._forward(action)
        elif action.kind == BACKWARD:
            self._backward(action)
        elif action.kind == REDUCE or tied:
            assert self._exchange is not None
            (self._exchange.reduce if action.kind == REDUCE else self._exchange.pass_on)(action)
            if tied and action.kind == REDUCE:
                self._note_whole(self.schedule.sharing.stage_on(self.rank, action.stage), action.index)
        else:
            self._update(action)
        self._watch.last_done = action
        self._begin_to_receive(action)

    def close_window(self) -> None:
        """All actions of the window that :meth:`open_window` began are done."""
        self._watch.hand_over()
        self.window += 1
        self._watch.in_first_window = False
        for messages in (self._channels, self._exchange):
            if messages is not None:
                messages.go_direct()
        self._snapshots = {key: state for key, state in self._snapshots.items() if key[0] >= self.window}
        self._exists = {key: exists for key, exists in self._exists.items() if key[0] >= self.window}
        self._read = {key: has for key, has in self._read.items() if key[0] >= self.window}
        if self._running is self._opening and self.window == self.schedule.flush_first:
            self.quiesce()  # a rank may have forwarded of its own stage while it waited for the weights of a guest

    def quiesce(self, updates: bool = True) -> None:
        """Make the updates that are still to come of windows that have closed, and cancel what is in flight.

        Afterwards every stage is at the same version and the next window fills the pipeline anew. No
        micro-batch is lost, and random state and buffers are as if no cancelled forward had run. All
        ranks of the pipeline must call it between the same two windows.

        Args:
            updates: whether they are made; else they are forgotten, where other weights have been loaded.
        """
        self._catch_up(updates)
        if self._decisions is not None:
            self._decisions.drain(self.window)
        if self._channels is not None:
            for window, direction in self._headers:
                self._receive_header(window, direction)
            self._channels.drain()
        if self._exchange is not None:
            self._exchange.drain()
        self._watch.keep_pace(0)
        snapshots = [state for (window, _), state in self._snapshots.items() if window == self.window]
        self._worker.cancel(list(self._in_flight), self._early, snapshots)
        self.restart(self.window)

    def _catch_up(self, updates: bool = True) -> None:
        """Make, or forget, the updates of windows that have closed which stand in a later one."""
        for stage in self.versions:
            while self.versions[stage] < self.window:
                self._watch.keep_pace(0)
                update = Action(stage, UPDATE, self.versions[stage])
                if updates:
                    self._update(update)
                else:
                    self._worker.drop(update)
                    self.versions[stage] += 1

    def _row(self, rank: int) -> list[Action]:
        row = self._running.row(self.window - self._base, rank)
        return [action.shifted(self._base, self.schedule.micro_batches) for action in row]

    def _look_up_postings(self) -> None:
        """Look up when this rank begins to receive what the others send to it in this window."""
        landing = self._exchange is not None and self._exchange.landing
        begun = self._running.postings(self.window - self._base, self.rank, landing)
        self._postings = shifted(begun, self._base, self.schedule.micro_batches)
        actions = [message.action for messages in self._postings.values() for message in messages]
        headers = [self._window_and_direction(action) for action in actions if self._opens_window(action)]
        self._headers += [key for key in headers if key not in self._exists]

    def _begin_to_receive(self, after: Action | None) -> None:
        """Begin to receive what the plan says, after an action or at the opening of the window."""
        for sender, _, action in self._postings.get(after, ()):
            if action.kind in (FORWARD, BACKWARD):
                assert self._channels is not None
                self._channels.expect(sender, action)
            else:
                assert self._exchange is not None
                self._exchange.receive(sender, action)

    def _read_ahead(self) -> None:
        """On a last stage, read what the first stage reads in this window, though it is needed later: then both
        ends read the same, even when the job gives each window another iterator."""
        for direction, ranks in enumerate(self.schedule.placement.ranks):
            if ranks[-1] == self.rank != ranks[0]:
                for action in self._row(ranks[0]):
                    window = self._window_and_direction(action)
                    if action.stage == 0 and self._opens_window(action) and window[1] == direction:
                        self._has_window(*window)

    def _has_window(self, window: int, direction: int) -> bool:
        """Ask the worker once."""
        key = (window, direction)
        if key not in self._read:
            self._read[key] = self._worker.has_window(window)
        return self._read[key]

    def _window_and_direction(self, action: Action) -> tuple[int, int]:
        return action.window(self.schedule.micro_batches), action.index % self.schedule.placement.directions

    def _opens_window(self, action: Action) -> bool:
        """Whether it is the first forward of its window in its direction."""
        rest = action.index % self.schedule.micro_batches
        return action.kind == FORWARD and rest < self.schedule.placement.directions

    def _all_exist(self) -> bool:
        """Whether there is data for the window in all directions; asks for each, so that all ranks ask alike."""
        directions = range(self.schedule.placement.directions)
        return all([self._window_exists(self.window, direction) for direction in directions])

    def _window_exists(self, window: int, direction: int) -> bool:
        """Whether there is data for ``window``: the first stage knows, and tells down the pipeline."""
        key = (window, direction)
        if key in self._exists:
            return self._exists[key]
        ranks = self.schedule.placement.ranks[direction]
        if self.rank not in ranks:
            return True
        stage = ranks.index(self.rank)
        if stage == 0:
            exists = self._has_window(window, direction)
        else:
            exists = self._receive_header(window, direction)
        if stage < len(ranks) - 1:
            assert self._channels is not None
            first = self._first_forward(stage + 1, window, direction)
            self._channels.send_header(ranks[stage + 1], first, exists, direction)
        elif stage > 0 and self._has_window(window, direction) != exists:
            has, lacks = ("first", "last") if exists else ("last", "first")
            raise RuntimeError(
                f"the {has} stage has data for window {window}, the data of the {lacks} stage ends before it: give "
                "both the same micro-batches"
            )
        if key in self._headers:
            self._headers.remove(key)
        self._exists[key] = exists
        return exists

    def _receive_header(self, window: int, direction: int) -> bool:
        ranks = self.schedule.placement.ranks[direction]
        stage = ranks.index(self.rank)
        assert self._channels is not None
        first = self._first_forward(stage, window, direction)
        return self._channels.receive_header(ranks[stage - 1], first, direction)

    def _first_forward(self, stage: int, window: int, direction: int) -> Action:
        return Action(stage, FORWARD, window * self.schedule.micro_batches + direction)

    def _forward(self, action: Action) -> None:
        stage, _, micro_batch = action
        window, direction = self._window_and_direction(action)
        if self._opens_window(action):
            self._window_exists(window, direction)
        inputs = self._receive(stage - 1, action) if stage > 0 else None
        self._settle(stage)
        self._take_snapshot(action, window, direction)
        latest = self.versions[stage]
        version = self.kept.forward_version(action, self._running, self._base, latest)
        with self._computing(action), self.kept.using(action, version, version, latest):
            outputs = self._worker.forward(action, inputs)
        self._in_flight[action] = version
        self.peak_in_flight = max(self.peak_in_flight, len(self._in_flight))
        if stage < self._last_stage:
            self._send(action, outputs, returns=Action(stage, BACKWARD, micro_batch))

    def _backward(self, action: Action) -> None:
        stage, _, micro_batch = action
        gradients = self._receive(stage + 1, action) if stage < self._last_stage else None
        self._settle(stage)
        forward = self._in_flight[Action(stage, FORWARD, micro_batch)]
        latest = self.versions[stage]
        version = self._running.schedule.backward_version(forward, latest)
        with self._computing(action), self.kept.using(action, forward, version, latest):
            input_gradients = self._worker.backward(action, gradients)
        del self._in_flight[Action(stage, FORWARD, micro_batch)]
        self._drop_versions(stage)
        self.largest_gap = max(self.largest_gap, version - forward)
        if stage > 0:
            self._send(action, input_gradients)
        window = action.window(self.schedule.micro_batches)
        if window > self.window:
            self._early.append(action)
        else:
            self._count(action)  # first: the losses that it reports come with what a closing window waits for
        if self._closes_window(action):
            self._note_whole(stage, window)

    def _note_whole(self, stage: int, window: int) -> None:
        """The gradient of ``window`` is whole, but for weights that ``stage`` shares, or that of one of these is."""
        if not self.schedule.relays:
            return
        self._whole[stage] += 1
        if self._whole[stage] > len(self.schedule.sharing.of_stage[stage]):
            self._whole[stage] = 0
            self._watch.pass_messages()  # as before a step
            with self._computing(update := Action(stage, UPDATE, window)):
                self._worker.close(update)

    def _count(self, action: Action) -> None:
        """The window of the backward ``action`` has begun, so that it will not be cancelled."""
        assert action.window(self.schedule.micro_batches) == self.window, "a stage is updated before the window after"
        self._worker.release(action)
        if action.stage == self._last_stage and self._closes_window(action):
            self._worker.end_of_backwards(*self._window_and_direction(action))

    def _closes_window(self, action: Action) -> bool:
        """Whether it is the last backward of its window in its direction."""
        size, directions = self.schedule.micro_batches, self.schedule.placement.directions
        return action.index % size >= size - directions

    def _update(self, action: Action) -> None:
        home, *guests = self.schedule.placement.holders[action.stage]
        if self.rank == home:
            with self._computing(action), self.kept.stepping(action, self.versions[action.stage]):
                self._worker.update(action)
            if guests:
                assert self._exchange is not None
                self._exchange.send_weights(action)
        self.versions[action.stage] += 1
        self._drop_versions(action.stage)

    def _drop_versions(self, stage: int) -> None:
        in_flight = (version for action, version in self._in_flight.items() if action.stage == stage)
        self.kept.drop(stage, in_flight, self.versions[stage])

    @contextmanager
    def _computing(self, action: Action) -> Iterator[None]:
        """The host's own collectives may be in it, between the ranks of a stage or of all stages."""
        with self.timeline.span(str(action)), self._watch.guard("a collective", action):
            yield
        self._watch.given(action)

    def _settle(self, stage: int) -> None:
        if self._exchange is not None:
            self._exchange.settle(stage, self.versions[stage])

    def _take_snapshot(self, action: Action, window: int, direction: int) -> None:
        """Before a direction's first forward for a window that has not begun: what :meth:`quiesce` would return to."""
        missing = [later for later in range(self.window + 1, window + 1) if (later, direction) not in self._snapshots]
        if missing:
            state = self._worker.snapshot(action)
            self._snapshots.update(((later, direction), state) for later in missing)

    def _receive(self, stage: int, action: Action) -> Tensors:
        """What ``stage``, the neighbour, computed for ``action``."""
        assert self._channels is not None
        return self._channels.receive(self.schedule.placement.rank_of(stage, action.index), action)

    def _send(self, action: Action, tensors: Tensors | None, returns: Action | None = None) -> None:
        message = self.schedule.message(self.rank, action)
        assert message is not None and tensors is not None and self._channels is not None
        self._channels.send(*message, tensors, returns)
