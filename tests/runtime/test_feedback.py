"""Error feedback around a step: what the optimizer sees, what the stage computes with, and what is kept."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from amdp_plugin.runtime.feedback import ErrorFeedback
from amdp_plugin.runtime.weights import live_update

COEFFICIENT = 0.75


class Host:
    """Steps a layer: its weights, or masters of them in fp32, group by group as ZeRO does."""

    def __init__(self, masters: bool, coefficient: float | None = COEFFICIENT) -> None:
        torch.manual_seed(1)
        self.layer = nn.Linear(3, 3).to(torch.bfloat16 if masters else torch.float32)
        self.weights = list(self.layer.parameters())
        self.masters = [weight.detach().clone().float() for weight in self.weights] if masters else self.weights
        groups = [{"params": [master]} for master in self.masters]
        self.optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
        refresh = self.refresh if masters else lambda: None
        self.feedback = ErrorFeedback(self.weights, [self.optimizer], refresh, coefficient)

    @torch.no_grad()
    def refresh(self) -> None:
        for weight, master in zip(self.weights, self.masters, strict=True):
            weight.copy_(master)

    def step(self, number: int) -> None:
        gradients = torch.Generator().manual_seed(number)
        with live_update(self.weights), self.feedback.stepping():
            for group in self.optimizer.param_groups:
                (master,) = group["params"]
                master.grad = torch.randn(master.shape, generator=gradients)
                whole, self.optimizer.param_groups = self.optimizer.param_groups, [group]
                self.optimizer.step()
                self.optimizer.param_groups = whole
            if self.masters is not self.weights:
                self.refresh()

    def seen(self) -> list[Tensor]:
        return [weight.detach().clone() for weight in self.weights]


def plain_iterates(masters: bool, steps: int) -> list[list[Tensor]]:
    """What the same optimizer makes without error feedback, which no gradient here depends on."""
    host = Host(masters, coefficient=None)
    found = [[master.detach().clone() for master in host.masters]]
    for number in range(steps):
        host.step(number)
        found.append([master.detach().clone() for master in host.masters])
    return found


def ahead(plain: list[list[Tensor]], step: int) -> list[Tensor]:
    return [new + COEFFICIENT * (new - old) for new, old in zip(plain[step], plain[step - 1], strict=True)]


@pytest.mark.parametrize("masters", [False, True])
def test_the_optimizer_goes_on_from_the_plain_iterate(masters: bool) -> None:
    host, plain = Host(masters), plain_iterates(masters, 4)
    for step in range(1, 5):
        host.step(step - 1)
        assert_equal(host.weights, ahead(plain, step))
        host.feedback.put_plain()
        assert_equal(host.weights, plain[step])
        host.feedback.put_plain()  # again, which changes nothing
        host.feedback.put_ahead()
        assert_equal(host.weights, ahead(plain, step))
        if masters:
            assert_equal(host.masters, plain[step])


def test_masters_need_nothing_more_and_weights_one_copy() -> None:
    for masters, count in ((True, 0), (False, 12)):
        host = Host(masters)
        assert host.feedback.bytes_kept() == 4 * count
        assert host.feedback.kept() == []
        for number in range(3):
            host.step(number)
            assert sum(tensor.numel() for tensor in host.feedback.kept()) == count
            assert len(host.feedback._plain) == (0 if masters else 2), "nothing else lasts"
    assert Host(False, coefficient=None).feedback.bytes_kept() == 0


def test_the_host_is_left_as_it_was() -> None:
    host = Host(True)
    host.step(0)
    assert not host.optimizer._optimizer_step_pre_hooks and not host.optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("masters", [False, True])
def test_a_step_that_is_skipped_changes_nothing(masters: bool) -> None:
    """An overflow, for example: then the host does not call its optimizer."""
    host, plain = Host(masters), plain_iterates(masters, 2)
    host.step(0)
    with live_update(host.weights), host.feedback.stepping():
        pass
    assert_equal(host.weights, ahead(plain, 1))
    host.step(1)
    assert_equal(host.weights, ahead(plain, 2))


class Drift(torch.optim.Optimizer):
    """Moves what has no gradient, as a decay may, or an optimizer that makes gradients within its step."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(0.5)


def test_what_moves_without_a_gradient() -> None:
    weight = nn.Parameter(torch.zeros(1))
    feedback = ErrorFeedback([weight], [optimizer := Drift([weight])], coefficient=COEFFICIENT)
    for plain in (-0.5, -1.0):
        with feedback.stepping():
            optimizer.step()
        assert weight.item() == plain - 0.5 * COEFFICIENT


def test_weights_set_before_the_first_step_stay() -> None:
    host = Host(False)
    for weight in host.weights:
        weight.data.fill_(2.0)
    host.step(0)
    gradients = torch.Generator().manual_seed(0)
    for weight in host.weights:
        update = 0.1 * torch.randn(weight.shape, generator=gradients)
        torch.testing.assert_close(weight, 2.0 - (1 + COEFFICIENT) * update)


@pytest.mark.parametrize("masters", [False, True])
def test_an_evaluation_under_a_live_graph(masters: bool) -> None:
    """The backward afterwards uses what the stage computes with."""
    host = Host(masters)
    host.step(0)
    x = torch.ones(2, 3, dtype=host.weights[0].dtype, requires_grad=True)
    output = host.layer(x)
    host.feedback.put_plain()
    host.feedback.put_ahead()
    output.sum().backward()
    assert_equal([x.grad[0]], [host.weights[0].sum(0)])


@pytest.mark.parametrize("masters", [False, True])
@pytest.mark.parametrize("resting", [False, True])
def test_a_resumed_one_equals_the_one_that_went_on(masters: bool, resting: bool) -> None:
    """From the plain iterate, the optimizer's state, and what the stage computed with."""
    first, second = Host(masters), Host(masters)
    for host, number in ((first, 0), (first, 1), (second, 7)):
        host.step(number)
    first.feedback.put_plain()
    saved = [value.clone() for value in (first.feedback.ahead() or ())]
    if not resting:
        first.feedback.put_ahead()
    second.feedback.put_plain()
    second.optimizer.load_state_dict(deepcopy(first.optimizer.state_dict()))
    for mine, theirs in zip(second.masters, plain_iterates(masters, 2)[2], strict=True):
        mine.data.copy_(theirs)
    second.refresh()
    second.feedback.restart(saved)
    assert_equal(second.weights, saved)
    first.feedback.put_ahead()
    for number in (2, 3):
        first.step(number)
        second.step(number)
        assert_equal(second.weights, first.seen())


def test_without_what_it_computed_with_it_begins_at_the_plain_iterate() -> None:
    host, plain = Host(False), plain_iterates(False, 2)
    host.step(0)
    state = deepcopy(host.optimizer.state_dict())
    host.step(7)
    host.optimizer.load_state_dict(state)
    for weight, value in zip(host.weights, plain[1], strict=True):
        weight.data.copy_(value)
    host.feedback.restart(None)
    assert_equal(host.weights, plain[1])
    host.step(1)
    assert_equal(host.weights, ahead(plain, 2))


def test_weights_of_another_stage_are_refused() -> None:
    with pytest.raises(ValueError, match="are of another stage: load the checkpoint with as many stages"):
        Host(False).feedback.restart([torch.ones(2)])


class Unhooked:
    """Steps, and says nothing of it."""


def test_an_optimizer_that_no_hook_can_be_put_around_is_refused() -> None:
    feedback = ErrorFeedback((), [Unhooked()])  # type: ignore[list-item]
    feedback.begin(None)
    with pytest.raises(ValueError, match="cannot be used with the optimizer Unhooked, before and after whose step"):
        feedback.begin(1.0)


@pytest.mark.parametrize("make", [lambda: Host(False, None), lambda: Host(True, None)])
def test_without_error_feedback_nothing_happens(make: Callable[[], Host]) -> None:
    host = make()
    host.step(0)
    before = host.seen()
    assert host.feedback.ahead() is None
    host.feedback.put_plain()
    host.feedback.restart(before)
    host.feedback.put_ahead()
    assert_equal(host.weights, before)
    assert host.feedback.kept() == []


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.detach(), other.detach().to(one.dtype))
