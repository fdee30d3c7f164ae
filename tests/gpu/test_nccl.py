"""What NCCL does to host and device while a message is awaited, and when it never comes."""

from __future__ import annotations

import time

import pytest
import torch

from amdp_plugin.plan.action import FORWARD, Action
from amdp_plugin.plan.messages import Link, Stream
from amdp_plugin.runtime.device import device_of
from amdp_plugin.runtime.timeline import Timeline
from amdp_plugin.runtime.transport import HEADER_TAG, Transport
from amdp_plugin.runtime.watch import PipelineStallError, Watch
from tests import devices
from tests.processes import run_ranks

pytestmark = pytest.mark.skipif(not devices.over_nccl(), reason="needs --device nccl or nccl-shared")
LATE_SECONDS = 1.0


def make(rank: int, timeout_seconds: float) -> tuple[Transport, Watch]:
    device = devices.device()
    watch = Watch(rank, timeout_seconds, Timeline(device=device_of(device)))
    watch.in_first_window = False
    transport = Transport(range(2), [Link(0, 1, Stream.PIPELINE)], device, watch)
    transport.direct = True
    return transport, watch


def wait_for_a_late_message(rank: int) -> dict[str, float]:
    transport, watch = make(rank, 30)
    value = torch.full((1 << 20,), float(rank), device=devices.device())
    value * 2 + 1  # loads kernels: CUDA waits for the device, and so for the message, where that comes later
    torch.cuda.synchronize()
    ready = torch.zeros(1)
    if rank == 0:
        transport.receive_control(ready, 1, HEADER_TAG).wait()
        time.sleep(LATE_SECONDS)
        transport.send(value, 1, FORWARD)
        torch.cuda.synchronize()
        return {}
    began = time.monotonic()
    incoming = transport.receive(value, 0, FORWARD, direct=True)
    watch.wait(incoming.work, "receiving", Action(1, "F", 0), 0)
    host = time.monotonic() - began
    doubled = incoming.finish() * 2 + 1
    mark = watch.timeline.device.mark()
    transport.send_control(ready, 0, HEADER_TAG)
    done_at_once = watch.timeline.device.is_done(mark)
    watch.keep_pace(0)
    return {
        "host": host, "device": time.monotonic() - began, "done at once": done_at_once, "value": float(doubled.max())
    }  # fmt: skip


def test_a_wait_holds_the_device_and_not_the_host(record_property: pytest.RecordProperty) -> None:
    _, found = run_ranks(2, wait_for_a_late_message)
    record_property("host waits, s", f"{found['host']:.4f}")
    record_property("device waits, s", f"{found['device']:.3f}")
    assert found["host"] < LATE_SECONDS / 2 and not found["done at once"]
    assert found["device"] > LATE_SECONDS / 2
    assert found["value"] == 1.0


def wait_for_nothing(rank: int) -> tuple[str, float, float]:
    transport, watch = make(rank, 2)
    if rank == 0:
        time.sleep(6)
        return "", 0, 0
    began = time.monotonic()
    incoming = transport.receive(torch.zeros(4, device=devices.device()), 0, FORWARD, direct=True)
    watch.wait(incoming.work, "receiving", Action(1, "F", 0), 0)
    try:
        watch.keep_pace(0)
    except PipelineStallError as error:
        message, seconds = str(error), time.monotonic() - began
        transport.abort()
        torch.cuda.synchronize()
        return message, seconds, time.monotonic() - began - seconds
    return "no error", 0, 0


def test_a_message_that_never_comes_is_an_error_and_lets_the_process_end(
    record_property: pytest.RecordProperty,
) -> None:
    _, (message, seconds, aborted) = run_ranks(2, wait_for_nothing)
    assert "at 1F0: receiving with rank 0 did not complete within 2 s" in message
    record_property("error after, s", f"{seconds:.2f}")
    record_property("device free after, s", f"{aborted:.2f}")
    assert 1.5 < seconds < 4
