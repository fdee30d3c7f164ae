"""Regions of tensor-parallel layers are kept and seeded alike, whether a tracker holds states or generators."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from amdp_plugin.runtime.random_regions import put_region_states, region_states, seed_regions


class Tracker:
    """As the hosts', on the CPU; with ``holds_generators`` as those that can be captured into CUDA graphs."""

    def __init__(self, holds_generators: bool, *names: str) -> None:
        self.holds_generators = holds_generators
        self.states: dict[str, Any] = {}
        for seed, name in enumerate(names):
            generator = torch.Generator().manual_seed(seed)
            self.states[name] = generator if holds_generators else generator.get_state()

    def get_states(self) -> dict[str, Any]:
        return dict(self.states)

    def set_states(self, states: dict[str, Any]) -> None:
        self.states = states

    def draw(self, name: str) -> float:
        if self.holds_generators:
            return torch.rand((), generator=self.states[name]).item()
        generator = torch.Generator()
        generator.set_state(self.states[name])
        drawn = torch.rand((), generator=generator).item()
        self.states[name] = generator.get_state()
        return drawn


@pytest.mark.parametrize("holds_generators", [False, True])
def test_regions_go_on_from_where_they_were(holds_generators: bool) -> None:
    tracker = Tracker(holds_generators, "a", "b")
    held, kept = tracker.get_states(), region_states(tracker)
    drawn = [tracker.draw(name) for name in "abab"]
    put_region_states(tracker, kept)
    assert [tracker.draw(name) for name in "abab"] == drawn
    if holds_generators:
        assert tracker.get_states() == held, "others may refer to them"


@pytest.mark.parametrize("holds_generators", [False, True])
def test_seeds_differ_between_regions_and_tensor_parallel_ranks(holds_generators: bool) -> None:
    def seeded(seed: int, tensor_rank: int) -> list[float]:
        tracker = Tracker(holds_generators, "a", "b")
        seed_regions(tracker, seed, tensor_rank, "cpu")
        return [tracker.draw(name) for name in "ab"]

    drawn = [number for seed in (5, 6000) for tensor_rank in range(8) for number in seeded(seed, tensor_rank)]
    assert len(set(drawn)) == len(drawn) == 32
    assert seeded(5, 3) == seeded(5, 3)
