"""What things cost: the numbers a schedule is planned and predicted with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf, isfinite

from .action import BACKWARD, FORWARD, UPDATE, Action

TICKS_PER_SECOND = 1_000_000_000
MOST_SECONDS = 1e9
"""Of one action or message: 31 years, so that times stay far from what a float cannot hold."""


def ticks(seconds: float) -> int:
    """Whole nanoseconds. Times are added as integers so that equal windows are exactly equal."""
    return round(seconds * TICKS_PER_SECOND)


ONE_TICK = 1 / TICKS_PER_SECOND


@dataclass(frozen=True)
class CostModel:
    """Seconds of each stage's forward and backward, of an update, and of a message.

    Args:
        forward: seconds of one micro-batch's forward, one entry a stage.
        backward: seconds of one micro-batch's backward, one entry a stage.
        update: seconds of one optimizer step of a stage, one entry a stage.
        link_latency: seconds that every message between two ranks takes, whatever its size.
        message_bytes: bytes of one activation (its gradient has as many).
        link_bandwidth: bytes a second between two ranks.

    Raises:
        ValueError: for a cost that is negative, not a number or absurdly large, or a forward or backward that takes no
            time.
    """

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    update: tuple[float, ...]
    link_latency: float = 0.0
    message_bytes: float = 0.0
    link_bandwidth: float = float("inf")

    def __post_init__(self) -> None:
        if not len(self.forward) == len(self.backward) == len(self.update):
            raise ValueError(
                f"forward, backward and update need one entry a stage; got {len(self.forward)}, "
                f"{len(self.backward)} and {len(self.update)}"
            )
        for what, seconds in (("forward", self.forward), ("backward", self.backward)):
            for stage, each in enumerate(seconds):
                if not ONE_TICK <= each <= MOST_SECONDS:
                    raise ValueError(
                        f"a {what} takes from {ONE_TICK:g} to {MOST_SECONDS:g} (seconds, or forwards of cost 1); that "
                        f"of stage {stage} takes {each:g}"
                    )
        others = (*self.update, self.link_latency, self.message_bytes)
        if not all(map(isfinite, others)):
            raise ValueError(f"every cost is a finite number; got {others}")
        if self.link_latency > MOST_SECONDS:
            raise ValueError(f"a message takes at most {MOST_SECONDS:g}, got {self.link_latency:g}")
        if min(*self.update, self.link_latency, self.message_bytes) < 0 or not self.link_bandwidth > 0:
            raise ValueError(
                "update, link_latency and message_bytes cannot be negative, link_bandwidth must be positive"
            )

    @classmethod
    def uniform(
        cls,
        num_stages: int,
        *,
        forward: float = 1.0,
        backward_ratio: float = 2.0,
        update: float = 0.0,
        link_latency: float = 0.0,
    ) -> CostModel:
        """Equal stages; the backward takes ``backward_ratio`` forwards."""
        return cls(
            (forward,) * num_stages,
            (forward * backward_ratio,) * num_stages,
            (update,) * num_stages,
            link_latency,
        )

    @classmethod
    def relative(
        cls, num_stages: int, *, backward_ratio: float = 2.0, link_cost: float = 0.0, stage_costs: Sequence[float] = ()
    ) -> CostModel:
        """Costs in forwards: what users can say of a pipeline that they have not measured.

        Args:
            backward_ratio: time of a backward, in forwards of its stage.
            link_cost: time of a message between ranks, in forwards of cost 1.
            stage_costs: time of every stage's forward; all 1 where it is empty.

        Raises:
            ValueError: when ``stage_costs`` are of another number of stages, or for a cost that is none.
        """
        forward = tuple(stage_costs) or (1.0,) * num_stages
        if len(forward) != num_stages:
            raise ValueError(f"stage costs need one entry for each of {num_stages} stages, got {len(forward)}")
        for stage, cost in enumerate(forward):
            if not 0 < cost < inf:
                raise ValueError(f"stage costs are numbers above 0; that of stage {stage} is {cost:g}")
        backward = tuple(cost * backward_ratio for cost in forward)
        return cls(forward, backward, (0.0,) * num_stages, link_latency=link_cost)

    def sampled(self, num_stages: int) -> CostModel:
        """The costs of a like pipeline of fewer stages: those of stages at equal distances, both ends among them."""
        step = (self.num_stages - 1) / max(1, num_stages - 1)
        kept = [round(stage * step) for stage in range(num_stages)]
        tables = (self.forward, self.backward, self.update)
        forward, backward, update = (tuple(table[stage] for stage in kept) for table in tables)
        return replace(self, forward=forward, backward=backward, update=update)

    @property
    def num_stages(self) -> int:
        return len(self.forward)

    def action_ticks(self, action: Action) -> int:
        """Nanoseconds that ``action`` keeps its rank busy."""
        table = self._seconds(action.kind)
        return ticks(table[action.stage]) if table else 0

    def link_ticks(self) -> int:
        """Nanoseconds from the end of an action to the arrival of its message on another rank."""
        return ticks(self.link_latency + self.message_bytes / self.link_bandwidth)

    def meeting_ticks(self, ranks: int) -> int:
        """Nanoseconds from the last entry into a meeting of ``ranks`` until all go on: the word must go round."""
        return self.link_ticks() if ranks > 1 else 0

    def _seconds(self, kind: str) -> Sequence[float]:
        return {FORWARD: self.forward, BACKWARD: self.backward, UPDATE: self.update}.get(kind, ())
