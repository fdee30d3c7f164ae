"""Puts the plugin's functions in the place of Megatron-LM's, wherever those are held, and takes them away again."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any

from ..settings import ScheduleSettings, refusing
from .arguments import add_flags, check_arguments, read_flags
from .checkpoint import load_ahead, load_means, load_random_states, save_ahead, save_means, save_random_states
from .hook import ScheduledForwardBackward
from .stage_view import acting_as
from .targets import TARGETS


class _Job:
    """What the flags of this process's job asked for, and what came of it."""

    settings: ScheduleSettings | None = None
    notices: list[str]
    hook: ScheduledForwardBackward | None = None

    @property
    def runs_freely(self) -> bool:
        """Whether stages train under a schedule that does not let them meet at every step."""
        return self.hook is not None and not self.hook.updates_meet


_job = _Job()
_replaced: list[tuple[Any, str, Any]] = []


def patch() -> list[str]:
    """See :func:`amdp_plugin.megatron.patch`."""
    if _replaced:
        return [f"{module.__name__}.{name} is replaced already" for module, name, _ in _replaced]
    found = [(_find(module, name), name) for module, name in TARGETS]
    for module, name in found:
        original = getattr(module, name)
        _replace_everywhere(original, _WRAPPERS[name](original))
    return [f"replaced {module.__name__}.{name}" for module, name, _ in _replaced]


def unpatch() -> None:
    """See :func:`amdp_plugin.megatron.unpatch`."""
    while _replaced:
        module, name, original = _replaced.pop()
        # Modules that were imported meanwhile have taken ours by value.
        for holder, held in _holders(getattr(module, name)):
            setattr(holder, held, original)
    if _job.hook is not None:
        _job.hook.detach()
    _job.hook = _job.settings = None


def _find(module: str, name: str) -> Any:
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"cannot import {module} ({error}): patch() is for jobs of Megatron-LM, whose folder must be on sys.path; "
            "in a training loop of your own use amdp_plugin.megatron.forward_backward_func()"
        ) from error
    if not hasattr(found, name):
        raise ValueError(f"this Megatron has no {module}.{name}, which has to be replaced; core_v0.16.1 has it")
    return found


def _replace_everywhere(original: Any, ours: Any) -> None:
    for module, name in _holders(original):
        setattr(module, name, ours)
        _replaced.append((module, name, original))


def _holders(function: Any) -> list[tuple[Any, str]]:
    """(module, name) of everything but this package that holds ``function``: ``from ... import`` keeps it by value, and
    ``as`` renames it."""
    own = __package__.partition(".")[0]
    modules = [module for name, module in sys.modules.items() if name.partition(".")[0] != own]
    return [
        (module, name)
        for module in modules
        for name, value in list(getattr(module, "__dict__", {}).items())
        if value is function
    ]


# What takes their place


def _get_forward_backward_func(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def get(*args: Any, **kwargs: Any) -> Any:
        return _job.hook or original(*args, **kwargs)

    return get


def _add_megatron_arguments(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def add(parser: Any, *args: Any, **kwargs: Any) -> Any:
        return add_flags(original(parser, *args, **kwargs))

    return add


def _validate_args(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def validate(arguments: Any, *args: Any, **kwargs: Any) -> Any:
        with refusing():
            _job.settings = read_flags(arguments)  # before Megatron's own, so that a wrong name is told at once
        result = original(arguments, *args, **kwargs)
        if _job.settings is not None:
            with refusing():
                _job.notices = check_arguments(arguments, _job.settings)
        return result

    return validate


def _setup_model_and_optimizer(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def setup(model_provider: Any, *args: Any, **kwargs: Any) -> Any:
        model, optimizer, scheduler = original(model_provider, *args, **kwargs)
        if _job.settings is not None and optimizer is not None:
            from megatron.core.num_microbatches_calculator import get_num_microbatches
            from megatron.training import get_args

            arguments = get_args()
            hook = ScheduledForwardBackward(_job.settings)
            hook.notices = _job.notices
            states = load_random_states(arguments) if arguments.iteration else None
            ahead = load_ahead(arguments) if arguments.iteration else None
            means = load_means(arguments) if arguments.iteration else None
            size = get_num_microbatches()
            hook.attach(model, optimizer, model_provider, arguments.iteration, states, size, ahead, means)
            _job.hook = hook
        return model, optimizer, scheduler

    return setup


def _build_train_valid_test_data_iterators(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def build(*args: Any, **kwargs: Any) -> Any:
        with _reading_where_directions_end():
            return original(*args, **kwargs)

    return build


def _reading_where_directions_end() -> AbstractContextManager[None]:
    """Megatron builds data where its first and last stages are: under several directions that is on more ranks."""
    return acting_as(0) if _job.hook is not None and _job.hook.reads_data else nullcontext()


def _save_checkpoint(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def save(iteration: int, *args: Any, **kwargs: Any) -> Any:
        if _job.hook is not None:
            _job.hook.quiesce()
        result = original(iteration, *args, **kwargs)
        if _job.hook is not None and not kwargs.get("non_persistent_ckpt"):
            save_random_states(_job.hook.random_states(), iteration)
            save_ahead(_job.hook.ahead(), iteration)
            save_means(_job.hook.means(), iteration)
        return result

    return save


def _within_the_stage(original: Callable[..., Any]) -> Callable[..., Any]:
    """What the loop reduces over all stages at every iteration is the stage's own where stages do not meet."""

    @wraps(original)
    def reduce(value: Any, *args: Any, **kwargs: Any) -> Any:
        return value if _job.runs_freely else original(value, *args, **kwargs)

    return reduce


_WRAPPERS: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "get_forward_backward_func": _get_forward_backward_func,
    "add_megatron_arguments": _add_megatron_arguments,
    "validate_args": _validate_args,
    "setup_model_and_optimizer": _setup_model_and_optimizer,
    "build_train_valid_test_data_iterators": _build_train_valid_test_data_iterators,
    "save_checkpoint": _save_checkpoint,
    "logical_and_across_model_parallel_group": _within_the_stage,
    "reduce_max_stat_across_model_parallel_group": _within_the_stage,
}
