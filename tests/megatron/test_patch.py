"""patch() and unpatch(), on stand-ins for modules of Megatron-LM (which no package installs) around the real core."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
from megatron.core import pipeline_parallel
from megatron.core.pipeline_parallel import schedules

import amdp_plugin.megatron as plugin
from amdp_plugin.megatron import patching

KEPT = [schedules.get_forward_backward_func]
"""In a list, because a name of this module would be replaced too."""


def add_megatron_arguments(parser: ArgumentParser) -> ArgumentParser:
    parser.add_argument("--lr", type=float)
    return parser


def validate_args(arguments: Namespace, defaults: Any = None) -> Namespace:
    arguments.validated = True
    return arguments


def setup_model_and_optimizer(*args: Any) -> tuple[Any, Any, Any]:
    return "model", None, "scheduler"


def build_train_valid_test_data_iterators(*args: Any) -> str:
    return "iterators"


def save_checkpoint(iteration: int, *args: Any, **kwargs: Any) -> int:
    return iteration


def logical_and_across_model_parallel_group(value: bool) -> str:
    return "reduced"


def reduce_max_stat_across_model_parallel_group(value: float) -> str:
    return "reduced"


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """``megatron.training.training`` of a Megatron-LM that holds functions as the real one does."""
    modules = {name: ModuleType(f"megatron.training{name}") for name in ("", ".arguments", ".initialize", ".training")}
    modules[".arguments"].__dict__.update(add_megatron_arguments=add_megatron_arguments)
    modules[".initialize"].__dict__.update(validate_args=validate_args)
    modules[".training"].__dict__.update(
        get_forward_backward_func=KEPT[0],
        setup_model_and_optimizer=setup_model_and_optimizer,
        build_train_valid_test_data_iterators=build_train_valid_test_data_iterators,
        save_checkpoint=save_checkpoint,
        logical_and_across_model_parallel_group=logical_and_across_model_parallel_group,
        reduce_max_stat_across_model_parallel_group=reduce_max_stat_across_model_parallel_group,
    )
    modules[""].__path__ = []
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, f"megatron.training{name}", module)
    yield modules[".training"]
    plugin.unpatch()


def held(training: ModuleType) -> dict[str, Any]:
    """What every module concerned holds."""
    modules = (schedules, pipeline_parallel, training, sys.modules["megatron.training.arguments"])
    return {
        f"{module.__name__}.{name}": value
        for module in modules
        for name, value in vars(module).items()
        if callable(value)
    }


def test_replaced_wherever_it_is_held_and_given_back(training: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    user = ModuleType("a_job")
    user.choose = KEPT[0]  # type: ignore[attr-defined]  # from ... import get_forward_backward_func as choose
    monkeypatch.setitem(sys.modules, "a_job", user)
    before = held(training)
    said = plugin.patch()
    ours = schedules.get_forward_backward_func
    assert ours is not KEPT[0]
    assert pipeline_parallel.get_forward_backward_func is training.get_forward_backward_func is user.choose is ours
    for name in ("megatron.training.training.get_forward_backward_func", "a_job.choose"):
        assert f"replaced {name}" in said
    assert all(
        getattr(sys.modules[module], name) is not before[f"{module}.{name}"]
        for module, name in patching.TARGETS
        if module != "megatron.training.initialize"
    )
    late = ModuleType("imported_later")
    late.get_forward_backward_func = ours  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "imported_later", late)
    plugin.unpatch()
    assert held(training) == before
    assert user.choose is KEPT[0] and late.get_forward_backward_func is KEPT[0]


def test_patching_twice_is_patching_once(training: ModuleType) -> None:
    before = held(training)
    plugin.patch()
    once = held(training)
    assert all(line.endswith("is replaced already") for line in plugin.patch())
    assert held(training) == once
    plugin.unpatch()
    assert held(training) == before
    plugin.unpatch()
    assert held(training) == before


def test_without_a_schedule_everything_is_megatrons(training: ModuleType) -> None:
    plugin.patch()
    parser = sys.modules["megatron.training.arguments"].add_megatron_arguments(ArgumentParser())
    arguments = parser.parse_args(["--lr", "0.1"])
    assert arguments.pipeline_schedule == "stock"
    assert sys.modules["megatron.training.initialize"].validate_args(arguments, {}).validated
    assert training.setup_model_and_optimizer("provider", "type") == ("model", None, "scheduler")
    assert training.build_train_valid_test_data_iterators() == "iterators"
    assert training.save_checkpoint(3) == 3
    assert training.logical_and_across_model_parallel_group(True) == "reduced"
    assert training.get_forward_backward_func(1, None) is KEPT[0](1, None)
    assert training.get_forward_backward_func(4, None) is schedules.forward_backward_pipelining_without_interleaving


def test_a_wrong_schedule_is_told_before_anything_is_made(training: ModuleType) -> None:
    plugin.patch()
    parser = sys.modules["megatron.training.arguments"].add_megatron_arguments(ArgumentParser())
    arguments = parser.parse_args(["--pipeline-schedule", "pacy"])
    with pytest.raises(ValueError, match=r"unknown schedule 'pacy'; the known ones are .*paci"):
        sys.modules["megatron.training.initialize"].validate_args(arguments, {})
    assert not hasattr(arguments, "validated")


@pytest.mark.parametrize("name", [name for module, name in patching.TARGETS if module.endswith("training.training")])
def test_a_missing_target_is_named_and_nothing_is_replaced(training: ModuleType, name: str) -> None:
    delattr(training, name)
    before = held(training)
    with pytest.raises(ValueError, match=rf"no megatron\.training\.training\.{name}, which has to be replaced"):
        plugin.patch()
    assert held(training) == before


def test_without_megatron_lm_the_other_route_is_named() -> None:
    if "megatron.training" in sys.modules:
        pytest.skip("Megatron-LM is here")
    with pytest.raises(ValueError, match=r"cannot import megatron\.training.*forward_backward_func"):
        plugin.patch()
    assert schedules.get_forward_backward_func is KEPT[0]
