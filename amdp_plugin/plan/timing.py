"""When the actions of a program ran or are going to run, as a value."""

from __future__ import annotations

from dataclasses import dataclass

from .action import BACKWARD
from .costs import TICKS_PER_SECOND, CostModel
from .program import Program
from .spans import Span


@dataclass(frozen=True)
class Timing:
    """``spans[rank][i]`` is (start, end), in nanoseconds, of ``program.rows[rank][i]``."""

    program: Program
    costs: CostModel
    spans: tuple[tuple[Span, ...], ...]

    def busy(self, first: int, last: int) -> tuple[int, ...]:
        """For every rank, the nanoseconds it works for the windows ``first`` to ``last - 1``."""
        size = self.program.schedule.micro_batches
        return tuple(
            sum(
                end - start
                for action, (start, end) in zip(row, spans, strict=True)
                if first <= action.window(size) < last
            )
            for row, spans in zip(self.program.rows, self.spans, strict=True)
        )

    def window_end(self, window: int) -> int:
        """The instant at which the last rank ends its last backward of ``window``."""
        return max(self._last_backward(rank, window) for rank in range(len(self.spans)))

    def seconds_per_window(self, first: int, last: int) -> float:
        """Mean seconds of a window between the ends of the windows ``first - 1`` and ``last - 1``."""
        return self._ticks_between(first, last) / ((last - first) * TICKS_PER_SECOND)

    def utilization(self, first: int, last: int) -> float:
        """Busy share of all ranks between two like instants: the ends of windows ``first - 1`` and ``last - 1``."""
        return sum(self.busy(first, last)) / (self._ticks_between(first, last) * len(self.spans))

    def _ticks_between(self, first: int, last: int) -> int:
        return self.window_end(last - 1) - (self.window_end(first - 1) if first else 0)

    def _last_backward(self, rank: int, window: int) -> int:
        """A rank does one thing after the other, so that the last one in its row ends last."""
        size = self.program.schedule.micro_batches
        return next(
            end
            for action, (_, end) in zip(reversed(self.program.rows[rank]), reversed(self.spans[rank]), strict=True)
            if action.kind == BACKWARD and action.index // size == window
        )
