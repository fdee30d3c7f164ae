"""What a rank can do, and what of it is the same under all hosts: data, random numbers, guests, cancelling."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..plan.action import Action
from ..plan.schedule import Schedule
from .channels import Tensors
from .feed import Feed
from .losses import WindowLosses
from .random_streams import RandomStreams
from .replica import Guest
from .stage import copy_buffers, gradients_of, restore_buffers
from .tied import Replicas, tied_guests


class StagesWorker(ABC):
    """The stages of one rank. The executor says when, a host how they compute.

    Micro-batches and windows are numbered from the job's start.

    Args:
        schedule: what is run.
        feed: micro-batches by number; ``None`` where no first or last stage is.
        streams: a stream of random numbers for each direction.
        losses: of the windows under way.
        replicas: the stages and tied weights here that other ranks hold too.
    """

    def __init__(
        self,
        schedule: Schedule,
        feed: Feed | None,
        streams: RandomStreams,
        losses: WindowLosses,
        replicas: Replicas,
    ) -> None:
        self.schedule, self.streams, self.losses, self.replicas = schedule, streams, losses, replicas
        self.feed = feed
        self.directions, self.last_stage = schedule.placement.directions, schedule.num_stages - 1

    # A host's

    @abstractmethod
    def module(self, stage: int) -> nn.Module:
        """What runs ``stage`` here."""

    @abstractmethod
    def run_forward(self, action: Action, inputs: Tensors | None) -> Tensors | None:
        """As :meth:`forward`; random numbers are those of its direction."""

    @abstractmethod
    def run_backward(self, action: Action, gradients: Tensors | None) -> Tensors:
        """Accumulate the gradients of the weights; returns the forward's inputs, which have theirs."""

    @abstractmethod
    def forget(self, action: Action) -> None:
        """The forward ``action`` is cancelled."""

    @abstractmethod
    def close(self, update: Action) -> None:
        """The window of ``update`` has closed, which comes later."""

    @abstractmethod
    def drop(self, update: Action) -> None:
        """``update``, of a window that has closed, is not made."""

    @abstractmethod
    def update(self, action: Action) -> None:
        """At the home of a stage: apply the window's mean gradient to it, under the graphs that are alive."""

    @abstractmethod
    def end_of_backwards(self, window: int, direction: int) -> None:
        """The last stage of ``direction`` has sent its last gradient of ``window``, whose update is still to come:
        time to report the loss."""

    @abstractmethod
    def parked(self) -> Iterable[Tensor]:
        """The gradients of closed windows that wait for their update."""

    # The same everywhere

    def has_window(self, window: int) -> bool:
        """Where a first or last stage is: whether there is data for the whole window."""
        assert self.feed is not None, "the ranks of first and last stages need data"
        return self.feed.has((window + 1) * self.schedule.micro_batches - 1)

    def parameters(self, stage: int) -> list[nn.Parameter]:
        """Those of ``stage`` that are trained."""
        return [parameter for parameter in self.module(stage).parameters() if parameter.requires_grad]

    @contextmanager
    def keeping_tied(self) -> Iterator[None]:
        """Around a step, whose optimizer may know of weights that are at home elsewhere: they stay as they are."""
        yield
        for guest in tied_guests(self.replicas):
            guest.write()

    def runs_freely(self, update: Action) -> bool:
        """Whether ``update`` is not of the windows at the start that end with a flush."""
        return update.index >= self.schedule.flush_first

    def take(self, micro_batch: int) -> Any:
        """The data of ``micro_batch``."""
        assert self.feed is not None
        return self.feed.take(micro_batch)

    def forward(self, action: Action, inputs: Tensors | None) -> Tensors | None:
        """Forward one micro-batch; ``inputs`` is ``None`` on the first stage, the result on the last."""
        with self.streams.drawing(action.index % self.directions):
            return self.run_forward(action, inputs)

    def backward(self, action: Action, gradients: Tensors | None) -> Tensors | None:
        """Accumulate the gradients of one micro-batch. Takes those of the forward's floating-point outputs
        (``None`` on the last stage), returns those of its floating-point inputs (``None`` on the first)."""
        inputs = self.run_backward(action, gradients)
        replica = self.replicas.get(action.stage)
        if isinstance(replica, Guest):
            replica.accumulate()
        return None if action.stage == 0 else gradients_of(inputs)

    def release(self, action: Action) -> None:
        """The backward ``action`` is done and will not be cancelled: its data may go."""
        if self.feed is not None:
            self.feed.release(action.index)

    def snapshot(self, action: Action) -> Any:
        """Whatever the forward ``action`` is going to change besides its output: random state, buffers."""
        direction = action.index % self.directions
        return direction, self.streams.states()[direction], action.stage, copy_buffers(self.module(action.stage))

    def cancel(self, forwards: Sequence[Action], backwards: Sequence[Action], snapshots: Sequence[Any]) -> None:
        """Forget what is in flight.

        Args:
            forwards: those without a backward yet.
            backwards: those for a window that has not begun. Nothing else is in the sums of gradients then.
            snapshots: of before the first cancelled forwards, one for every direction that had any.
        """
        for action in forwards:
            self.forget(action)
        for _, _, micro_batch in (*forwards, *backwards):
            self.losses.drop(micro_batch)
        if backwards:
            for replica in self.replicas.values():
                replica.clear()
        if self.feed is not None:
            self.feed.reopen()
        for direction, state, stage, copies in snapshots:
            self.streams.restore(direction, state)
            restore_buffers(self.module(stage), copies)
