"""A weight that several stages share, where they never meet: processes, the oracle and plain PyTorch agree."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from amdp_plugin.plan.planner import Planner
from amdp_plugin.plan.schedules import make
from amdp_plugin.plan.tied import tied_versions
from amdp_plugin.plan.versions import versions
from amdp_plugin.runtime.serial import SerialPipeline
from amdp_plugin.runtime.tied import make_tied
from tests.processes import run_ranks

from .models import OPTIMIZERS, WIDTH, data, shared
from .pipelines import Case, assert_equals_oracle, make_executor, oracle_of_parts, result, run_parts

FEEDBACK = ("compensation", "error_feedback")


def train(rank: int, case: Case, parts: tuple[int, ...]) -> dict[str, Any]:
    executor, worker = make_executor(rank, case)
    run_parts(executor, parts)
    return result(executor, worker)


def check(case: Case, parts: tuple[int, ...] = (6,)) -> None:
    found = run_ranks(case.stages, train, case, parts)
    assert_equals_oracle(found, oracle_of_parts(case, parts))
    for home, *guests in case.tied:  # nothing is left under way
        first, *others = (square(found[stage]["weights"][stage]) for stage in (home, *guests))
        assert all(torch.equal(first, other) for other in others)


def square(weights: dict[str, Tensor]) -> Tensor:
    return next(value for value in weights.values() if value.shape == (WIDTH, WIDTH))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(
    ("stages", "size"), [(2, 1), (2, 2), (2, 4), (3, 1), (3, 3), (3, 7), (4, 1), (4, 2), (4, 4), (4, 6)]
)
def test_processes_equal_the_oracle(stages: int, size: int, optimizer: str) -> None:
    """Windows below, at and above the stages; several values are under way where they are short."""
    kinds = {2: "plain", 3: "tuples", 4: "recomputed"}
    check(Case("paci", stages, size, kinds[stages], optimizer, tied=((0, stages - 1),)))


@pytest.mark.parametrize("size", [2, 8, 12])
def test_a_deep_pipeline(size: int) -> None:
    check(Case("paci", 8, size, optimizer="fused", tied=((0, 7),)), (5,))


@pytest.mark.parametrize("tied", [((0, 1, 3),), ((1, 2),), ((1, 3), (0, 2))], ids=str)
def test_other_stages(tied: tuple[tuple[int, ...], ...]) -> None:
    """Three that share one; neither end; two weights, one stage's guest among another's homes."""
    check(Case("paci", 4, 3, "counting", "adamw", tied=tied))


@pytest.mark.parametrize(
    "options",
    [
        (FEEDBACK,),
        (("flush_every", 2),),
        (("flush_first", 2), FEEDBACK),
        (("extra_in_flight", 3),),
    ],
    ids=str,
)
def test_what_else_paci_can_do(options: tuple[tuple[str, Any], ...]) -> None:
    check(Case("paci", 4, 2, optimizer="adamw", options=options, tied=((0, 3),)), (7,))


@pytest.mark.parametrize("options", [(), (("flush_first", 3), FEEDBACK)], ids=str)
@pytest.mark.parametrize(("stages", "size"), [(3, 1), (4, 4)])
def test_quiesce_is_a_cut(stages: int, size: int, options: tuple[tuple[str, Any], ...]) -> None:
    """What is under way arrives, and nothing is lost."""
    check(Case("paci", stages, size, "counting", "adamw", options=options, tied=((0, stages - 1),)), (3, 1, 4))


def test_uneven_stages() -> None:
    check(Case("paci", 4, 3, stage_costs=(1.0, 0.5, 2.0, 1.5), tied=((0, 3),)))


class In(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.bias = nn.Parameter(torch.empty(WIDTH, WIDTH)), nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.words + self.bias)


class Out(In):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x + self.bias) @ self.words.T


class Middle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x))


def layers(stages: int) -> list[nn.Module]:
    torch.manual_seed(3)
    built = [In().double(), *(Middle() for _ in range(stages - 2)), Out().double()]
    nn.init.normal_(built[0].words, std=0.4)
    built[-1].words.data.copy_(built[0].words.data)
    return built


def mean_square(output: Tensor, label: Tensor) -> Tensor:
    return ((output - label) ** 2).mean()


@pytest.mark.parametrize(("stages", "size"), [(2, 1), (2, 2), (3, 2), (4, 1), (4, 4), (4, 6)])
def test_a_single_model_trained_with_the_delays_of_the_plan(stages: int, size: int) -> None:
    """One model, whose tied weight is one tensor and one optimizer's; every use of every weight has the version that
    the plan says, the backward of a stage that of its backward. Autograd of one stage at a time, by hand."""
    schedule = make("paci", stages, size, tied=((0, stages - 1),))
    windows = 6
    planner = Planner(schedule)
    plan = versions(planner.program(windows + 2 * stages))
    tied = tied_versions(planner.program(windows + 2 * stages))
    first = layers(stages)
    history = {name: [value.detach().clone()] for name, value in _whole(first).items()}
    master = {name: value[0].clone().requires_grad_() for name, value in history.items()}
    optimizer = torch.optim.AdamW(master.values(), lr=0.05)
    batches, losses = list(islice(data(torch.float64), windows * size)), []
    for window in range(windows):
        total = 0.0
        for micro_batch in range(window * size, (window + 1) * size):
            x, label = batches[micro_batch]
            total += _one(schedule, master, history, plan, tied, micro_batch, x, label)
        losses.append(total / size)
        optimizer.step()
        optimizer.zero_grad()
        for name, value in master.items():
            history[name].append(value.detach().clone())
    oracle_layers = layers(stages)
    oracle = SerialPipeline(
        oracle_layers, lambda p: torch.optim.AdamW(p, lr=0.05), mean_square, schedule,
        tied=[[(0, shared(oracle_layers[0])), (stages - 1, shared(oracle_layers[-1]))]],
    )  # fmt: skip
    found = oracle.train(iter(batches), windows)
    assert found == pytest.approx(losses, rel=1e-9)
    for name, value in _whole(oracle_layers).items():
        torch.testing.assert_close(value.detach(), master[name].detach(), rtol=1e-9, atol=1e-12)
    assert torch.equal(shared(oracle_layers[0]), shared(oracle_layers[-1]))


def _whole(stages: list[nn.Module]) -> dict[str, Tensor]:
    """The weights of the whole model; the tied one once."""
    parts = {str(stage): module for stage, module in enumerate(stages)}
    named = dict(nn.ModuleDict(parts).named_parameters())
    named.pop(f"{len(stages) - 1}.words")
    return named


def _one(
    schedule: Any, master: Any, history: Any, plan: Any, tied: Any, micro_batch: int, x: Tensor, label: Tensor
) -> float:
    """Forward a micro-batch with the versions of its forwards, then backward it with those of its backwards: the
    derivative is taken at the inputs that the forward gave, with the later weights, as live updates do."""
    stages = schedule.num_stages
    shell = layers(stages)

    def at(stage: int, when: str) -> None:
        for name, parameter in shell[stage].named_parameters():
            if name == "words":
                version = getattr(tied[schedule.num_stages, stage, micro_batch], when)
                parameter.data.copy_(history["0.words"][version])
            else:
                parameter.data.copy_(history[f"{stage}.{name}"][getattr(plan[stage, micro_batch], when)])

    graphs = []
    for stage, module in enumerate(shell):
        at(stage, "forward")
        inputs = x.detach().requires_grad_()
        output = module(inputs)
        graphs.append((inputs, output))
        x = output
    loss = mean_square(x, label)
    gradient = torch.autograd.grad(loss / schedule.micro_batches, x, retain_graph=True)[0]
    for stage in reversed(range(stages)):
        at(stage, "backward")
        graphs[stage][1].backward(gradient)
        gradient = graphs[stage][0].grad
    for stage, module in enumerate(shell):
        for name, parameter in module.named_parameters():
            target = master["0.words" if name == "words" else f"{stage}.{name}"]
            target.grad = parameter.grad if target.grad is None else target.grad + parameter.grad
    return float(loss.detach())


def test_what_cannot_be_shared() -> None:
    schedule, layer = make("paci", 3, 3, tied=((0, 2), (1, 2))), nn.Linear(2, 2)
    layer.bias.requires_grad_(False)
    with pytest.raises(ValueError, match=r"on rank 2 that is \[3, 4\], .* parameters for \[3\]"):
        make_tied(schedule, 2, [layer.weight, None])
    with pytest.raises(ValueError, match=r"one parameter of rank 2 stands for several of the tied weights \[3, 4\]"):
        make_tied(schedule, 2, [layer.weight, layer.weight])
    with pytest.raises(ValueError, match=r"the tied weights \[4\] .* are not trained"):
        make_tied(schedule, 2, [layer.weight, layer.bias])
    stages = [nn.Linear(2, 2) for _ in range(3)]
    pairs = [[(0, stages[0].weight), (2, stages[2].bias)], [(1, stages[1].weight), (2, stages[2].weight)]]
    with pytest.raises(ValueError, match="a shared weight has one shape"):
        SerialPipeline(stages, OPTIMIZERS["sgd"], mean_square, schedule, tied=pairs)
    with pytest.raises(ValueError, match="got parameters of"):
        SerialPipeline(stages, OPTIMIZERS["sgd"], mean_square, schedule)


@pytest.mark.parametrize("decisions", ["latest", "relayed"])
@pytest.mark.parametrize(("stages", "size"), [(2, 1), (2, 4), (3, 2), (4, 2), (4, 6)])
def test_decisions_about_models_that_share_a_weight(stages: int, size: int, decisions: str) -> None:
    """It counts once, at its home, with the gradients of all that share it."""
    options = (("decisions", decisions), FEEDBACK)
    case = Case("paci", stages, size, "counting", "adamw", options=options, tied=((0, stages - 1),), clipping=0.05)
    check(case, (4, 3))


def test_relayed_decisions_where_three_stages_share_a_weight() -> None:
    options = (("decisions", "relayed"),)
    check(Case("paci", 4, 3, "plain", "adamw", options=options, tied=((0, 2, 3),), clipping=0.05))


def test_relayed_decisions_step_what_is_shared_on_the_first_stage_alone() -> None:
    with pytest.raises(ValueError, match=r"first of \(1, 3\), where updates stand 1 backwards late"):
        make("paci", 4, 4, decisions="relayed", tied=((1, 3),))


@pytest.mark.parametrize("options", [{"flush_every": 3}, {"extra_in_flight": 2}, {"flush_first": 2}, dict([FEEDBACK])])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_relayed_decisions_and_other_options(options: dict[str, Any], size: int) -> None:
    """A quiesce in between, with updates and values still to come."""
    chosen = (("decisions", "relayed"), *options.items())
    case = Case("paci", 4, size, "recomputed", "adamw", options=chosen, clipping=0.05, tied=((0, 2, 3),))
    check(case, (3, 1, 3))
