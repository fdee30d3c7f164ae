"""Several tensors as one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from amdp_plugin.runtime.packing import ALIGNMENT, allocate, pack, packed_spec, parts, specs_of
from amdp_plugin.runtime.replica import Guest, Home

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.int8, torch.bool, torch.complex64)
SPECS = st.tuples(st.lists(st.integers(0, 4), max_size=3).map(tuple), st.sampled_from(DTYPES))


def filled(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Laid out in the reverse order of its dimensions."""
    values = torch.randint(0, 2, shape[::-1]).to(dtype)
    return values.permute(tuple(reversed(range(len(shape)))))


@settings(deadline=None)
@given(st.lists(SPECS, max_size=4))
def test_what_is_packed_is_found_again(specs: list[tuple[tuple[int, ...], torch.dtype]]) -> None:
    tensors = [filled(*spec) for spec in specs]
    packed = pack(tensors)
    assert specs_of([packed]) == (packed_spec(specs),)
    found = parts(packed, specs)
    assert specs_of(found) == tuple(specs)
    for part, tensor in zip(found, tensors, strict=True):
        assert torch.equal(part, tensor)
        if len(specs) > 1 and part.numel():
            assert part.data_ptr() % part.dtype.itemsize == 0
            assert (part.data_ptr() - packed.data_ptr()) % ALIGNMENT == 0


def test_one_alone_is_not_copied() -> None:
    tensor = torch.ones(3, 2)
    assert pack([tensor]) is tensor and parts(tensor, specs_of([tensor])) == [tensor]


class Mixed(nn.Module):
    """Parameters of several dtypes, some of which do not fill what their neighbours must begin at."""

    def __init__(self) -> None:
        super().__init__()
        for name, (size, dtype) in {"a": (3, torch.bfloat16), "b": (2, torch.float64), "c": (5, torch.float32)}.items():
            setattr(self, name, nn.Parameter(torch.randn(size).to(dtype)))


@pytest.mark.parametrize("landing", [False, True])
def test_a_stage_of_several_dtypes_travels_in_one_message_each_way(landing: bool) -> None:
    home, guest = Home(stage := Mixed()), Guest(replica := Mixed())
    guest.land(landing)
    guest.incoming().copy_(home.weights())
    guest.arrived()
    for own, value in zip(replica.parameters(), stage.parameters(), strict=True):
        assert torch.equal(own, value)
        own.grad.fill_(2)  # type: ignore[union-attr]
    arrived = home.gradient_buffer()
    arrived.copy_(guest.outgoing())
    for _ in range(2):
        home.add(arrived)
    assert all(torch.equal(value.grad, torch.full_like(value, 4)) for value in stage.parameters())  # type: ignore[arg-type]


def test_what_a_guest_computes_with_begins_where_torch_would_let_it_begin() -> None:
    """Else matrix products round otherwise on it than at home, and are slower."""
    guest = Guest(replica := nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 7), Mixed()))
    for packed, own in ((guest.weights, "data"), (guest.gradients, "grad")):
        for parameter in replica.parameters():
            assert (getattr(parameter, own).data_ptr() - packed.data_ptr()) % ALIGNMENT == 0
    assert torch.empty(1).data_ptr() % 64 == ALIGNMENT % 64 == guest.weights.data_ptr() % 64 == 0


def test_a_stage_without_parameters_has_an_empty_message() -> None:
    guest = Guest(nn.Identity())
    guest.incoming().copy_(Home(nn.Identity()).weights())
    assert guest.outgoing().numel() == Home(nn.Identity()).gradient_buffer().numel() == 0
    assert allocate((), torch.device("cpu")).shape == (0,)
