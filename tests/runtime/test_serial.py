"""The oracle itself, against plain training and against a closed form."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import islice

import pytest
import torch
from torch import Tensor, nn

from amdp_plugin.plan.costs import CostModel
from amdp_plugin.plan.laws import ProgramError
from amdp_plugin.plan.planner import Planner
from amdp_plugin.plan.schedule import Schedule
from amdp_plugin.plan.schedules import make
from amdp_plugin.plan.versions import versions
from amdp_plugin.runtime.pipeline import Pipeline, Site
from amdp_plugin.runtime.random_streams import generators_of
from amdp_plugin.runtime.serial import SerialPipeline

from .models import build_stages, data, loss, make_adamw


class Scale(nn.Module):
    """Multiplies by one weight, so that every gradient can be written down."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(value, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def without_dropout(num_stages: int) -> list[nn.Module]:
    """One model has one stream of random numbers, a pipeline one a rank: they agree where none is drawn."""
    return [stage.eval() for stage in build_stages("plain", num_stages)]


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "chimera"])
def test_a_flush_is_gradient_accumulation(schedule: str) -> None:
    """Law 6: a synchronous schedule equals one model trained with gradient accumulation."""
    stages = without_dropout(4)
    oracle = SerialPipeline(stages, make_adamw, loss, make(schedule, 4, 4))
    model = nn.Sequential(*without_dropout(4))
    optimizer, micro_batches = make_adamw(list(model.parameters())), data()
    means = oracle.train(data(), 3)
    for mean in means:
        losses = [loss(model(x), y) for x, y in islice(micro_batches, 4)]
        (sum(losses) / 4).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert mean == pytest.approx((sum(losses) / 4).item(), rel=1e-6)
    for found, expected in zip(nn.Sequential(*stages).parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(found, expected)


def test_paci_by_hand() -> None:
    """Two stages, windows of one: the closed form of every gradient, with the versions that PACI names.

    y = w1 * w0 * x and loss = y, so dL/dw1 = w0 * x and dL/dw0 = w1 * x. Stage 1 has one micro-batch in
    flight and no gap. Stage 0 forwards micro-batch m after its update m - 1 (for m > 1), before its update m.
    """
    rate, xs = 0.1, [1.0, 2.0, -1.0, 3.0, 0.5]
    w0, w1 = [1.0], [2.0]
    for m, x in enumerate(xs):
        forward_w0 = w0[max(0, m - 1)]
        upstream = w1[m]
        w1.append(w1[m] - rate * forward_w0 * x)
        w0.append(w0[m] - rate * upstream * x)
    stages = [Scale(1.0), Scale(2.0)]
    oracle = SerialPipeline(
        stages, lambda p: torch.optim.SGD(p, lr=rate), lambda out, _: out.sum(), make("paci", 2, 1)
    )
    oracle.train(((torch.tensor([x], dtype=torch.float64), None) for x in xs), len(xs))
    assert stages[0].weight.item() == pytest.approx(w0[-1], rel=1e-12)
    assert stages[1].weight.item() == pytest.approx(w1[-1], rel=1e-12)
    assert [oracle.used[0, m].forward for m in range(5)] == [0, 0, 1, 2, 3]
    assert [oracle.used[0, m].backward for m in range(5)] == [0, 1, 2, 3, 4]


class Deep(nn.Module):
    """w1 * w0 * x in one stage: the delayed gradient of w0 shows which w1 the backward used."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Scale(1.0), Scale(2.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def test_the_delayed_backward_uses_the_new_weights() -> None:
    """Stage 0 backwards micro-batch 1 after its update 0: dL/d(first) takes the updated ``second``."""
    rate, xs = 0.1, [1.0, 2.0]
    a, b = 1.0, 2.0  # first and second of stage 0; stage 1 multiplies by 1 and does not learn
    new_a, new_b = a - rate * b * xs[0], b - rate * a * xs[0]
    expected_a = new_a - rate * new_b * xs[1]  # old weights would give new_a - rate * b * xs[1]
    expected_b = new_b - rate * a * xs[1]  # the activation first(x) is the one of the forward
    deep, frozen = Deep(), Scale(1.0)
    oracle = SerialPipeline(
        [deep, frozen],
        lambda p: torch.optim.SGD(p, lr=rate if len(p) == 2 else 0.0),
        lambda out, _: out.sum(),
        make("paci", 2, 1),
    )
    oracle.train(((torch.tensor([x], dtype=torch.float64), None) for x in xs), 2)
    assert deep.first.weight.item() == pytest.approx(expected_a, rel=1e-12)
    assert deep.second.weight.item() == pytest.approx(expected_b, rel=1e-12)


@pytest.mark.parametrize(("num_stages", "size"), [(2, 4), (4, 8), (6, 12)])
def test_amdp(num_stages: int, size: int) -> None:
    """Every replica sees the versions of the plan and ends with its home's weights; the first window knows no gap."""
    schedule = make("amdp", num_stages, size)
    oracle = SerialPipeline(without_dropout(num_stages), make_adamw, loss, schedule)
    flushed = SerialPipeline(without_dropout(num_stages), make_adamw, loss, make("1f1b", num_stages, size))
    assert oracle.train(data(), 1) == pytest.approx(flushed.train(data(), 1), rel=1e-6)
    for found, expected in zip(oracle.stages, flushed.stages, strict=True):
        for name, value in found.state_dict().items():
            torch.testing.assert_close(value, expected.state_dict()[name])  # replicas add up in another order
    oracle = SerialPipeline(without_dropout(num_stages), make_adamw, loss, schedule)
    oracle.train(data(), 4)
    planned = versions(Planner(schedule).program(4))
    assert {place: (used.forward, used.backward) for place, used in oracle.used.items()} == {
        place: (version.forward, version.backward) for place, version in planned.items() if place[1] < 4 * size
    }
    assert max(used.backward - used.forward for used in oracle.used.values()) == 1
    for replicas in oracle._replicas:
        home, *guests = replicas.values()
        for guest in guests:
            assert guest.version == home.version == 4
            for mine, theirs in zip(guest.module.parameters(), home.module.parameters(), strict=True):
                assert torch.equal(mine, theirs)


def test_costs_decide_which_versions_are_used() -> None:
    """What the oracle used is what the program for these costs says, not the one for equal stages."""
    schedule, costs = make("paci", 3, 2), CostModel.relative(3, stage_costs=(3.0, 1.0, 1.0))
    oracle = SerialPipeline(without_dropout(3), make_adamw, loss, schedule, costs=costs)
    oracle.train(data(), 4)

    def planned(costs: CostModel | None) -> dict[tuple[int, int], tuple[int, int]]:
        found = versions(Planner(schedule, costs).program(4))
        return {place: (each.forward, each.backward) for place, each in found.items() if place[1] < 8}

    assert oracle.used == planned(costs)
    assert planned(costs) != planned(None)


def test_a_program_that_breaks_a_law_is_not_trained() -> None:
    stages = without_dropout(3)
    before = [parameter.detach().clone() for stage in stages for parameter in stage.parameters()]
    liar = replace(make("paci", 3, 2), max_gap=(0, 0, 0))
    oracle = SerialPipeline(stages, make_adamw, loss, liar)
    with pytest.raises(ProgramError, match="paci breaks law 5"):
        oracle.train(data(), 3)
    after = [parameter for stage in stages for parameter in stage.parameters()]
    assert oracle.versions == [0, 0, 0] and all(map(torch.equal, before, after))


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (make("amdp", 4, 4, parked=True), "sums the next window's, so update_delay must be 0, it is 1"),
    ],
)
def test_what_can_only_be_planned_is_refused_everywhere(schedule: Schedule, message: str) -> None:
    """By the oracle and by the engines' pipeline alike, before anything is made."""
    site = Site(0, range(4), None, torch.device("cpu"), 30.0)  # type: ignore[arg-type]  # nobody is asked
    pipeline = partial(Pipeline, schedule, CostModel.uniform(4), site, lambda: None, generators_of(()))
    oracle = partial(SerialPipeline, without_dropout(4), make_adamw, loss, schedule)
    for build in (pipeline, oracle):
        with pytest.raises(ValueError) as caught:
            build()
        assert f"schedule {schedule.name!r} can be planned, not run: " in str(caught.value)
        assert message in str(caught.value)


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match="3 stages for a schedule of 2"):
        SerialPipeline(build_stages("plain", 3), make_adamw, loss, make("paci", 2, 1))
    with pytest.raises(ValueError, match="costs of 3 stages for a schedule of 2"):
        SerialPipeline(build_stages("plain", 2), make_adamw, loss, make("paci", 2, 1), costs=CostModel.uniform(3))
