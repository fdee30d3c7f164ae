"""Weights beside those that an optimizer steps, for schedules that say which a forward and backward use.

Versions that are used again are kept here; weights that no update has made are :mod:`.extrapolation`'s. A graph may
have saved a weight itself or a view of its memory (``weight.t()``). So a version has memory of its own, which nothing
ever writes to, and the parameters point to it at the forward and at the backward alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from ..plan.action import Action
from ..plan.entry_versions import EntryVersions
from ..plan.planner import Planner
from ..plan.schedule import Schedule
from .extrapolation import ExtrapolatedWeights


class KeptWeights:
    """The versions that are in use of the stages on one rank.

    Args:
        schedule: what is run. Of a stage that uses one version at a time nothing is kept.
        parameters: of a stage, those that are trained.
        extrapolation: of the stage at home here, where the schedule has some.

    Attributes:
        most: for every stage, how many versions have been kept at once, at most.
    """

    def __init__(
        self,
        schedule: Schedule,
        parameters: Callable[[int], Iterable[nn.Parameter]],
        extrapolation: ExtrapolatedWeights | None = None,
    ) -> None:
        self._schedule, self._parameters = schedule, parameters
        self._extrapolation = extrapolation or ExtrapolatedWeights(0, (), ())
        self._kept: dict[int, dict[int, list[Tensor]]] = {}
        self._entries: EntryVersions | None = None
        self._base = 0
        self.most: dict[int, int] = {}

    def forward_version(self, forward: Action, running: Planner, base: int, latest: int) -> int:
        """The version that ``forward`` uses.

        Args:
            running: the program that it is of, and
            base: the window at which that began.
            latest: what the optimizer of the stage steps.
        """
        schedule, entered = running.schedule, 0
        if schedule.weights == "synchronized":
            if self._entries is None:
                self._entries, self._base = EntryVersions(running), base
            entered = self._entries.enter(forward.index - base * schedule.micro_batches)
        window = forward.window(schedule.micro_batches)
        return base + schedule.forward_version(window - base, latest - base, entered)

    @contextmanager
    def using(self, action: Action, forward: int, version: int, latest: int) -> Iterator[None]:
        """Let the parameters of its stage be what ``action``, a forward or a backward, computes with.

        Args:
            forward: the version that its forward has, and
            version: that which it has itself, of which
            latest: is what the optimizer of the stage steps.
        """
        with self._version(action.stage, version, latest), self._extrapolation.using(action, forward, latest):
            yield

    @contextmanager
    def _version(self, stage: int, version: int, latest: int) -> Iterator[None]:
        if not self._keeps(stage):
            yield
            return
        if version == latest:
            self.keep(stage, latest)
        parameters = list(self._parameters(stage))
        stepped = [parameter.data for parameter in parameters]
        for parameter, value in zip(parameters, self._kept[stage][version], strict=True):
            parameter.data = value
        try:
            yield
        finally:
            for parameter, value in zip(parameters, stepped, strict=True):
                parameter.data = value

    def stepping(self, update: Action, latest: int) -> AbstractContextManager[None]:
        """Within it the host makes ``update``. What that is about to overwrite is kept, where later forwards use it."""
        if self._schedule.weights in ("previous", "synchronized"):
            self.keep(update.stage, latest)
        return self._extrapolation.stepping(update.index)

    def drop(self, stage: int, in_flight: Iterable[int], latest: int) -> None:
        """Let go of all versions of ``stage`` but those of what is in flight, and what later forwards may use."""
        oldest = latest if self._entries is None else self._base + self._entries.oldest
        later = range(latest - 1 if self._schedule.weights == "previous" else oldest, latest + 1)
        wanted, kept = {*in_flight, *later}, self._kept.get(stage, {})
        for version in [version for version in kept if version not in wanted]:
            del kept[version]

    def clear(self) -> None:
        """Nothing is in flight."""
        self._kept.clear()
        self._entries = None
        self._extrapolation.clear()

    @torch.no_grad()
    def keep(self, stage: int, latest: int) -> None:
        """Keep a copy of what the optimizer of ``stage`` steps, its version ``latest``."""
        kept = self._kept.setdefault(stage, {})
        if latest not in kept:
            kept[latest] = [parameter.detach().clone() for parameter in self._parameters(stage)]
            self.most[stage] = max(self.most.get(stage, 0), len(kept))

    def tensors(self) -> Iterator[Tensor]:
        """What lies in memory now."""
        yield from self._extrapolation.kept()
        for versions in self._kept.values():
            for values in versions.values():
                yield from values

    def _keeps(self, stage: int) -> bool:
        return self._schedule.weight_versions[stage] > 1
