"""Process groups for messages of ours alone, which torch's list of groups does not know.

``destroy_process_group()`` shuts down every group in that list, and ``torch.profiler`` expects of each what
only torch's own functions note: ours serve last messages and leave traces alone.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor

from .torch_private import default_store

MAX_CHANNELS = 4
"""Of NCCL, a message: each takes a multiprocessor from the stages' own work, for as long as it waits."""
MESSAGES_SHARE = 0.5
"""Of a device's multiprocessors, at most, that messages may hold at once: what is computed must find some free."""
CLEAN_UP_ONLY = "2"
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")

_made: Counter[tuple[str, ...]] = Counter()


class Group:
    """A group that its members alone make; peers are named by their global ranks."""

    def __init__(
        self, members: Sequence[int], backend: str, timeout: timedelta, max_channels: int = MAX_CHANNELS
    ) -> None:
        self._members = sorted(members)
        key = (backend, *map(str, self._members))
        _made[key] += 1
        store = dist.PrefixStore(f"amdp_plugin {' '.join(key)} {_made[key]}", default_store())
        place = self._members.index(dist.get_rank()), len(self._members)
        self._group = (
            _nccl(store, *place, timeout, max_channels) if backend == "nccl" else _gloo(store, *place, timeout)
        )

    def send(self, tensor: Tensor, receiver: int, tag: int) -> dist.Work:
        return self._group.send([tensor], self._members.index(receiver), tag)

    def receive(self, tensor: Tensor, sender: int, tag: int) -> dist.Work:
        return self._group.recv([tensor], self._members.index(sender), tag)

    def abort(self) -> None:
        """Give up whatever is under way: a device that waits for a peer that is gone would keep its process alive."""
        self._group.abort()


def interface() -> str | None:
    """The network interface for control messages: gloo's variable, else NCCL's first name, where it names one."""
    gloo, nccl = (os.environ.get(variable, "").split(",")[0] for variable in INTERFACES)
    if gloo or not nccl or nccl.startswith("^"):
        return gloo or None
    exact, name = nccl.startswith("="), nccl.removeprefix("=").split(":")[0]
    names = sorted(os.listdir("/sys/class/net")) if os.path.isdir("/sys/class/net") else []
    return name if exact or name in names else next((each for each in names if each.startswith(name)), name)


def _gloo(store: dist.Store, rank: int, size: int, timeout: timedelta) -> Any:
    name = interface()
    gloo: Any = dist.ProcessGroupGloo  # its options are not in torch's annotations
    options = gloo._Options()
    try:
        device = gloo.create_device(interface=name) if name else None
        options._devices = [device or gloo.create_default_device()]
        options._timeout = timeout
        return gloo(store, rank, size, options)
    except RuntimeError as error:
        raise ValueError(
            f"control messages cannot go over network interface {name or 'of the host name'}: set GLOO_SOCKET_IFNAME "
            f"to an interface by which all ranks reach each other ({error})"
        ) from error


def channels_of_a_message(multiprocessors: int, links: int) -> int:
    """How many multiprocessors a message may take where a device has ``links`` of them, each with one under way.

    Raises:
        ValueError: when there are more links than :data:`MESSAGES_SHARE` of the multiprocessors.
    """
    budget = int(multiprocessors * MESSAGES_SHARE)
    if links > budget:
        raise ValueError(
            f"messages would take {links} of this device's {multiprocessors} multiprocessors while they wait, and may "
            f'take {budget}: use fewer "directions", so that fewer ranks hold each stage'
        )
    return min(MAX_CHANNELS, budget // links) if links else MAX_CHANNELS


def _nccl(store: dist.Store, rank: int, size: int, timeout: timedelta, max_channels: int) -> Any:
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options.config.max_ctas = max_channels
    options._timeout = timeout
    # When a message fails, torch's watchdog is to give the communicator up, so that the device goes on and the host
    # can tell. By default it ends the process, without a word of the pipeline, by itself or through the job's group.
    # And a wait is to hold the device alone, whatever the job asks of its own groups.
    with _environment(
        TORCH_NCCL_ASYNC_ERROR_HANDLING=CLEAN_UP_ONLY, TORCH_NCCL_DUMP_ON_TIMEOUT="0", TORCH_NCCL_BLOCKING_WAIT="0"
    ):
        return dist.ProcessGroupNCCL(store, rank, size, options)


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
