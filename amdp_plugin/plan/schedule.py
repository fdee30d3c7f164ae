"""A named schedule as a point in the family: what it is, not the order it leads to.

What every action needs before it may run, what it sends to another rank, and whom it meets:

| action | on | needs | sends to another rank | meets |
|---|---|---|---|---|
| ``F(s, m)`` | its direction's rank | ``F(s-1, m)``; ``U`` before the latest flush | activation for ``F(s+1, m)`` | |
| ``B(s, m)`` | its direction's rank | ``F(s, m)``, ``B(s+1, m)`` | gradient for ``B(s-1, m)`` | |
| ``R(s, k)`` | a guest | its own backwards of window ``k`` | sum of gradients for the home's ``R(s, k)`` | |
| ``R(s, k)`` | the home | its own backwards; ``R(s, k)`` of all guests | | |
| ``U(s, k)`` | the home | ``R(s, k)``, or its own backwards | weights for the guests' ``U(s, k)`` | all homes |
| ``U(s, k)`` | a guest | ``U(s, k)`` of the home | | |

A weight that several stages share is a unit of its own, numbered after the stages (:mod:`.sharing`). Its R and U are
as above, but that its backwards are those of its stage on the rank, and that its home's ``U`` only follows that of its
stage there, which steps it and so needs its ``R``. A forward after a flush needs ``U`` of what its stage shares, too.

Homes meet only where a schedule's decisions are made in a ``meeting``, and then need this for all the stages at home
there. Where decisions are the ``latest``, an update also takes a sum of every other stage, see :mod:`.decisions`.

:meth:`Schedule.dependencies`, :meth:`Schedule.message` and :meth:`Schedule.meeting` say it, and whoever orders,
checks, times or runs actions asks them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from .action import BACKWARD, FORWARD, REDUCE, UPDATE, Action
from .delays import check_delays, delays_of
from .placement import Placement
from .priorities import Priority, backward_first
from .sharing import Sharing, Tied
from .weights import KEPT, check_compensation, check_weights

Place = tuple[int, Action]
"""An action on a rank."""

DECISIONS = ("local", "latest", "relayed", "meeting")


@dataclass(frozen=True)
class Schedule:
    """The choices that make a schedule, and the bounds that it states.

    Args:
        name: what users write in their configuration.

        placement: which rank runs which stage of which direction.
        tied: for every weight that stages share and that is a unit of its own, those stages, ascending. Only in one
            direction, with the latest weights; where updates meet, a host sums such gradients in the meeting.
        micro_batches: micro-batches of a window, over all directions; one window is one optimizer step.
        flush_every: a stage forwards no micro-batch of window ``flush_every``, ``2 * flush_every``, ... before its
            update of the window before. 1: a flush at every window, the schedule is synchronous. 0: never.
        flush_first: windows at the start of a job that end with a flush all the same: see :meth:`opening`.
        in_flight: for every stage, how many micro-batches of one direction may be forwarded and not yet
            backwarded.
        max_gap: for every stage, the largest (version at backward) - (version at forward) it may show.
        weights: which weights are used. ``"latest"``: by a forward and by a backward, those that its stage then has.
            ``"stashed"``: a forward's latest by its backward, too. ``"previous"``: by both, those before the update of
            the window before, so that every gradient is late by exactly one update. ``"synchronized"``: by both, that
            which the micro-batch met on stage 0, so that it meets one version on all stages. ``"corrected"``: the
            latest, which a backward extrapolates back to its forward's. ``"predicted"``: the latest, which both
            extrapolate ahead; ``"predicted_by_window"``: the same, once for all forwards of a window. See
            :mod:`.extrapolation`.
        weight_versions: for every stage, how many versions of its weights there are at once, at most: the latest, and
            those that backwards of what is in flight use.
        correction_decay: of corrected weights: what an average of updates still holds of one when the stage has had as
            many more as its largest gap; between 0 and 1.
        rescale_steps: updates after which the learning rate of a stage is whole, which before is divided by a power of
            how late its gradients are; 0: it is never divided.

        compensation: what is done about gradients that are late: ``"none"``, or ``"error_feedback"``, see
            :mod:`.staleness`.
        strength: by how much more, or less, than the plan's figure error feedback looks ahead.

        update_delay: for every stage, backwards of the next windows that a rank may run on it, at most, before the
            update of the closed window; above 0 the closed window's gradient is parked meanwhile.
        decisions: how stages decide what concerns all of them, such as a norm to clip by. ``"local"``: each for itself.
            ``"latest"``: each by its own sum and the latest that it knows of the others without waiting, see
            :mod:`.decisions`. ``"relayed"``: by those of all stages for the same window, which an update waits for: it
            stands before the forward that brings them, see :meth:`forward_after`. ``"meeting"``: the homes' updates of
            a window are one meeting: every home enters with its own, and none goes on before the last has entered (the
            exact norm, a common loss scale).

        priorities: the orders to choose from, by trial under the costs at hand, what a rank starts.
        alternatives: like schedules that need less memory, the least first. A planner takes the first that is
            nearly as fast, under the costs at hand, as any of them and as this one, whose bounds hold for all.
        smaller: makes the like schedule of at most so many stages (an even number), with the same priorities and
            with windows and alternatives in proportion. On it a planner makes the trials of a deep pipeline; without
            it they are made at full depth.
        options: the options the schedule was made with, for reports.

    The name apart, these say, in order: what is done with each micro-batch and what that costs; how the stages
    come to their updates; and what is left to tune.

    Raises:
        ValueError: when the numbers cannot make a schedule, or a priority cannot order two actions.
    """

    name: str

    placement: Placement
    micro_batches: int
    flush_every: int
    in_flight: tuple[int, ...]
    max_gap: tuple[int, ...]
    tied: Tied = ()
    flush_first: int = 0
    weights: str = "latest"
    weight_versions: tuple[int, ...] = ()
    correction_decay: float = 0.0
    rescale_steps: int = 0
    compensation: str = "none"
    strength: float = 1.0

    update_delay: tuple[int, ...] = ()
    decisions: str = "local"

    priorities: tuple[Priority, ...] = (backward_first,)
    alternatives: tuple[Schedule, ...] = ()
    smaller: Callable[[int], Schedule] | None = field(default=None, compare=False)
    options: dict[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        stages, directions = self.placement.num_stages, self.placement.directions
        if self.micro_batches < 1:
            raise ValueError(f"{self.name}: a window needs at least one micro-batch, got {self.micro_batches}")
        if self.micro_batches % directions:
            below = self.micro_batches // directions * directions
            nearest = f"{below} or {below + directions}" if below else f"{directions}"
            raise ValueError(
                f"{self.name}: {self.micro_batches} micro-batches do not divide over {directions} directions; "
                f"use {nearest}"
            )
        if self.flush_every < 0:
            raise ValueError(f"{self.name}: flush_every counts windows, 0 for never; got {self.flush_every}")
        if self.flush_first < 0 or (self.flush and self.flush_first):
            why = "it flushes at every window anyway: leave it out" if self.flush else "it counts windows, at least 0"
            raise ValueError(f"{self.name}: flush_first cannot be {self.flush_first}; {why}")
        if len(self.in_flight) != stages or len(self.max_gap) != stages:
            raise ValueError(f"{self.name}: in_flight and max_gap need one entry for each of {stages} stages")
        if min(self.in_flight) < 1:
            raise ValueError(f"{self.name}: every stage must admit at least one micro-batch, got {self.in_flight}")
        if not self.keeps_versions and not self.weight_versions:
            object.__setattr__(self, "weight_versions", (1,) * self.num_stages)
        check_weights(self)
        check_compensation(self)
        if self.decisions not in DECISIONS:
            raise ValueError(f"{self.name}: decisions are {', '.join(DECISIONS)}; got {self.decisions!r}")
        self.sharing.check(self.name, self.weights, self.together)
        if self.relays or not self.update_delay:
            object.__setattr__(self, "update_delay", delays_of(self))
        check_delays(self)
        self._try_priorities()

    def _try_priorities(self) -> None:
        """They are called in earnest only where a rank has a choice, which may come late in a run."""
        if not self.priorities:
            raise ValueError(f"{self.name}: priorities are empty; leave them out for a backward before a forward")
        stages, indices = range(self.num_stages), (0, self.micro_batches)
        sample = [Action(stage, kind, index) for stage in stages for kind in (FORWARD, BACKWARD) for index in indices]
        for priority in self.priorities:
            self.preferred(priority, [(action, 0.0) for action in sample])

    @property
    def num_stages(self) -> int:
        return self.placement.num_stages

    @property
    def num_ranks(self) -> int:
        return self.placement.num_ranks

    @cached_property
    def sharing(self) -> Sharing:
        """Who holds which stage, and which tied weight."""
        return Sharing(self.placement, self.tied)

    @property
    def flush(self) -> bool:
        """Whether every window ends with a flush, so that no version ever differs."""
        return self.flush_every == 1

    @property
    def reduces(self) -> bool:
        """Whether some stage lives on several ranks, so that their gradients must meet."""
        return any(len(holders) > 1 for holders in self.placement.holders)

    @property
    def together(self) -> bool:
        """Whether the updates of a window are one meeting."""
        return self.decisions == "meeting"

    @property
    def relays(self) -> bool:
        """Whether a window may close before its update, which waits for what is relayed to it."""
        return self.decisions == "relayed"

    @property
    def keeps_versions(self) -> bool:
        """Whether a backward uses a version of the weights that was kept for it."""
        return self.weights in KEPT

    @property
    def extrapolates(self) -> bool:
        """Whether a forward or a backward uses weights that no update has made."""
        return self.weights not in ("latest", *KEPT)

    @property
    def updates_meet(self) -> bool:
        """Whether all stages update at one point, where they can decide together: on a norm or a loss scale."""
        return self.flush or self.together

    def opening(self) -> Schedule | None:
        """What is run in the first :attr:`flush_first` windows of a job: the same with a flush at every window, so that
        no gradient is late while weights change fastest (arXiv 1910.05124, section 3.3). The window after them begins
        with an empty pipeline. ``None`` where there are no such windows."""
        if not self.flush_first:
            return None
        return replace(
            self, flush_every=1, flush_first=0, max_gap=(0,) * self.num_stages, weights="latest", weight_versions=(),
            correction_decay=0.0, rescale_steps=0, compensation="none", update_delay=(), alternatives=(), smaller=None,
        )  # fmt: skip

    def forward_after(self, window: int) -> int:
        """The first micro-batch that all stages forward after their update of ``window``, where decisions are relayed:
        the first that stage 0 can forward after it has closed the window, and what the others know with it."""
        first = (window + 1) * self.micro_batches + self.in_flight[0] - 1
        if not self.flush_every:
            return first
        return min(first, (window // self.flush_every + 1) * self.flush_every * self.micro_batches)

    def updates_before(self, micro_batch: int) -> int:
        """Updates that a stage must have had before it forwards ``micro_batch``: those up to the latest flush, those
        that made the weights that it uses, and those whose decisions come with it."""
        window = micro_batch // self.micro_batches
        flushed = window // self.flush_every * self.flush_every if self.flush_every else 0
        if self.relays:
            return max(flushed, (micro_batch - self.in_flight[0] + 1) // self.micro_batches)
        return max(flushed, window - 1) if self.weights == "previous" else flushed

    def forward_version(self, window: int, updates: int, entered: int) -> int:
        """The version of its weights that a stage forwards a micro-batch of ``window`` with.

        Args:
            window: counted from the last time that the pipeline was empty, as are versions.
            updates: that the stage has had.
            entered: those that stage 0 had had when it forwarded the micro-batch.
        """
        return {"previous": max(0, window - 1), "synchronized": entered}.get(self.weights, updates)

    def backward_version(self, forward: int, updates: int) -> int:
        """The version that the backward of a micro-batch uses, which was forwarded with version ``forward``."""
        return forward if self.keeps_versions else updates

    def preferred(self, priority: Priority, ready: Iterable[tuple[Action, float]]) -> Action:
        """Of what a rank could start, and since when, that which ``priority`` puts first.

        Raises:
            ValueError: when it fails, or what it returns cannot be compared.
        """
        try:
            return min(ready, key=lambda entry: priority(*entry))[0]
        except Exception as error:  # whoever wrote it may have made any mistake
            called = getattr(priority, "__qualname__", repr(priority))
            raise ValueError(
                f"{self.name}: the priority {called} failed with {type(error).__name__}: {error}; it takes an action "
                "(stage, kind F or B, micro-batch) and the instant since which it could start, and returns a tuple"
            ) from error

    def micro_batches_of(self, window: int, direction: int) -> range:
        """The micro-batches of ``window`` in ``direction``."""
        first, after = window * self.micro_batches, (window + 1) * self.micro_batches
        return range(first + direction, after, self.placement.directions)

    def backwards_per_window(self, rank: int, stage: int) -> int:
        """Backwards of ``stage`` that ``rank`` runs in one window."""
        directions = sum(row[stage] == rank for row in self.placement.ranks)
        return directions * self.micro_batches // self.placement.directions

    def windows_late(self, rank: int, stage: int) -> int:
        """Windows that ``rank`` closes, at most, between the last backward of a window on ``stage`` and its update.

        For a guest of a tied weight: until its home has stepped it, the first stage lets no more in.
        """
        if self.sharing.is_tied(stage):
            home = self.sharing.stages(stage)[0]
            return 0 if rank == self.placement.home(home) else -(-self.in_flight[home] // self.micro_batches)
        delay, per_window = self.update_delay[stage], self.backwards_per_window(rank, stage)
        if self.relays and delay:
            # What brings the decision may be sent in a later window than the last backward before the update.
            return 1 + delay // per_window
        return -(-delay // per_window)

    def owner(self, action: Action) -> int | None:
        """The rank of a forward or backward; ``None`` for R and U, which every holder of the stage runs."""
        if action.kind in (FORWARD, BACKWARD):
            return self.placement.rank_of(action.stage, action.index)
        return None

    def computes(self, rank: int, action: Action) -> bool:
        """Whether ``action`` is work for ``rank``, and not messages alone: a guest does not step its stage, and a tied
        weight is stepped with its home's."""
        if self.sharing.is_tied(action.stage):
            return False
        return action.kind != UPDATE or rank == self.placement.home(action.stage)

    def message(self, rank: int, action: Action) -> Place | None:
        """Where what ``action`` computes on ``rank`` goes: the receiving rank, and the action that needs it.

        ``None`` when nobody needs it, or when the same rank does. For the messages of R and U, which may have
        several receivers, see :meth:`dependencies`.
        """
        step = {FORWARD: 1, BACKWARD: -1}.get(action.kind, 0)
        stage = action.stage + step
        if not step or not 0 <= stage < self.num_stages:
            return None
        receiver = self.placement.rank_of(stage, action.index)
        return None if receiver == rank else (receiver, Action(stage, action.kind, action.index))

    def meeting(self, rank: int, action: Action) -> tuple[Place, ...]:
        """The updates that ``action`` on ``rank`` goes on with only when each of their ranks has entered, its own
        among them; empty when it is none of a meeting."""
        stage, kind, index = action
        if not self.together or kind != UPDATE or rank != self.placement.home(stage):
            return ()
        return tuple((self.placement.home(other), Action(other, UPDATE, index)) for other in range(self.num_stages))

    def dependencies(self, rank: int, action: Action) -> Iterable[Place]:
        """What must have happened before ``rank`` may run ``action``: (rank, action) pairs (laws 2 to 4).

        What the rank itself must have done comes first, so that messages blame the nearest cause. A pair of another
        rank is a message from there: activations and gradients, a guest's gradients of a window (R) to the
        stage's home, the home's new weights (U) to its guests. A meeting is no message: see :meth:`meeting`.
        How an update relates to the backwards around it depends on where it stands in the row, not on
        the action alone: see :mod:`.verify`.
        """
        stage, kind, index = action
        if kind == FORWARD:
            above = ((self.placement.rank_of(stage - 1, index), Action(stage - 1, FORWARD, index)),) if stage else ()
            updates = self.updates_before(index)
            if not updates:
                return above
            held = (stage, *self.sharing.of_stage[stage])
            return *((rank, Action(unit, UPDATE, updates - 1)) for unit in held), *above
        if kind == BACKWARD:
            own = rank, Action(stage, FORWARD, index)
            if stage == self.num_stages - 1:
                return (own,)
            return own, (self.placement.rank_of(stage + 1, index), Action(stage + 1, BACKWARD, index))
        return self._window_dependencies(rank, action)

    def _window_dependencies(self, rank: int, action: Action) -> Iterator[Place]:
        """Of a reduction or an update."""
        stage, kind, index = action
        home, *guests = self.sharing.holders[stage]
        if kind == REDUCE:
            yield from self._own_backwards(rank, self.sharing.stage_on(rank, stage), index)
            if rank == home:
                yield from ((guest, action) for guest in guests)
        elif rank != home:
            yield home, action
        elif self.sharing.is_tied(stage):
            yield home, Action(self.sharing.stage_on(home, stage), UPDATE, index)
        elif self.together:
            for other in self.placement.stages[rank]:
                if rank == self.placement.home(other):
                    yield from self.gathered(other, index)
        else:
            yield from self.gathered(stage, index)
            if self.relays and stage:
                bringing = self.forward_after(index)
                yield self.placement.rank_of(stage - 1, bringing), Action(stage - 1, FORWARD, bringing)

    def gathered(self, stage: int, window: int) -> Iterator[Place]:
        """After what the home of ``stage`` has its whole gradient of ``window``."""
        home = self.placement.home(stage)
        if len(self.placement.holders[stage]) > 1:
            yield home, Action(stage, REDUCE, window)
        else:
            yield from self._own_backwards(home, stage, window)
        yield from ((home, Action(unit, REDUCE, window)) for unit in self.sharing.at_home(stage))

    def _own_backwards(self, rank: int, stage: int, window: int) -> Iterator[Place]:
        directions = [direction for direction, row in enumerate(self.placement.ranks) if row[stage] == rank]
        for first in self.micro_batches_of(window, 0):
            for direction in directions:
                yield rank, Action(stage, BACKWARD, first + direction)
