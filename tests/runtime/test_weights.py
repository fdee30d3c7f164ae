"""Which weights a delayed backward uses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import allow_mutation_on_saved_tensors
from torch.utils.checkpoint import checkpoint

from amdp_plugin.runtime.weights import live_update

from .models import OPTIMIZERS


def delayed_input_gradient(optimizer: str, recompute: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """The input gradient of a linear layer updated between its forward and backward: (found, old W, new W)."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    x, upstream = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    output = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
    old = layer.weight.detach().clone()
    stepper = OPTIMIZERS[optimizer](list(layer.parameters()))
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    with live_update(layer.parameters()):
        stepper.step()
    stepper.zero_grad()
    output.backward(upstream)
    assert x.grad is not None
    return x.grad, upstream @ old, upstream @ layer.weight.detach()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_backward_uses_the_new_weights(optimizer: str, recompute: bool) -> None:
    found, with_old, with_new = delayed_input_gradient(optimizer, recompute)
    assert torch.equal(found, with_new)
    assert not torch.allclose(with_old, with_new)


def test_weight_stashing_would_be_seen() -> None:
    """The same with PyTorch's own stashing gives the old weights: the test above can fail."""
    with allow_mutation_on_saved_tensors():
        found, with_old, with_new = delayed_input_gradient("sgd")
    assert torch.equal(found, with_old)
    assert not torch.allclose(found, with_new)


def test_every_step_needs_its_own_context() -> None:
    """Outside of the context autograd refuses, as it should."""
    layer, x = nn.Linear(2, 2), torch.randn(1, 2, requires_grad=True)
    output = layer(x)
    with torch.no_grad():
        layer.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
