"""What the hosts of a stage's tensor-parallel ranks tell each other, past their devices."""

from __future__ import annotations

from collections import deque
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from ..runtime.channels import NOT_YET
from ..runtime.groups import Group
from ..runtime.watch import Watch

TAG = 0
KEPT = 4
"""Answers after which the oldest has certainly been received: hosts are a few actions ahead of devices, which meet in
every layer."""


class TensorRanks:
    """The tensor-parallel ranks of this rank's stage. All of them make it, and ask it, alike.

    In Megatron's own group an answer would come over the device, and be read when that is through with all that it was
    given before: once a window, without a limit, and perhaps behind a message that does not come.

    Args:
        watch: bounds the waits.
        timeout_seconds: the longest that one takes.
    """

    def __init__(self, watch: Watch, timeout_seconds: float) -> None:
        self._watch, self._timeout = watch, timedelta(seconds=timeout_seconds)
        group = parallel_state.get_tensor_model_parallel_group()
        self.leads, ranks = group.rank() == 0, dist.get_process_group_ranks(group)
        self._first, *self._others = ranks
        self._group = Group(ranks, "gloo", self._timeout) if self._others else None
        self._sent: deque[list[tuple[dist.Work, Tensor]]] = deque()

    def first_says(self, answer: bool) -> bool:
        """The ``answer`` of the first of them, on all."""
        if self._group is None:
            return answer
        told = torch.tensor([answer if self.leads else NOT_YET], dtype=torch.int64)
        what = "hearing from the first of the tensor-parallel ranks whether there is data"
        with self._watch.guard(what, None):
            if not self.leads:
                work = self._group.receive(told, self._first, TAG)
                self._watch.wait(work, what, None, None, has_come=lambda: told.item() != NOT_YET)
                return bool(told.item())
            # What is sent must live until it has been received.
            self._sent.append([(self._group.send(told, rank, TAG), told) for rank in self._others])
            for work, _ in self._sent.popleft() if len(self._sent) > KEPT else ():
                work.wait(self._timeout)
        return answer
