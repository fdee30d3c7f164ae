"""Stages of a layout of their own: Megatron asks the process, not what it is given, which stage it builds."""

from __future__ import annotations

import pytest

from .jobs import Job
from .oracle import assert_equals_oracle, oracle
from .training import run

LAYOUT = [["embedding", "decoder"], ["decoder", "decoder"], ["decoder"], ["decoder", "loss"]]
PARAMETERS_OF_A_LAYER = 12
"""Weights and biases of two norms, and of four linear layers."""
PARAMETERS_BESIDE_LAYERS = [2, 0, 0, 3]
"""Two embeddings; the last norm's two, and the output layer."""


@pytest.mark.parametrize("schedule", ["paci", "amdp"])
def test_layers_are_where_the_layout_places_them(schedule: str) -> None:
    model = {"num_layers": 5, "pipeline_model_parallel_layout": LAYOUT}
    job = Job(schedule, 4, 4, model=model)
    found = run(job, 3)
    for end in found:
        for stage, weights in end["weights"].items():
            layers = LAYOUT[stage].count("decoder")
            assert len(weights) == PARAMETERS_OF_A_LAYER * layers + PARAMETERS_BESIDE_LAYERS[stage], f"stage {stage}"
    assert_equals_oracle(found, oracle(job, 3))
