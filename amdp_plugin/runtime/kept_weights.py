"""Versions of weights beside those that an optimizer steps, for schedules that say which a forward and backward use.

A graph may have saved a weight itself or a view of its memory (``weight.t()``). So a version has memory of its own,
which nothing ever writes to, and the parameters point to it at the forward and at the backward alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..plan.schedule import Schedule


class KeptWeights:
    """The versions that are in use of the stages on one rank.

    Args:
        schedule: what is run. Of a stage that uses one version at a time nothing is kept.
        parameters: of a stage, those that are trained.

    Attributes:
        most: for every stage, how many versions have been kept at once, at most.
    """

    def __init__(self, schedule: Schedule, parameters: Callable[[int], Iterable[nn.Parameter]]) -> None:
        self._schedule, self._parameters = schedule, parameters
        self._kept: dict[int, dict[int, list[Tensor]]] = {}
        self.most: dict[int, int] = {}

    @contextmanager
    def using(self, stage: int, version: int, latest: int) -> Iterator[None]:
        """Let the parameters of ``stage`` be those of ``version``, of which ``latest`` is what its optimizer steps."""
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

    def before_update(self, stage: int, latest: int) -> None:
        """Keep what a step is about to overwrite, where later forwards use it."""
        if self._schedule.weights == "previous":
            self.keep(stage, latest)

    def drop(self, stage: int, in_use: Iterable[int]) -> None:
        """Let go of all versions but those."""
        wanted, kept = set(in_use), self._kept.get(stage, {})
        for version in [version for version in kept if version not in wanted]:
            del kept[version]

    def clear(self) -> None:
        """Nothing is in flight."""
        self._kept.clear()

    @torch.no_grad()
    def keep(self, stage: int, latest: int) -> None:
        """Keep a copy of what the optimizer of ``stage`` steps, its version ``latest``."""
        kept = self._kept.setdefault(stage, {})
        if latest not in kept:
            kept[latest] = [parameter.detach().clone() for parameter in self._parameters(stage)]
            self.most[stage] = max(self.most.get(stage, 0), len(kept))

    def tensors(self) -> Iterator[Tensor]:
        """What lies in memory now."""
        for versions in self._kept.values():
            for values in versions.values():
                yield from values

    def _keeps(self, stage: int) -> bool:
        return self._schedule.weight_versions[stage] > 1
