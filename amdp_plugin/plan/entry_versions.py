"""The version that a micro-batch meets on stage 0, for stages that use the same (vertical sync)."""

from __future__ import annotations

from .action import FORWARD, UPDATE
from .planner import Planner


class EntryVersions:
    """Of the program of ``planner``, as it goes on for ever. Micro-batches are asked for in turn."""

    def __init__(self, planner: Planner) -> None:
        self._planner, self._rank = planner, planner.schedule.placement.home(0)
        self._window = self._updates = self._next = 0
        self._met: dict[int, int] = {}

    def enter(self, micro_batch: int) -> int:
        """The version that ``micro_batch`` meets there. Those before it are not asked for again."""
        version, self._next = self._of(micro_batch), micro_batch + 1
        for number in [number for number in self._met if number < micro_batch]:
            del self._met[number]
        return version

    @property
    def oldest(self) -> int:
        """The oldest version that those after it meet."""
        return self._of(self._next)

    def _of(self, micro_batch: int) -> int:
        while micro_batch not in self._met:
            for stage, kind, index in self._planner.row(self._window, self._rank):
                if stage == 0 and kind == UPDATE:
                    self._updates += 1
                elif stage == 0 and kind == FORWARD:
                    self._met[index] = self._updates
            self._window += 1
        return self._met[micro_batch]
