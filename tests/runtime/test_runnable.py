"""Layers that do not keep what a schedule needs of them are refused by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from amdp_plugin.plan.schedules import make
from amdp_plugin.runtime.runnable import check_modules


def compiled_in_place(**options: object) -> nn.Module:
    layer = nn.Linear(2, 2)
    layer.compile(**options)
    return layer


GRAPHS: dict[str, Callable[[], nn.Module]] = {
    "around": lambda: torch.compile(nn.Linear(2, 2), mode="reduce-overhead"),  # type: ignore[dict-item, return-value]
    "in place": lambda: compiled_in_place(mode="max-autotune"),
    "by option": lambda: compiled_in_place(options={"triton.cudagraphs": True}),
}


@pytest.mark.parametrize("layer", GRAPHS)
@pytest.mark.parametrize("schedule", ["1f1b", "paci"])
def test_cuda_graphs_are_refused(schedule: str, layer: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2), GRAPHS[layer]())
    with pytest.raises(ValueError, match=rf"{schedule}.*layer '1' is compiled to CUDA graphs.*same memory"):
        check_modules(make(schedule, 2, 2), [model])


def test_other_compiled_layers_are_not() -> None:
    around = torch.compile(nn.Linear(2, 2))
    plain = [around, compiled_in_place(), compiled_in_place(mode="max-autotune-no-cudagraphs")]
    check_modules(make("paci", 2, 2), [nn.Sequential(*plain)])  # type: ignore[arg-type]


def test_weights_made_of_parameters_are_refused_where_backwards_see_newer_ones() -> None:
    model = nn.Sequential(nn.Linear(2, 2), parametrizations.weight_norm(nn.Linear(2, 2)))
    check_modules(make("1f1b", 2, 2), [model])
    with pytest.raises(ValueError, match=r"layer '1' computes with weights made from its parameters"):
        check_modules(make("paci", 2, 2), [model])
    parametrize.remove_parametrizations(model[1], "weight")
    check_modules(make("paci", 2, 2), [model])
