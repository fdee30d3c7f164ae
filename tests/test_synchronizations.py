"""What counts as asking a device, where there is none."""

from __future__ import annotations

import torch
from torch import nn

from .synchronizations import Reads


def test_values_of_a_device_are_told_from_the_hosts_own() -> None:
    weight, header = nn.Parameter(torch.ones(2)), torch.zeros(1)
    with Reads() as reads:
        assert header.item() == 0 and not header.any() and header.tolist() == [0]
        made = torch.full((2,), 3.0, device="cpu")
        total = (weight * made).sum()
        there = weight.detach().gt(0)
        assert not reads.counts, "nothing is asked for yet"
        assert float(total.detach()) == 6 and there.all()
        assert made[there].shape == (2,)
        copied = total.detach().cpu()
        assert copied.item() == 6, "has come already"
        header.copy_(copied)
        assert header.item() == 6
    assert reads.counts == {"test_synchronizations.py:test_values_of_a_device_are_told_from_the_hosts_own": 4}
