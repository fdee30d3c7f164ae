"""One thing that a rank does, and its text notation.

The notation is that of ``torch.distributed.pipelining``: ``2F5`` is the forward of micro-batch 5 on
stage 2 and ``2B5`` its backward. Two kinds are ours: ``2R3`` reduces the gradients of window 3 of
stage 2, which a guest sends and the stage's home adds up, and ``2U3`` is update number 3 of stage 2,
which the home computes and sends, and a guest takes over.
"""

from __future__ import annotations

import re
from typing import NamedTuple

FORWARD = "F"
BACKWARD = "B"
REDUCE = "R"
UPDATE = "U"
KINDS = (FORWARD, BACKWARD, REDUCE, UPDATE)

_NOTATION = re.compile(r"(\d+)([FBRU])(\d+)")


class Action(NamedTuple):
    """One entry of a program: ``kind`` of ``stage``, for a micro-batch (F, B) or a window (R, U)."""

    stage: int
    kind: str
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs here

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.index}"

    @classmethod
    def parse(cls, text: str) -> Action:
        """Read ``2F5``. Raises ``ValueError`` for anything else."""
        match = _NOTATION.fullmatch(text.strip())
        if match is None:
            raise ValueError(
                f"{text!r} is not an action: write STAGE, then F (forward), B (backward), R (reduce) or U (update), "
                "then the micro-batch (F, B) or the window (R, U), as in 2F5"
            )
        return cls(int(match[1]), match[2], int(match[3]))

    def window(self, micro_batches: int) -> int:
        """The window this action works for, when a window has ``micro_batches`` micro-batches."""
        return self.index // micro_batches if self.kind in (FORWARD, BACKWARD) else self.index

    def shifted(self, windows: int, micro_batches: int) -> Action:
        """The like action, that many windows later."""
        steps = windows * micro_batches if self.kind in (FORWARD, BACKWARD) else windows
        return Action(self.stage, self.kind, self.index + steps)
