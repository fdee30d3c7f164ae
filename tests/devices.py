"""The device that the tests compute on. This is the one place that knows: ``pytest --device cuda``, or the variable.

With ``cuda`` all ranks share one GPU and talk over gloo; with ``nccl`` each rank has a GPU of its own; with
``nccl-shared`` they share one and talk over NCCL all the same. What a test states is the same on all of them.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

VARIABLE = "AMDP_TEST_DEVICE"
"""Ranks inherit it; ``pytest --device`` sets it."""
CHOICES = ("cpu", "cuda", "nccl", "nccl-shared")


def choose(name: str) -> None:
    """Let this process, and those that it starts, use ``name``. To be called before anything touches a device."""
    if name not in CHOICES:
        raise ValueError(f"{VARIABLE}={name!r}: use one of {', '.join(CHOICES)}")
    os.environ[VARIABLE] = name
    if name != "cpu":
        # So that asking whether there is a GPU leaves a process able to fork.
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it sums may come in another order


def chosen() -> str:
    """One of :data:`CHOICES`."""
    return os.environ.get(VARIABLE, "cpu")


def on_gpu() -> bool:
    """Whether tests compute on GPUs."""
    return chosen() != "cpu"


def device() -> torch.device:
    """Where this process computes."""
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu() else torch.device("cpu")


def backend() -> str:
    """Of the process group."""
    return "nccl" if over_nccl() else "gloo"


def over_nccl() -> bool:
    """Whether ranks talk over NCCL."""
    return chosen().startswith("nccl")


def start_method() -> str:
    """How ranks are started: a process that has used CUDA cannot be forked, so a server that never does forks them."""
    return "forkserver" if on_gpu() else "fork"


def patience() -> int:
    """Times longer than on the CPU that ranks may be apart: each has a device to make ready first."""
    return 3 if on_gpu() else 1


def local_rank(rank: int) -> int:
    """The number of the GPU that ``rank`` uses; on the CPU its own number, as launchers set it."""
    return 0 if chosen() in ("cuda", "nccl-shared") else rank


def be_a_host(rank: int) -> None:
    """NCCL refuses two ranks on one device of a host: each says that it is a host of its own."""
    os.environ.update(NCCL_HOSTID=f"rank {rank}", NCCL_SOCKET_IFNAME="lo", NCCL_IB_DISABLE="1")


def settle_rank(rank: int) -> None:
    """In a rank's process, before it does anything: its GPU, and sums in one order."""
    if chosen() == "nccl-shared":
        be_a_host(rank)
    if on_gpu():
        torch.cuda.set_device(local_rank(rank))
        torch.use_deterministic_algorithms(True, warn_only=True)


def drawn_from(state: dict[str, Any]) -> tuple[Tensor, ...]:
    """Of a host's random state, what the oracle keeps: torch's generators, of the CPU and the device."""
    return tuple(state[where] for where in ("cpu", "device") if state[where] is not None)


def place(value: Tensor) -> Tensor:
    """``value`` where this process computes."""
    return value.to(device())
