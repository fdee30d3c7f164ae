"""Groups of our own: out of torch's list, so that traces and last messages work."""

from __future__ import annotations

import os
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from amdp_plugin.plan.action import FORWARD
from amdp_plugin.plan.schedule import Schedule
from amdp_plugin.plan.schedules import make
from amdp_plugin.runtime.groups import Group, channels_of_a_message, interface
from amdp_plugin.runtime.pipeline import most_links
from amdp_plugin.runtime.transport import Transport
from amdp_plugin.runtime.watch import Watch

from ..processes import run_ranks
from .pipelines import Case, make_executor


def _traced(rank: int) -> set[str]:
    executor, _ = make_executor(rank, Case("1f1b", 2, 2))
    with torch.profiler.profile() as trace:
        executor.run_window()
        executor.quiesce()
    return {event.name for event in trace.events()}


def _after_destroy(rank: int) -> float:
    transport = Transport(range(2), (), torch.device("cpu"), Watch(rank, 20))
    dist.barrier()
    dist.destroy_process_group()
    try:
        if rank == 0:
            work, data = transport.send(torch.full((4,), 7.0), 1, FORWARD)
            work.wait()
            return float(data.sum())
        incoming = transport.receive(torch.zeros(4), 0, FORWARD, direct=False)
        incoming.work.wait()
        return float(incoming.finish().sum())
    finally:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # for the helper's own end


def test_messages_outlive_the_jobs_groups() -> None:
    assert run_ranks(2, _after_destroy, timeout=40) == [28.0, 28.0]


@pytest.mark.parametrize(
    ("gloo", "nccl", "expected"),
    [("", "", None), ("eth7", "ib0", "eth7"), ("", "=ib0:1,ib1", "ib0"), ("", "^docker", None), ("", "l", "lo")],
)
def test_interface_follows_the_variables(monkeypatch: Any, gloo: str, nccl: str, expected: str | None) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", gloo)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", nccl)
    assert interface() == expected


def test_traces_hold_the_actions_names() -> None:
    for rank, names in enumerate(run_ranks(2, _traced, timeout=60)):
        actions = {f"{kind}{micro_batch}" for kind in (f"{rank}F", f"{rank}B") for micro_batch in range(2)}
        assert any(action in name for name in names for action in actions), sorted(names)


@pytest.mark.parametrize(
    ("schedule", "links"), [(make("1f1b", 2, 2), 2), (make("paci", 8, 8), 4), (make("amdp", 8, 8), 4 + 12)]
)
def test_links_of_the_busiest_rank(schedule: Schedule, links: int) -> None:
    """A middle rank of 8 sends to and hears from two neighbours. Under amdp it is home to one stage with three guests
    and a guest of three: gradients and weights, each way."""
    assert most_links(schedule) == links


def test_what_a_job_asks_of_its_own_groups_is_not_asked_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that blocks in a wait knows no limit, and a watchdog that ends the process leaves no message of ours."""
    seen: dict[str, str | None] = {}

    class Nccl:
        Options = staticmethod(lambda **_: SimpleNamespace(config=SimpleNamespace()))

        def __init__(self, *_: Any) -> None:
            for name in ("BLOCKING_WAIT", "ASYNC_ERROR_HANDLING"):
                seen[name] = os.environ.get(f"TORCH_NCCL_{name}")

    monkeypatch.setattr(dist, "ProcessGroupNCCL", Nccl, raising=False)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr("amdp_plugin.runtime.groups.default_store", dist.HashStore)
    monkeypatch.setenv("TORCH_NCCL_BLOCKING_WAIT", "1")
    monkeypatch.delenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", raising=False)
    Group([0], "nccl", timedelta(seconds=1))
    assert seen == {"BLOCKING_WAIT": "0", "ASYNC_ERROR_HANDLING": "2"}
    assert os.environ["TORCH_NCCL_BLOCKING_WAIT"] == "1" and "TORCH_NCCL_ASYNC_ERROR_HANDLING" not in os.environ


def test_messages_leave_multiprocessors_to_the_stages() -> None:
    assert [channels_of_a_message(132, links) for links in (0, 2, 16, 32, 66)] == [4, 4, 4, 2, 1]
    with pytest.raises(ValueError, match=r'67 of .* 132 multiprocessors .*may take 66: use fewer "directions"'):
        channels_of_a_message(132, 67)
