"""Everything that runs a schedule on one rank, wired once, for any host framework."""

from __future__ import annotations

import atexit
import sys
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..plan.action import Action
from ..plan.costs import CostModel
from ..plan.decisions import windows_ago
from ..plan.devices import ON_HOSTS
from ..plan.messages import Stream, links
from ..plan.planner import Planner
from ..plan.report import Report, report
from ..plan.schedule import Schedule
from ..plan.tied import buffers
from .agreement import plan_together
from .channels import Channels, keep_sent
from .decisions import Decisions
from .device import device_of
from .exchange import Exchange
from .executor import Executor
from .extrapolation import ExtrapolatedWeights
from .feed import Feed
from .feedback import ErrorFeedback
from .groups import MAX_CHANNELS, channels_of_a_message
from .losses import WindowLosses
from .random_streams import Generators, RandomStreams
from .runnable import check_modules, check_runnable
from .tied import Replicas, TiedGuest, tied_guests
from .tied_state import OptimizerStates, take_from_home
from .timeline import Timeline
from .transport import Transport
from .watch import PipelineStallError, Watch
from .worker import StagesWorker

DIFFERENT_PARTS = (
    "a weight that several stages share is kept in different parts by their optimizers, so that the state of all but "
    "the first means nothing: this checkpoint can be resumed under the schedule that wrote it; under one that meets, "
    "such as stock 1F1B, load it without the state of the optimizer"
)


@dataclass(frozen=True)
class Site:
    """Where a pipeline runs, as its host knows it.

    Args:
        rank: this rank in the pipeline.
        ranks: the global rank of each pipeline rank.
        group: the host's process group of these ranks.
        device: where this rank's tensors live.
        timeout_seconds: the longest that one message may take.
        dynamic_shapes: whether every activation may have other shapes than the one before.
        shapes_hint: what a user of this host can do where shapes differ and that was not asked for.
    """

    rank: int
    ranks: Sequence[int]
    group: dist.ProcessGroup
    device: torch.device
    timeout_seconds: float
    dynamic_shapes: bool = False
    shapes_hint: str = ""


class Pipeline:
    """One rank's side of a schedule: what both hosts hold, and what their engines and hooks drive.

    Made in three steps, because a host builds its guests only when all ranks have agreed on the program:
    the constructor plans and agrees, :meth:`hold` takes the replicas, :meth:`start` the worker.

    Args:
        schedule: what to run; of its alternatives the planner chooses.
        costs: what the program is made for.
        site: where.
        pull: returns this rank's next micro-batch; raises ``StopIteration`` at the end of the data.
        generators: what layers draw random numbers from.
        wanted: which micro-batches this rank reads; by default those of which it runs the first or the last stage.

    Attributes:
        executor: runs the program; there after :meth:`start`.
        planned: the figures of the program; likewise.
        decisions: what its updates take of the other stages; ``None`` where that is nothing.
        feedback: what this rank's own stage computes with, and what its optimizer goes on from.
        extrapolation: what it computes with instead, in one forward or backward.

    Raises:
        ValueError: for a schedule that can only be planned; on every rank, where their programs differ.
    """

    executor: Executor
    decisions: Decisions | None = None
    planned: Report
    feedback: ErrorFeedback
    extrapolation: ExtrapolatedWeights

    def __init__(
        self,
        schedule: Schedule,
        costs: CostModel,
        site: Site,
        pull: Callable[[], Any],
        generators: Generators,
        wanted: Callable[[int], bool] | None = None,
    ) -> None:
        self.site = site
        self._costs = costs
        self._planner, self._opening = self._plan(schedule)
        placement = self._planner.schedule.placement
        self.feed = Feed(pull, wanted or partial(placement.is_end, site.rank))
        self.random_streams = RandomStreams(placement.directions, generators)
        self.watch = Watch(site.rank, site.timeout_seconds, Timeline(device=device_of(site.device)))
        self.losses = WindowLosses()
        self.exchange: Exchange | None = None
        self.channels: Channels | None = None
        self.replicas: Replicas = {}
        self._replicated: Mapping[int, nn.Module] = {}
        self._transports: list[Transport] = []
        self._unchecked: tuple[nn.Module, ...] = ()
        self._at_rest = True
        self._shown = False
        """Whether the weights are for a checkpoint or an evaluation."""
        atexit.register(_close, weakref.ref(self))

    @property
    def schedule(self) -> Schedule:
        """What is run: of alternatives, the chosen one."""
        return self._planner.schedule

    def hold(
        self,
        replicas: Replicas,
        modules: Mapping[int, nn.Module],
        feedback: ErrorFeedback,
        states: OptimizerStates,
    ) -> None:
        """Take over the stages on this rank; guests get the weights of their homes.

        Args:
            replicas: those that other ranks hold too, home or guest, by stage; and the tied weights of this rank.
            modules: of the same, whose parameters and buffers come in one order on all ranks.
            feedback: of the stage that is at home here.
            states: of the optimizer of that stage.
        """
        self.feedback, self._states = feedback, states
        self.extrapolation = ExtrapolatedWeights(
            self.site.rank, feedback.parameters, feedback.optimizers, feedback.refresh
        )
        self.replicas, self._replicated = replicas, modules
        if self.schedule.reduces or self.schedule.tied:
            transport = self._make_transport(Stream.GRADIENTS, Stream.WEIGHTS)
            self.exchange = Exchange(self.schedule, replicas, transport, self.watch)
        self.copy_home()

    def start(self, worker: StagesWorker, window: int, modules: Iterable[nn.Module], decides: bool) -> None:
        """Prove the program, and wire it up to ``worker``, to begin with ``window``.

        Args:
            modules: the stages on this rank, which are checked when the window begins: they may be compiled until then.
            decides: whether the job has something to decide at an update. Else stages tell each other nothing, so that
                there is nothing to wait for either.
        """
        self._unchecked, self._worker = tuple(modules), worker
        schedule = self.schedule
        on_device = self.site.device.type == "cuda"
        self.planned = report(self._planner, 1, self.feedback.has_masters, on_device)
        if self.exchange is not None:
            self.exchange.provide(self.planned.provision or ON_HOSTS)
            self._provide_tied()
        self.feedback.begin(self.planned.coefficient)
        self.extrapolation.begin(self.planned.extrapolation)
        if self.channels is not None:
            self.channels.keep_sent = keep_sent(schedule)
        elif schedule.num_ranks > 1:
            transport = self._make_transport(Stream.PIPELINE)
            site = self.site
            self.channels = Channels(
                transport, self.watch, keep_sent(schedule), site.dynamic_shapes, site.shapes_hint
            )
        self.decisions, ago = None, self.planned.windows_ago
        if decides and ago is not None and self.channels is not None:
            opening = windows_ago(self._opening) if self._opening is not None else None
            self.decisions = Decisions(schedule, ago, opening, self.site.rank, self.channels, self.watch)
        self.executor = Executor(
            self._planner, self.site.rank, worker, self.channels, self.watch, self.exchange, self._opening,
            self.decisions, self.extrapolation,
        )  # fmt: skip
        self.executor.restart(window)

    def _provide_tied(self) -> None:
        programs = [planner for planner in (self._planner, self._opening) if planner is not None]
        for unit, replica in self.replicas.items():
            if isinstance(replica, TiedGuest):
                taken = [buffers(each, self.site.rank, unit, each.settled_windows()) for each in programs]
                replica.provide(*map(max, zip(*taken, strict=True)))

    def replan(self, schedule: Schedule) -> None:
        """Take ``schedule``, with windows of another size, for the next :meth:`start`; nothing may be in flight."""
        self._planner, self._opening = self._plan(schedule)

    def open_window(self) -> list[Action]:
        """This rank's actions of the next window; see :meth:`.Executor.open_window`.

        Raises:
            ValueError: before the first, for layers that no schedule, or not this one, can run.
        """
        check_modules(self.schedule, self._unchecked)
        self._unchecked = ()
        self._at_rest = False
        self.put_ahead()
        try:
            return list(self.executor.open_window())
        except StopIteration:
            self._at_rest = True
            raise

    def close_window(self) -> None:
        """All actions of the window are done."""
        self.executor.close_window()
        self._at_rest = True

    def rest(self) -> None:
        """Between two windows, for a checkpoint: nothing is in flight, replicas have the buffers of their homes, which
        a resumed run has everywhere, and this rank's own stage its plain iterate, until the next window. Of tied
        weights every optimizer keeps what that of the home does: elsewhere, each stage may step its own."""
        self.executor.quiesce()
        self.copy_home()
        self.put_plain()
        if self.exchange is not None and self.schedule.tied:
            tied = {unit: module for unit, module in self._replicated.items() if self.schedule.sharing.is_tied(unit)}
            if not take_from_home(self.exchange, tied, self._states):
                warnings.warn(DIFFERENT_PARTS, stacklevel=2)

    def put_plain(self) -> None:
        """Between two windows, for a checkpoint or an evaluation: let this rank's own stage hold its plain iterate, and
        what of it is at home elsewhere that of the home after its latest update, until the next window. All ranks must
        call it."""
        self.feedback.put_plain()
        if self.exchange is not None and not self._shown:
            self.exchange.show_homes(self._replicated)
        self._shown = True

    def put_ahead(self) -> None:
        """Let this rank's own stage hold what it computes with again."""
        self.feedback.put_ahead()
        if self._shown:
            for guest in tied_guests(self.replicas):
                guest.write()
        self._shown = False

    def settle(self) -> None:
        """Between two windows, for an evaluation: all stages are at one version, and this rank's own stage has its
        plain iterate, until the next window. What is in flight stays, unless stages are at several versions."""
        if self.schedule.relays:
            self.executor.quiesce()
        self.put_plain()

    def restart(
        self, window: int, random_states: list[Any] | None, ahead: Sequence[Tensor] | None = None,
        means: Sequence[Tensor] | None = None,
    ) -> None:  # fmt: skip
        """Go on from a checkpoint: nothing is in flight, and data that was read ahead is dropped.

        Args:
            window: updates that the checkpoint's weights have had.
            random_states: what its streams of random numbers would draw next, where it tells.
            ahead: what this rank's own stage computed with, likewise; see :meth:`.ErrorFeedback.restart`.
            means: of its updates, likewise; see :meth:`.ExtrapolatedWeights.restart`.
        """
        self.feedback.restart(ahead)
        self.extrapolation.restart(means)
        if random_states:
            self.random_streams.load(random_states)
        self.copy_home()
        self.executor.restart(window)
        self.feed.restart(window * self.schedule.micro_batches)

    def copy_home(self) -> None:
        """Let the guests take the weights and buffers of their homes; nothing may be in flight."""
        self.put_ahead()
        if self.exchange is not None:
            self.exchange.copy_home(self._replicated)

    def other_weights(self) -> list[Tensor]:
        """What is kept of the weights on this rank beside those that stages compute with and optimizers step."""
        return [*self.feedback.kept(), *self.executor.kept.tensors()]

    def parked_gradients(self) -> Iterable[Tensor]:
        """Of closed windows of this rank's own stage, those that wait for their update now."""
        return self._worker.parked()

    @property
    def windows_late(self) -> int:
        """Windows that an update stands behind the end of its own, at most."""
        homes = enumerate(holders[0] for holders in self.schedule.placement.holders)
        return max(self.schedule.windows_late(rank, stage) for stage, rank in homes)

    @property
    def holds_more(self) -> bool:
        """Whether some rank holds more of weights or gradients than under 1F1B; the same answer on all."""
        planned, schedule = self.planned, self.schedule
        return schedule.reduces or self.keeps_weights or max(planned.gradient_copies_by_rank) > 1

    @property
    def most_parked(self) -> int:
        """How many windows of this rank's own stage wait for their update at once."""
        rank = self.site.rank
        return self.planned.gradient_copies_by_rank[rank] - len(self.schedule.placement.stages[rank])

    @property
    def keeps_weights(self) -> bool:
        """Whether error feedback or extrapolation may keep some of these, on some rank."""
        return self.planned.coefficient is not None or self.planned.extrapolation is not None

    def bytes_kept(self) -> tuple[int, int]:
        """Of these, those of error feedback and those of extrapolation."""
        return self.feedback.bytes_kept(), self.extrapolation.bytes_kept()

    def exchange_buffers(self) -> Iterable[Tensor]:
        """The memory that replicas exchange gradients and weights through on this rank."""
        return () if self.exchange is None else self.exchange.buffers()

    def _plan(self, schedule: Schedule) -> tuple[Planner, Planner | None]:
        """The program, and that of the first windows where it is another, on which all ranks agree, before anything is
        made for them."""
        check_runnable(schedule)
        found = plan_together(schedule, self._costs, self.site.group, self.site.device)
        opening = found.schedule.opening()
        if opening is None:
            return found, None
        return found, plan_together(opening, self._costs, self.site.group, self.site.device)

    def _make_transport(self, *streams: Stream) -> Transport:
        """Of these alone: over gloo, a large gradient would hold up activations on the same connection."""
        site = self.site
        channels = MAX_CHANNELS
        if site.device.type == "cuda":
            multiprocessors = torch.cuda.get_device_properties(site.device).multi_processor_count
            channels = channels_of_a_message(multiprocessors, most_links(self.schedule))
        chosen = links(self.schedule, *streams)
        self._transports.append(Transport(site.ranks, chosen, site.device, self.watch, channels))
        return self._transports[-1]


def most_links(schedule: Schedule) -> int:
    """The links of the rank that has most: each can have one message under way on the rank's device."""
    ends = (rank for link in links(schedule, *Stream) for rank in (link.sender, link.receiver))
    return max(Counter(ends).values(), default=0)


def _close(reference: weakref.ref[Pipeline]) -> None:
    """See this rank's last messages out before the process ends, where all ended well: others may wait for them.
    Where not, give them up: the process could not end."""
    pipeline = reference()
    if pipeline is None or not hasattr(pipeline, "executor"):
        return
    if pipeline._at_rest and not hasattr(sys, "last_value"):
        with suppress(PipelineStallError):
            pipeline.executor.quiesce(updates=False)  # a script may have destroyed the groups that they use
            return
    for transport in pipeline._transports:
        transport.abort()
