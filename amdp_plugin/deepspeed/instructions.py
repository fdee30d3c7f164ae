"""One window of a program in DeepSpeed's idiom: a ``PipeSchedule`` of ``PipeInstruction``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from deepspeed.runtime.pipe.schedule import PipeInstruction, PipeSchedule

from ..plan.action import Action


class RunAction(PipeInstruction):
    """Run one action of the program: receive what it needs, compute, send what others need."""

    def __init__(self, action: Action) -> None:
        super().__init__(action=action)

    def __repr__(self) -> str:
        return str(self.kwargs["action"])


class WindowSchedule(PipeSchedule):
    """The actions of this rank for one window.

    Args:
        actions: what the rank does, in order.
        num_buffers: the most micro-batches that are in flight on this stage at once.
    """

    def __init__(
        self, actions: Sequence[Action], num_buffers: int, micro_batches: int, stages: int, stage_id: int
    ) -> None:
        super().__init__(micro_batches=micro_batches, stages=stages, stage_id=stage_id)
        self._actions, self._num_buffers = actions, num_buffers

    def steps(self) -> Iterator[list[PipeInstruction]]:
        for action in self._actions:
            yield [RunAction(action)]

    def num_pipe_buffers(self) -> int:
        return self._num_buffers
