"""How often a host asks for values that a GPU would have to compute first, counted where there is no GPU.

On the CPU all tensors are alike, so that what would be on the device is followed from where it comes: parameters,
tensors that are made with a ``device=``, what goes through collectives, and all that is computed from these. A tensor
that is made without, such as a header or a sum on its way, is the host's own on a GPU machine, too. Asking for a value
of the others waits for the device there, once; what has come is the host's. What the package itself brings to the host
is waited for where a device that is as late as it can be (late_device.py) has not come so far. Not seen: what C++ asks
for by itself, and copies to a device from memory that is not pinned (tests/gpu/test_synchronizations.py counts those,
with CUDA).
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from .late_device import LateDevice, counting_waits

WARM_UP, COUNTED = 2, 3
"""Windows."""
READS = {
    "item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "__array__", "__contains__",
    "equal", "allclose", "nonzero", "masked_select", "unique", "argwhere", "is_nonzero",
}  # fmt: skip
"""Functions of torch and of tensors that need values, or shapes that depend on values."""
FOR_OTHERS = "runtime/device.py", "runtime/watch.py", "tests/late_device.py", "tests/synchronizations.py"
COLLECTIVES = "all_reduce", "broadcast", "reduce"
Counts = Counter[str]


class Reads(TorchFunctionMode):
    """Counts, within it, by the place in the code that asks: the file and the function."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counts = Counter()
        self._of_device: Any = WeakTensorKeyDictionary()
        self._patches = ExitStack()

    def __enter__(self) -> Reads:
        self._patches.enter_context(LateDevice().in_use())
        self._patches.enter_context(counting_waits(lambda: self.counts.update([place()])))
        for name in COLLECTIVES:
            self._patches.enter_context(patch.object(dist, name, self._noting(getattr(dist, name))))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()

    def count(self, train_window: Callable[[], object]) -> Counts:
        """In ``COUNTED`` windows of this rank, whose job was made within this, too: to follow what is kept."""
        for _ in range(WARM_UP):
            train_window()
        self.counts.clear()
        for _ in range(COUNTED):
            train_window()
        return self.counts.copy()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(function, "__name__", "")
        of_device = any(map(self._is_of_device, tensors((args, kwargs))))
        if of_device and (name in READS or (name == "__getitem__" and picks_by_value(args[1]))):
            self.counts[place()] += 1
            result = function(*args, **kwargs)
            # On the CPU a copy to it is the tensor itself, which stays of the device.
            return result.detach() if isinstance(result, Tensor) else result
        result = function(*args, **kwargs)
        if of_device or self._names_device(kwargs):
            self._note(result)
        return result

    def _names_device(self, kwargs: Any) -> bool:
        """Whether it is made where the job computes: torch's optimizers, too, say where their count of steps is not."""
        frame: Any = sys._getframe(2)
        while "megatron_on_cpu" in frame.f_code.co_filename:  # which wraps such functions
            frame = frame.f_back
        by_torch = "/torch/" in frame.f_code.co_filename
        return kwargs.get("device") is not None and not (by_torch and kwargs["device"] == "cpu")

    def _is_of_device(self, tensor: Tensor) -> bool:
        return isinstance(tensor, nn.Parameter) or tensor in self._of_device

    def _note(self, value: Any) -> None:
        for tensor in tensors(value):
            self._of_device[tensor] = True

    def _noting(self, collective: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(collective)
        def noting(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            self._note(tensor)
            return collective(tensor, *args, **kwargs)

        return noting


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors(tuple(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors(part)


def picks_by_value(index: Any) -> bool:
    return any(tensor.dtype == torch.bool for tensor in tensors(index))


def place() -> str:
    """Of who calls torch, or what asks for others."""
    frame: Any = sys._getframe(2)
    while any(part in frame.f_code.co_filename for part in ("/torch/", *FOR_OTHERS)):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}"


def assert_at_most_one_more(found: list[Counts], stock: list[Counts], expected: list[list[str]]) -> None:
    """On every rank those of stock, or fewer, and once a window the one that is ``expected``, if any."""
    for rank, (ours, theirs, places) in enumerate(zip(found, stock, expected, strict=True)):
        assert len(places) <= 1
        more = Counter(dict.fromkeys(places, COUNTED))
        assert ours - theirs == more, f"rank {rank}: ours {dict(ours)}, stock {dict(theirs)}"
