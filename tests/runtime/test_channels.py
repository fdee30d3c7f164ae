"""Messages arrive whole, in order, with the shapes and dtypes that were sent, or tell who failed."""

from __future__ import annotations

import os
import re
import signal
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from amdp_plugin.plan.action import Action
from amdp_plugin.runtime.channels import BufferPool, Signature
from amdp_plugin.runtime.watch import PipelineStallError, Watch
from tests import devices
from tests.processes import outcomes, run_ranks

from .pipelines import Case, make_channels, make_executor


def forward(micro_batch: int) -> Action:
    return Action(1, "F", micro_batch)


def backward(micro_batch: int) -> Action:
    return Action(0, "B", micro_batch)


def mixed(index: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(index)
    values = torch.randn(3, 4, generator=generator)
    return (
        values,
        values.T,  # not contiguous
        values > 0,
        (values * 100).to(torch.int64),
        values.to(torch.bfloat16),
        torch.tensor(float(index)),  # no dimensions
        torch.empty(0, 4),
    )


def exchange_mixed(rank: int) -> list[Any]:
    channels, _ = make_channels(rank, 2)
    if rank == 0:
        for index in range(5):
            channels.send(1, forward(index), mixed(index), returns=backward(index))
        for index in range(5):
            channels.expect(1, backward(index))
        return [channels.receive(1, backward(index)) for index in range(5)]
    for index in range(5):
        channels.expect(0, forward(index))
    received = [channels.receive(0, forward(index)) for index in range(5)]
    for index, tensors in enumerate(received):
        channels.send(0, backward(index), tuple(2 * t for t in tensors if t.is_floating_point()))
    channels.drain()
    return received


def test_tuples_of_every_kind() -> None:
    gradients, received = run_ranks(2, exchange_mixed)
    for index in range(5):
        for found, sent in zip(received[index], mixed(index), strict=True):
            assert found.dtype == sent.dtype
            assert torch.equal(found, sent)
        floating = [tensor for tensor in mixed(index) if tensor.is_floating_point()]
        for found, sent in zip(gradients[index], floating, strict=True):
            assert torch.equal(found, 2 * sent)


def exchange_in_another_order(rank: int) -> list[float]:
    channels, _ = make_channels(rank, 2)
    order = [2, 0, 1, 4, 3]
    if rank == 0:
        for index in range(5):
            channels.send(1, forward(index), (torch.full((1000,), float(index)),))
        channels.drain()
        return []
    for index in range(5):
        channels.expect(0, forward(index))
    return [channels.receive(0, forward(index))[0].mean().item() for index in order]


def test_messages_may_be_taken_in_another_order_than_sent() -> None:
    assert run_ranks(2, exchange_in_another_order)[1] == [2.0, 0.0, 1.0, 4.0, 3.0]


def exchange_growing(rank: int, dynamic: bool) -> Any:
    channels, _ = make_channels(rank, 2, dynamic_shapes=dynamic, shapes_hint="use dynamic_shape=True")
    if rank == 0:
        try:
            for index in range(4):
                channels.send(1, forward(index), (torch.full((index + 1, 2), float(index)),), returns=backward(index))
        except ValueError as error:
            channels.drain()
            return str(error)
        for index in range(4):
            channels.expect(1, backward(index))
        return [tuple(channels.receive(1, backward(index))[0].shape) for index in range(4)]
    for index in range(4):
        channels.expect(0, forward(index))
    shapes = []
    for index in range(4 if dynamic else 1):
        tensors = channels.receive(0, forward(index))
        shapes.append(tuple(tensors[0].shape))
        channels.send(0, backward(index), tensors)
    if dynamic:
        channels.drain()
    return shapes


def test_dynamic_shapes() -> None:
    expected = [(1, 2), (2, 2), (3, 2), (4, 2)]
    assert run_ranks(2, exchange_growing, True) == [expected, expected]


def test_a_shape_that_changes_unasked_is_refused() -> None:
    message, _ = run_ranks(2, exchange_growing, False)
    assert "the activation for 1F1 is ([2, 2] float32), the ones before were ([1, 2] float32)" in message
    assert "dynamic_shape=True" in message


def test_signature_round_trip() -> None:
    signature = Signature.of(mixed(0))
    assert Signature.decode(signature.encode()) == signature
    assert len(signature.gradients().specs) == 5
    with pytest.raises(ValueError, match="200 tensors"):
        Signature.of((torch.zeros(1),) * 200).encode()


def test_buffers_are_used_again_when_nobody_else_does() -> None:
    pool = BufferPool(torch.device("cpu"))
    first = pool.get((2, 3), torch.float32)
    address, view = first.data_ptr(), first.view(3, 2)
    assert pool.get((2, 3), torch.float32).data_ptr() != address
    del first
    assert pool.get((2, 3), torch.float32).data_ptr() != address, "a view still uses it"
    del view
    assert pool.get((2, 3), torch.float32).data_ptr() == address
    assert pool.get((2, 3), torch.float64).data_ptr() != address


def train_with_a_dying_rank(rank: int, case: Case, victim: int, how: str) -> tuple[str, float]:
    executor, _ = make_executor(rank, case, timeout_seconds=4 * devices.patience())
    executor.run_window()
    start = time.monotonic()
    try:
        for window in range(200):
            if rank == victim and window == 3:
                os.kill(os.getpid(), signal.SIGKILL) if how == "killed" else time.sleep(9)
            executor.run_window()
    except PipelineStallError as error:
        return str(error), time.monotonic() - start
    return "no error", time.monotonic() - start


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_killed_rank_stops_all_others(victim: int) -> None:
    found = outcomes(3, train_with_a_dying_rank, Case("paci", 3, 2), victim, "killed", timeout=30 * devices.patience())
    for rank, (ok, end) in enumerate(found):
        if rank != victim:
            assert ok, end
            message, seconds = end
            pattern = rf"pipeline rank {rank}.* with rank \d .*the last action done here is {rank}[FBU]\d+"
            assert re.search(pattern, message)
            assert seconds < 10 * devices.patience()


def test_a_rank_that_hangs_stops_its_neighbours() -> None:
    found = outcomes(3, train_with_a_dying_rank, Case("paci", 3, 2), 1, "hangs", timeout=15)
    for rank in (0, 2):
        ok, (message, seconds) = found[rank]
        assert ok
        pattern = rf"stage {rank}, at {rank}[FB]\d+: (receiving|sending) with rank 1 did not complete within 4 s"
        assert re.search(pattern, message), message
        assert seconds < 12


def test_an_error_of_the_model_is_not_taken_for_a_lost_peer() -> None:
    watch = Watch(0, 600.0)
    with pytest.raises(RuntimeError, match="mat1 and mat2") as caught, watch.guard("a collective", None):
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert not isinstance(caught.value, PipelineStallError)


def directions(rank: int) -> list[object]:
    """Rank 0 tells of direction 0 and then of 1; rank 1 asks in the other order."""
    channels, _ = make_channels(rank, 2)
    first = Action(1, "F", 0)
    if rank == 0:
        channels.send_header(1, first, False, direction=0)
        channels.send_header(1, first, True, direction=1)
        channels.send_report(1, torch.tensor([0.0], dtype=torch.float64), direction=0)
        channels.send_report(1, torch.tensor([1.0], dtype=torch.float64), direction=1)
        channels.drain()
        return []
    found = [channels.receive_header(0, first, direction) for direction in (1, 0)]
    return found + [float(channels.receive_report(0, 1, direction)) for direction in (1, 0)]


def test_every_direction_has_its_own_order_of_control_messages() -> None:
    assert run_ranks(2, directions)[1] == [True, False, 1.0, 0.0]
