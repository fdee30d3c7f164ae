"""What the weights of a stage hold around one pass and one step: with masters and without, under live graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from amdp_plugin.plan.action import BACKWARD, FORWARD, Action
from amdp_plugin.plan.costs import CostModel
from amdp_plugin.plan.extrapolation import Extrapolation, planned_extrapolation
from amdp_plugin.plan.planner import Planner
from amdp_plugin.plan.schedules import make
from amdp_plugin.runtime.extrapolation import ExtrapolatedWeights
from amdp_plugin.runtime.smooth_direction import smooth_direction
from amdp_plugin.runtime.weights import live_update

STAGES, STAGE = 4, 1


def planned(name: str, size: int = 1, **options: Any) -> Extrapolation:
    costs = CostModel.relative(STAGES, backward_ratio=1.0)
    found = planned_extrapolation(Planner(make(name, STAGES, size, **options), costs))
    assert found is not None
    return found


def momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.5, momentum=0.5)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.1, betas=(0.8, 0.9), eps=1e-3)


class Host:
    """Steps a layer: its weights, or masters of them in fp32."""

    def __init__(self, plan: Extrapolation, masters: bool = False, make_optimizer: Any = momentum) -> None:
        torch.manual_seed(1)
        self.layer = nn.Linear(3, 3).to(torch.bfloat16 if masters else torch.float32)
        self.weights = list(self.layer.parameters())
        self.masters = [weight.detach().clone().float() for weight in self.weights] if masters else self.weights
        self.optimizer = make_optimizer(self.masters)
        self.extrapolated = ExtrapolatedWeights(STAGE, self.weights, [self.optimizer], self.refresh)
        self.extrapolated.begin(plan)

    @torch.no_grad()
    def refresh(self) -> None:
        if self.masters is not self.weights:
            for weight, master in zip(self.weights, self.masters, strict=True):
                weight.copy_(master)

    def step(self, update: int) -> None:
        for master in self.masters:
            master.grad = torch.full_like(master, update + 1.0)
        with self.extrapolated.stepping(update), live_update(self.weights):
            self.optimizer.step()
            self.refresh()

    def using(self, kind: str, micro_batch: int, forward: int, version: int) -> Any:
        return self.extrapolated.using(Action(STAGE, kind, micro_batch), forward, version)

    def seen(self) -> list[Tensor]:
        return [weight.detach().clone() for weight in self.weights]

    def own(self) -> list[Tensor]:
        return [master.detach().clone() for master in self.masters]


@pytest.mark.parametrize("masters", [False, True])
def test_a_backward_goes_back_along_the_mean_of_updates(masters: bool) -> None:
    """The gap of stage 1 of 4, under windows of one, is 2, so that gamma = 0.25 ** (1 / 2)."""
    host = Host(planned("pipemare", correction_decay=0.25, rescale_steps=0), masters)
    means = [torch.zeros_like(master) for master in host.masters]
    for update in range(3):
        before = host.own()
        host.step(update)
        means = [0.5 * mean + 0.5 * (new - old) for mean, new, old in zip(means, host.own(), before, strict=True)]
    held, own = host.seen(), host.own()
    with host.using(FORWARD, 5, 3, 3):
        assert_equal(host.seen(), held)
    with host.using(BACKWARD, 3, 1, 3):
        assert_equal(host.seen(), [value - 2 * mean for value, mean in zip(own, means, strict=True)])
    assert_equal(host.seen(), held)
    assert_equal(host.own(), own)
    with host.using(BACKWARD, 3, 3, 3):
        assert_equal(host.seen(), held)


@pytest.mark.parametrize("name", ["pipemare", "spectrain"])
def test_what_an_optimizer_has_and_never_steps_may_be_in_live_graphs(name: str) -> None:
    host = Host(planned(name))
    frozen = nn.Parameter(torch.full((3,), 2.0), requires_grad=False)
    host.optimizer.add_param_group({"params": [frozen]})
    for update in range(3):
        host.step(update)
    x = torch.ones(3, requires_grad=True)
    product = (x * frozen).sum()
    with host.using(BACKWARD, 3, 1, 3):
        assert not torch.equal(host.seen()[0], host.layer.weight.new_zeros(3, 3))
    product.backward()
    assert torch.equal(x.grad, frozen) and torch.equal(frozen, torch.full((3,), 2.0))  # type: ignore[arg-type]


@pytest.mark.parametrize("masters", [False, True])
@pytest.mark.parametrize("make_optimizer", [momentum, adam])
def test_a_pass_goes_ahead_along_the_smooth_direction(make_optimizer: Any, masters: bool) -> None:
    """Stage 1 of 4 under windows of one has a lead of 0 and looks ahead as far as it is behind."""
    host = Host(planned("spectrain"), masters, make_optimizer)
    start = host.seen()
    with host.using(FORWARD, 2, 0, 0):
        assert_equal(host.seen(), start)
    for update in range(3):
        host.step(update)
    held, own = host.seen(), host.own()
    gradients = (1.0, 2.0, 3.0)
    if make_optimizer is momentum:
        direction = -0.5 * (0.25 * gradients[0] + 0.5 * gradients[1] + gradients[2])
    else:
        first = sum(0.2 * 0.8 ** (2 - number) * value for number, value in enumerate(gradients)) / (1 - 0.8**3)
        second = sum(0.1 * 0.9 ** (2 - number) * value**2 for number, value in enumerate(gradients)) / (1 - 0.9**3)
        direction = -0.1 * first / (second**0.5 + 1e-3)
    tolerance = {"rtol": 1e-2 if masters else 1e-6, "atol": 1e-6}
    with host.using(FORWARD, 5, 3, 3):
        for seen, value in zip(host.seen(), own, strict=True):
            torch.testing.assert_close(seen, (value + 2 * direction).to(seen), **tolerance)
    with host.using(BACKWARD, 3, 1, 3):
        assert_equal(host.seen(), held)
    assert_equal(host.seen(), held)
    assert_equal(host.own(), own)


def test_a_window_keeps_what_its_first_forward_predicted() -> None:
    """Windows of two: stage 1 forwards micro-batch 4, then updates, then forwards 5, of the same window."""
    host = Host(planned("xpipe", 2))
    host.step(0)
    with host.using(FORWARD, 4, 1, 1):
        predicted = host.seen()
    assert not any(map(torch.equal, predicted, host.seen()))
    host.step(1)
    with host.using(FORWARD, 5, 2, 2):
        assert_equal(host.seen(), predicted)
    with host.using(FORWARD, 6, 2, 2):
        assert not any(map(torch.equal, predicted, host.seen()))
    host.extrapolated.clear()
    with host.using(FORWARD, 5, 2, 2):
        assert not any(map(torch.equal, predicted, host.seen()))


@pytest.mark.parametrize("masters", [False, True])
def test_a_backward_uses_what_is_there_and_not_what_was(masters: bool) -> None:
    host = Host(planned("pipemare", correction_decay=0.25, rescale_steps=0), masters)
    x = torch.ones(2, 3, dtype=host.weights[0].dtype, requires_grad=True)
    output = host.layer(x)
    pointers = [weight.data_ptr() for weight in host.weights]
    host.step(0)
    host.step(1)
    with host.using(BACKWARD, 2, 0, 2):
        used = host.seen()[0]
        output.sum().backward()
    assert_equal([x.grad[0]], [used.sum(0)])
    assert not torch.equal(used, host.seen()[0])
    assert [weight.data_ptr() for weight in host.weights] == pointers


def test_a_learning_rate_is_divided_for_one_step_alone() -> None:
    """tau of stage 1 of 4 is 2. The weight changes by the rate, and what a scheduler sets meanwhile stays."""
    host = Host(planned("pipemare", rescale_steps=2), make_optimizer=lambda each: torch.optim.SGD(each, lr=0.5))
    (group,) = host.optimizer.param_groups
    for update, divisor in ((0, 2.0), (1, 2**0.5), (2, 1.0)):
        before = host.own()
        host.step(update)
        for old, new in zip(before, host.own(), strict=True):
            torch.testing.assert_close(new, old - 0.5 / divisor * (update + 1))
        assert group["lr"] == 0.5
    host.optimizer.register_step_post_hook(lambda *_: group.update(lr=0.25))
    host.step(0)
    assert group["lr"] == 0.25


def test_the_host_is_left_as_it_was() -> None:
    host = Host(planned("pipemare"))
    host.step(0)
    assert not host.optimizer._optimizer_step_pre_hooks and not host.optimizer._optimizer_step_post_hooks
    with pytest.raises(KeyError), host.using(BACKWARD, 2, 0, 1):
        held = host.seen()
        raise KeyError
    assert not any(map(torch.equal, held, host.seen())), "its own weights are back after an error, too"


def test_a_step_that_is_skipped_changes_nothing() -> None:
    host, other = Host(planned("pipemare")), Host(planned("pipemare"))
    for each in (host, other):
        each.step(0)
    with host.extrapolated.stepping(1), live_update(host.weights):
        pass
    assert_equal(host.extrapolated.means() or [], other.extrapolated.means() or [])


@pytest.mark.parametrize("masters", [False, True])
@pytest.mark.parametrize(("name", "size"), [("pipemare", 1), ("spectrain", 1), ("xpipe", 2)])
def test_what_is_kept_is_what_is_announced(name: str, size: int, masters: bool) -> None:
    host = Host(planned(name, size), masters)
    assert host.extrapolated.kept() == []
    for update in range(2):
        host.step(update)
        for kind in (FORWARD, BACKWARD):
            with host.using(kind, 3 * size, update, update + 1):
                pass
    kept = sum(tensor.numel() * tensor.element_size() for tensor in host.extrapolated.kept())
    assert kept == host.extrapolated.bytes_kept() > 0


def test_running_means_go_through_a_checkpoint() -> None:
    host, other = Host(planned("pipemare")), Host(planned("pipemare"))
    for update in range(3):
        host.step(update)
    other.step(7)
    other.extrapolated.restart(host.extrapolated.means())
    assert_equal(other.extrapolated.means() or [], host.extrapolated.means() or [])
    other.extrapolated.restart(None)
    assert all(not mean.any() for mean in other.extrapolated.means() or [])
    with pytest.raises(ValueError, match="means of updates are of other weights: load the checkpoint with as many"):
        other.extrapolated.restart([torch.zeros(2)])
    assert Host(planned("spectrain")).extrapolated.means() is None


@pytest.mark.parametrize(
    ("make_optimizer", "message"),
    [
        (torch.optim.RMSprop, "no smooth direction of the optimizer RMSprop is known"),
        (lambda each: torch.optim.SGD(each, lr=0.1), "SGD with momentum 0 has no smooth direction"),
        (lambda each: torch.optim.AdamW(each, amsgrad=True), "cannot be predicted where AdamW has amsgrad"),
        (lambda each: torch.optim.Adam(each, maximize=True), "cannot be predicted where Adam has maximize"),
    ],
)
def test_what_cannot_be_foreseen_is_refused(make_optimizer: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Host(planned("xpipe"), make_optimizer=make_optimizer)
    Host(planned("pipemare"), make_optimizer=make_optimizer)


class Unhooked:
    """Steps, and says nothing of it."""


@pytest.mark.parametrize("name", ["pipemare", "xpipe"])
def test_an_optimizer_that_no_hook_can_be_put_around_is_refused(name: str) -> None:
    extrapolated = ExtrapolatedWeights(STAGE, (), [Unhooked()])  # type: ignore[list-item]
    extrapolated.begin(None)
    with pytest.raises(ValueError, match="cannot be used with the optimizer Unhooked, before and after whose step"):
        extrapolated.begin(planned(name))


def test_steps_that_are_counted_by_group() -> None:
    """As Apex's Adam does."""
    weight = nn.Parameter(torch.ones(2))
    optimizer = adam([weight])
    weight.grad = torch.tensor([1.0, -2.0])
    optimizer.step()
    (group,) = optimizer.param_groups
    expected = smooth_direction(optimizer, group, weight)
    group["step"] = int(optimizer.state[weight].pop("step"))
    assert_equal([smooth_direction(optimizer, group, weight)], [expected])


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.detach(), other.detach().to(one.dtype))
