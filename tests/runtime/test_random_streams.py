"""All generators that layers draw from are kept, whatever device they are of."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from amdp_plugin.runtime.random_streams import Generators, RandomStreams, generators_of, together
from tests import devices
from tests.processes import run_ranks

from .models import KINDS, Plain
from .pipelines import Case, assert_equals_oracle, make_executor, make_oracle, placed, result, run_parts

OTHER = torch.Generator()
"""Stands for a device's: nobody seeds, keeps or restores it together with the CPU's."""


class DrawsFromTwo(Plain):
    """Dropout from the CPU's own generator, noise from :data:`OTHER`."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.1 * torch.randn(x.shape, generator=OTHER).to(x)


KINDS["draws from two"] = DrawsFromTwo


def all_of_them() -> Generators:
    """Those that layers draw from here, and :data:`OTHER`."""
    of_device = [torch.cuda.default_generators[devices.device().index]] if devices.on_gpu() else []
    return together([torch.default_generator, *of_device, OTHER])


def train(rank: int, case: Case, parts: list[int]) -> dict[str, Any]:
    executor, worker = make_executor(rank, case, generators=all_of_them())
    OTHER.manual_seed(100 + rank)
    run_parts(executor, parts)
    return result(executor, worker)


@pytest.mark.parametrize("case", [Case("paci", 3, 2, "draws from two"), Case("amdp", 4, 4, "draws from two")])
def test_every_rank_and_direction_has_a_stream_of_each_generator(case: Case) -> None:
    """Cancelled forwards, at the end of the first part, take nothing from any of them."""
    found = run_ranks(case.stages, train, case, [3, 2])
    oracle = make_oracle(case, all_of_them())
    micro_batches = placed()
    for windows in (3, 2):
        oracle.train(micro_batches, windows)
    assert_equals_oracle(found, oracle)


def test_a_stream_of_several_generators() -> None:
    """Each direction goes on where it was, in all of them; outside, nothing is drawn."""
    generators = all_of_them()
    torch.manual_seed(7)
    OTHER.manual_seed(8)
    streams, outside = RandomStreams(2, generators), generators.get()

    def draw(direction: int) -> list[float]:
        with streams.drawing(direction):
            return [torch.rand(()).item(), torch.rand((), generator=OTHER).item()]

    first, second, third = draw(0), draw(1), draw(0)
    assert len({*first, *second, *third}) == 5, "one seed for all of the second direction; else nothing comes twice"
    assert all(map(torch.equal, outside, generators.get()))
    assert first == [torch.rand(()).item(), torch.rand((), generator=OTHER).item()], "the first direction's is ours"


def test_modules_draw_from_the_generators_of_their_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    on_devices = [torch.Generator() for _ in range(3)]
    monkeypatch.setattr(torch.cuda, "default_generators", on_devices)

    def placed_on(*names: str) -> nn.Module:
        tensors = [SimpleNamespace(device=torch.device(name)) for name in names]
        return SimpleNamespace(parameters=lambda: tensors[:1], buffers=lambda: tensors[1:])  # type: ignore[return-value]

    before = torch.get_rng_state()
    several = [placed_on("cpu", "cuda:2"), placed_on("cuda:0")]
    for modules, used in (([placed_on("cpu")], []), ([placed_on("cuda:1")], [1]), (several, [0, 2])):
        generators = generators_of(modules)
        for number, generator in enumerate(on_devices):
            generator.manual_seed(number)
        generators.seed(50)
        states = generators.get()
        assert torch.equal(states[0], torch.get_rng_state()) and len(states) == 1 + len(used)
        seeds = [generator.initial_seed() for generator in on_devices]
        assert seeds == [50 if number in used else number for number in range(3)]
    torch.set_rng_state(before)
