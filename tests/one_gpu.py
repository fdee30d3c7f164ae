"""What lets several ranks of a stock host share one GPU, over gloo, which sends no tensors of a device.

For tests alone: every message goes through the CPU, and the host waits for it. Three things are needed, of which a
rank's process does the first two by itself (tests/processes.py): ``LOCAL_RANK=0``, the number of the one GPU; a gloo
group before DeepSpeed would make one of NCCL, which refuses two ranks on a device; and :func:`install`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d


class Landing:
    """A receive into the CPU's memory that ends in ``target``, on the device."""

    def __init__(self, work: dist.Work, landed: Tensor, target: Tensor) -> None:
        self._work, self._landed, self._target = work, landed, target

    def wait(self, *arguments: Any) -> bool:
        done: bool = self._work.wait(*arguments)
        self._target.copy_(self._landed)
        return done


def is_on_device(value: Any) -> bool:
    """Whether gloo needs ``value`` on the CPU."""
    return isinstance(value, Tensor) and value.device.type != "cpu"


def install() -> None:
    """Let torch's point-to-point messages, which Megatron uses, and DeepSpeed's collectives go through the CPU."""
    if "deepspeed.comm.torch" in sys.modules:
        # DeepSpeed has such copies for another device that no backend serves.
        sys.modules["deepspeed.comm.torch"]._needs_cpu_staging = is_on_device  # type: ignore[attr-defined]
    # torch compares operations of a batch by identity: both modules must know the same functions.
    for name, staged in (("isend", staged_send), ("irecv", staged_receive)):
        function = staged(getattr(distributed_c10d, name))
        setattr(distributed_c10d, name, function)
        setattr(dist, name, function)


def staged_send(send: Callable[..., Any]) -> Callable[..., Any]:
    """``send``, of a copy on the CPU, which its work keeps alive."""

    @wraps(send)
    def isend(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        return send(tensor.cpu() if is_on_device(tensor) else tensor, *arguments, **options)

    return isend


def staged_receive(receive: Callable[..., Any]) -> Callable[..., Any]:
    """``receive``, into the CPU's memory first."""

    @wraps(receive)
    def irecv(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        if not is_on_device(tensor):
            return receive(tensor, *arguments, **options)
        landed = tensor.new_empty(tensor.shape, device="cpu")
        return Landing(receive(landed, *arguments, **options), landed, tensor)

    return irecv
