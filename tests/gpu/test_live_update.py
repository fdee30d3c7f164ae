"""A delayed backward uses the new weights, whatever kernel of the optimizer wrote them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from amdp_plugin.runtime.weights import live_update
from tests import devices


def apex(parameters: list[nn.Parameter]) -> Any:
    # A package of another kind has the same name on registries: NVIDIA's alone has this module.
    optimizers = pytest.importorskip("apex.optimizers", reason="NVIDIA's Apex is not installed")
    return optimizers.FusedAdam(parameters, lr=0.02)


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Any]] = {
    "fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.02, fused=True),
    "foreach": lambda parameters: torch.optim.AdamW(parameters, lr=0.02, foreach=True),
    "apex": apex,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_gradients_are_those_of_a_forward_anew(optimizer: str, dtype: torch.dtype) -> None:
    if optimizer == "apex" and not devices.on_gpu():
        pytest.skip("Apex computes on GPUs alone")
    torch.manual_seed(0)
    first, second = (nn.Linear(64, 64, bias=False, device=devices.device(), dtype=dtype) for _ in range(2))
    x = torch.randn(16, 64, device=devices.device(), dtype=dtype)
    weights = [first.weight, second.weight]
    hidden = first(x)
    output, old = second(hidden), second.weight.detach().clone()
    stepper = OPTIMIZERS[optimizer](weights)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    with live_update(weights):
        stepper.step()
    stepper.zero_grad()
    upstream = torch.ones_like(output)
    output.backward(upstream)
    # By hand: the activations are the forward's, the weights that carry the gradient on are the new ones.
    expected, stashed = (
        torch.autograd.grad(nn.functional.linear(x, first.weight), first.weight, upstream @ used)[0]
        for used in (second.weight.detach(), old)
    )
    assert first.weight.grad is not None
    assert torch.equal(first.weight.grad, expected)
    assert not torch.equal(expected, stashed)
