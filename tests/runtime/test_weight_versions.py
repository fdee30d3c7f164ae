"""Schedules that use other weights than the latest: gradients are the exact ones of the versions in the plan."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from amdp_plugin.plan.costs import CostModel
from amdp_plugin.plan.planner import Planner
from amdp_plugin.plan.schedule import Schedule
from amdp_plugin.plan.schedules import make
from amdp_plugin.plan.versions import versions
from amdp_plugin.runtime.serial import SerialPipeline

from ..processes import run_ranks
from .models import OPTIMIZERS, WIDTH, data, loss
from .pipelines import Case, assert_equals_oracle, make_executor, oracle_of_parts, result, run_parts

SYNCHRONIZED = (("vertical_sync", True),)
MEETING = (("decisions", "meeting"),)
SHAPES = [
    ("pipedream", 2, 1, ()), ("pipedream", 3, 1, ()), ("pipedream", 4, 2, ()), ("pipedream-2bw", 3, 3, ()),
    ("pipedream-2bw", 4, 2, ()), ("pipedream", 3, 1, SYNCHRONIZED), ("pipedream", 4, 2, SYNCHRONIZED),
]  # fmt: skip


class Exact(nn.Module):
    """Without dropout: the whole model computes what its stages do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(self.norm(x)))


def simulate(schedule: Schedule, windows: int, optimizer: str) -> list[list[Tensor]]:
    """Whole models and exact gradients: of every micro-batch, with each stage's weights of the version in the plan."""
    stages, size = schedule.num_stages, schedule.micro_batches
    used = versions(Planner(schedule, CostModel.relative(stages)).program(windows + 2))
    modules = build(stages)
    model = nn.Sequential(*modules)
    history = [[[p.detach().clone() for p in module.parameters()]] for module in modules]
    steppers = [OPTIMIZERS[optimizer](list(module.parameters())) for module in modules]
    for window, _ in enumerate(range(windows)):
        sums: list[list[Tensor]] = [[torch.zeros_like(p) for p in module.parameters()] for module in modules]
        for index in range(window * size, (window + 1) * size):
            x, y = next(islice(data(), index, None))
            chosen = [[v.clone().requires_grad_() for v in history[s][used[s, index].forward]] for s in range(stages)]
            flat = {name: value for s in range(stages) for name, value in named(modules, s, chosen[s])}
            (loss(functional_call(model, flat, (x,)), y) / size).backward()
            for s in range(stages):
                for total, value in zip(sums[s], chosen[s], strict=True):
                    total += value.grad
        for s, module in enumerate(modules):
            for parameter, total in zip(module.parameters(), sums[s], strict=True):
                parameter.grad = total
            steppers[s].step()
            history[s].append([p.detach().clone() for p in module.parameters()])
    return [each[-1] for each in history]


def named(modules: list[nn.Module], stage: int, values: list[Tensor]) -> list[tuple[str, Tensor]]:
    names = [f"{stage}.{name}" for name, _ in modules[stage].named_parameters()]
    return list(zip(names, values, strict=True))


def build(stages: int) -> list[nn.Module]:
    torch.manual_seed(7)
    return [Exact() for _ in range(stages)]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(("name", "stages", "size", "options"), SHAPES)
def test_the_oracle_is_an_independent_simulation(
    name: str, stages: int, size: int, options: tuple[tuple[str, Any], ...], optimizer: str
) -> None:
    schedule = make(name, stages, size, **dict(options))
    oracle = SerialPipeline(build(stages), OPTIMIZERS[optimizer], loss, schedule)
    oracle.train(data(), 6)
    for stage, expected in enumerate(simulate(schedule, 6, optimizer)):
        for parameter, value in zip(oracle.stages[stage].parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.detach(), value, rtol=1e-5, atol=1e-6)
    assert all(use.forward == use.backward for use in oracle.used.values())
    paci = SerialPipeline(build(stages), OPTIMIZERS[optimizer], loss, make("paci", stages, size))
    paci.train(data(), 6)
    assert any(
        not torch.allclose(one, other, atol=1e-5)
        for stage, other_stage in zip(oracle.stages, paci.stages, strict=True)
        for one, other in zip(stage.parameters(), other_stage.parameters(), strict=True)
    )


CASES = [
    Case("pipedream", 4, 1, "tuples", options=SYNCHRONIZED),
    Case("pipedream", 3, 2, "counting", optimizer="adamw", options=SYNCHRONIZED),
    Case("pipedream", 4, 4, "recomputed", options=SYNCHRONIZED),
    Case("pipedream", 3, 1, options=(*SYNCHRONIZED, ("flush_first", 2))),
    Case("pipedream", 2, 1),
    Case("pipedream", 4, 1, optimizer="adamw"),
    Case("pipedream", 3, 2, "tuples"),
    Case("pipedream", 4, 4, "recomputed"),
    Case("pipedream", 3, 2, "counting", options=MEETING),
    Case("pipedream-2bw", 2, 2, optimizer="fused"),
    Case("pipedream-2bw", 4, 4, "tuples"),
    Case("pipedream-2bw", 3, 6, "counting"),
    Case("pipedream-2bw", 4, 2, "recomputed", optimizer="adamw"),
    Case("pipedream-2bw", 4, 4, optimizer="adamw", options=(("compensation", "error_feedback"),)),
]


def train(rank: int, case: Case, parts: tuple[int, ...]) -> dict[str, Any]:
    executor, worker = make_executor(rank, case)
    run_parts(executor, parts)
    return {**result(executor, worker), "most": executor.kept.most}


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case[:4])))
def test_ranks_equal_the_oracle(case: Case) -> None:
    parts = (4, 1, 3)
    found = run_ranks(case.stages, train, case, parts)
    assert_equals_oracle(found, oracle_of_parts(case, parts))
    stated = case.make().weight_versions
    most = [end["most"].get(stage, 1) for stage, end in enumerate(found)]
    if case.options[:1] in (SYNCHRONIZED, MEETING):  # the latest need not be in use
        assert all(number in (bound - 1, bound) for number, bound in zip(most, stated, strict=True))
        assert case.options[:1] == MEETING or most[0] == stated[0]
    else:
        assert most == list(stated)


def test_2bw_is_late_by_one_update_everywhere() -> None:
    oracle = SerialPipeline(build(4), OPTIMIZERS["sgd"], loss, make("pipedream-2bw", 4, 4))
    oracle.train(data(), 5)
    for window in range(5):
        version = max(0, window - 1)
        assert {use for (_, index), use in oracle.used.items() if index // 4 == window} == {(version, version)}
    oracle.train(islice(data(), 20, None), 2)  # from an empty pipeline again: nothing is older than the latest
    assert {use.forward for (_, index), use in oracle.used.items() if index >= 20} == {5}
