"""The named schedules, one short file each, and the registry that finds them.

A schedule is a function ``(num_stages, micro_batches, *, option=default, ...) -> Schedule``; its
keyword-only arguments are its options. Other packages add theirs through the entry-point group
``amdp_plugin.schedules``: the entry's name is the schedule's, its object the function.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import entry_points
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

from ..schedule import Schedule
from .amdp import amdp
from .chimera import chimera
from .gpipe import gpipe
from .one_f_one_b import one_f_one_b
from .paci import paci

ENTRY_POINT_GROUP = "amdp_plugin.schedules"
BUILT_IN: Mapping[str, Callable[..., Schedule]] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "chimera": chimera,
    "paci": paci,
    "amdp": amdp,
}


@cache
def _third_party() -> Mapping[str, Any]:
    entries = {entry.name: entry for entry in entry_points(group=ENTRY_POINT_GROUP)}
    taken = sorted(entries.keys() & BUILT_IN.keys())
    if taken:
        raise ValueError(f"entry points of {ENTRY_POINT_GROUP} cannot replace the built-in schedules {taken}")
    return entries


def names() -> list[str]:
    """Every schedule that can be asked for by name."""
    return sorted([*BUILT_IN, *_third_party()])


def factory(name: str) -> Callable[..., Schedule]:
    """The function that makes schedule ``name``. Raises ``ValueError`` with the known names."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    if name not in _third_party():
        raise ValueError(f"unknown schedule {name!r}; the known ones are {', '.join(names())}")
    return _third_party()[name].load()


def options(name: str) -> dict[str, inspect.Parameter]:
    """The options of schedule ``name``: its keyword-only arguments."""
    parameters = inspect.signature(factory(name), eval_str=True).parameters
    return {key: value for key, value in parameters.items() if value.kind is inspect.Parameter.KEYWORD_ONLY}


def read_option(name: str, option: str, text: str) -> Any:
    """The value that ``text``, from a command line, gives to ``option`` of schedule ``name``.

    Raises:
        ValueError: when the option is unknown or ``text`` is not of its type.
    """
    if option not in (known := options(name)):
        raise ValueError(f"schedule {name!r} has no option {option}; it has {', '.join(known) or 'none'}")
    wanted = known[option].annotation
    if get_origin(wanted) is UnionType:
        wanted = next(kind for kind in get_args(wanted) if kind is not NoneType)
    if wanted is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if wanted not in (int, float):
        if wanted is bool:
            raise ValueError(f"option {option} of schedule {name!r} is true or false, got {text!r}")
        return text
    try:
        return wanted(text)
    except ValueError:
        kind = "a whole number" if wanted is int else "a number"
        raise ValueError(f"option {option} of schedule {name!r} is {kind}, got {text!r}") from None


def make(name: str, num_stages: int, micro_batches: int, **chosen: Any) -> Schedule:
    """Schedule ``name`` for a pipeline of ``num_stages`` and windows of ``micro_batches``.

    Raises:
        ValueError: for an unknown name, an unknown option, or numbers that make no schedule.
    """
    make_schedule, known = factory(name), options(name)
    unknown = sorted(chosen.keys() - known.keys())
    if unknown:
        raise ValueError(f"schedule {name!r} has no option {', '.join(unknown)}; it has {', '.join(known) or 'none'}")
    if num_stages < 1:
        raise ValueError(f"{name}: a pipeline needs at least one stage, got {num_stages}")
    if micro_batches < 1:
        raise ValueError(f"{name}: a window needs at least one micro-batch, got {micro_batches}")
    return make_schedule(num_stages, micro_batches, **chosen)
