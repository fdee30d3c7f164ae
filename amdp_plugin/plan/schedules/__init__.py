"""The named schedules, one short file each, and the registry that finds them.

A schedule is a function ``(num_stages, micro_batches, *, option=default, ...) -> Schedule``; its
keyword-only arguments are its options, each with an annotation and a default. Other packages add theirs
through the entry-point group ``amdp_plugin.schedules``: the entry's name is the schedule's, its object the function.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import replace
from difflib import get_close_matches
from functools import cache, partial
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from ..schedule import Schedule
from ..sharing import Tied
from .amdp import amdp
from .chimera import chimera
from .gpipe import gpipe
from .one_f_one_b import one_f_one_b
from .options import Options, options_of, read_text
from .paci import paci
from .pipedream import pipedream
from .pipedream_2bw import pipedream_2bw
from .pipemare import pipemare
from .spectrain import spectrain
from .xpipe import xpipe

ENTRY_POINT_GROUP = "amdp_plugin.schedules"
BUILT_IN: Mapping[str, Callable[..., Schedule]] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "chimera": chimera,
    "paci": paci,
    "amdp": amdp,
    "pipedream": pipedream,
    "pipedream-2bw": pipedream_2bw,
    "pipemare": pipemare,
    "spectrain": spectrain,
    "xpipe": xpipe,
}


@cache
def _third_party() -> Mapping[str, EntryPoint]:
    entries = {entry.name: entry for entry in entry_points(group=ENTRY_POINT_GROUP)}
    taken = sorted(entries.keys() & BUILT_IN.keys())
    if taken:
        raise ValueError(f"entry points of {ENTRY_POINT_GROUP} cannot replace the built-in schedules {taken}")
    return entries


def names() -> list[str]:
    """Every schedule that can be asked for by name."""
    return sorted([*BUILT_IN, *_third_party()])


def factory(name: str) -> Callable[..., Schedule]:
    """The function that makes schedule ``name``.

    Raises:
        ValueError: with the known names, or for a function that is not one of a schedule.
    """
    return _find(name)[0]


def options(name: str) -> Options:
    """The options of schedule ``name``: its function's keyword-only arguments. Raises as :func:`factory`."""
    return _find(name)[1]


def _find(name: str) -> tuple[Callable[..., Schedule], Options]:
    if name not in BUILT_IN and name not in _third_party():
        meant = "".join(f"; did you mean {match!r}?" for match in get_close_matches(name.lower(), names(), n=1))
        raise ValueError(f"unknown schedule {name!r}; the known ones are {', '.join(names())}{meant}")
    found = BUILT_IN[name] if name in BUILT_IN else _load(name)
    return found, options_of(found, _who(name))


def _load(name: str) -> Any:
    try:
        return _third_party()[name].load()
    except Exception as error:  # it is another package's code
        raise ValueError(f"{_who(name)} cannot be loaded: {type(error).__name__}: {error}") from error


def _who(name: str) -> str:
    """Schedule ``name``, and where it comes from, for messages about what is wrong with it."""
    entry = _third_party().get(name)
    return f"schedule {name!r}" if entry is None else f"schedule {name!r} (entry point {entry.value})"


def read_option(name: str, option: str, text: str) -> Any:
    """The value that ``text``, from a command line, gives to ``option`` of schedule ``name``.

    Raises:
        ValueError: when the option is unknown or ``text`` is not of its type.
    """
    known = options(name)
    _refuse_unknown(name, {option}, known)
    try:
        return read_text(known[option].annotation, text)
    except ValueError as error:
        raise ValueError(f"option {option} of schedule {name!r} {error}") from None


def make(
    name: str,
    num_stages: int,
    micro_batches: int,
    *,
    compensation: str = "none",
    strength: float = 1.0,
    flush_first: int = 0,
    decisions: str = "auto",
    tied: Sequence[Sequence[int]] = (),
    **chosen: Any,
) -> Schedule:
    """Schedule ``name`` for a pipeline of ``num_stages`` and windows of ``micro_batches``.

    Args:
        compensation: what is done about gradients that are late; ``strength`` goes with it. See :class:`.Schedule`.
        flush_first: windows at the start of a job that end with a flush all the same.
        decisions: how stages decide what concerns all of them; ``"auto"``: as the schedule itself has it. See
            :class:`.Schedule`.
        tied: for every weight that stages share and that is to be a unit of its own, those stages. See
            :class:`.Schedule`.
        chosen: the schedule's own options.

    Raises:
        ValueError: for an unknown name, an unknown option, numbers that make no schedule, compensation or decisions of
            a schedule that flushes, or a function that makes another schedule than it was asked for.
    """
    make_schedule, known = _find(name)
    _refuse_unknown(name, chosen.keys(), known)
    if num_stages < 1:
        raise ValueError(f"{name}: a pipeline needs at least one stage, got {num_stages}")
    if micro_batches < 1:
        raise ValueError(f"{name}: a window needs at least one micro-batch, got {micro_batches}")
    made = make_schedule(num_stages, micro_batches, **chosen)
    if not isinstance(made, Schedule):
        raise ValueError(f"{_who(name)} must return a Schedule, it returned a {type(made).__name__}")
    if (made.num_stages, made.micro_batches) != (num_stages, micro_batches):
        raise ValueError(
            f"{_who(name)} was asked for {num_stages} stages and windows of {micro_batches} micro-batches, it made "
            f"{made.num_stages} stages and windows of {made.micro_batches}"
        )
    if compensation == "none" and strength != 1.0:
        raise ValueError(
            f'{name}: strength {strength:g} is of "compensation": "error_feedback", which was not asked for; add '
            "that, or leave strength out"
        )
    told: dict[str, Any] = {}
    if compensation != "none":
        told.update(compensation=compensation, strength=strength)
    if flush_first:
        told.update(flush_first=flush_first)
    if decisions != "auto":
        if made.flush:
            raise ValueError(
                f'{name}: it flushes at every window, where all stages decide together anyway; leave out "decisions": '
                f'"{decisions}"'
            )
        told.update(decisions=decisions)
    made = _told(made, told) if told else made
    return _with_tied(made, tuple(map(tuple, tied))) if tied else made


def _bounds_of_meetings(schedule: Schedule) -> dict[str, Any]:
    """An update waits for the meeting, so that a micro-batch forwarded meanwhile misses it, too: its gap grows, or its
    weights are kept for longer. Where they are those before the update of the window before, it waits for them."""
    per_direction = max(1, schedule.micro_batches // schedule.placement.directions)
    most = schedule.flush_every - 1 if schedule.flush_every else sys.maxsize
    missed = [min(most, -(-admitted // per_direction)) for admitted in schedule.in_flight]
    if not schedule.keeps_versions:
        return {"max_gap": tuple(map(max, schedule.max_gap, missed))}
    if schedule.weights == "previous":
        return {}
    if schedule.weights == "synchronized":  # by those of stage 0, which admits most
        missed = [missed[0]] * schedule.num_stages
    return {"weight_versions": tuple(1 + late for late in missed)}


def _told(schedule: Schedule, told: Mapping[str, Any]) -> Schedule:
    """``schedule``, its alternatives and its smaller likes with what all schedules can be told."""
    alternatives = tuple(_told(each, told) for each in schedule.alternatives)
    bounds = _bounds_of_meetings(schedule) if told.get("decisions") == "meeting" else {}
    smaller = schedule.smaller and partial(_smaller, schedule.smaller, told)
    options = {**schedule.options, **told}
    return replace(schedule, **told, **bounds, alternatives=alternatives, smaller=smaller, options=options)


def _with_tied(schedule: Schedule, tied: Tied) -> Schedule:
    """``schedule`` and its alternatives with tied weights; on smaller likes, which have other stages, none."""
    alternatives = tuple(_with_tied(each, tied) for each in schedule.alternatives)
    return replace(schedule, tied=tied, alternatives=alternatives, options={**schedule.options, "tied": tied})


def _smaller(made: Callable[[int], Schedule], told: Mapping[str, Any], at_most: int) -> Schedule:
    return _told(made(at_most), told)


def _refuse_unknown(name: str, chosen: Set[str], known: Options) -> None:
    unknown = sorted(chosen - known.keys())
    if unknown:
        raise ValueError(f"schedule {name!r} has no option {', '.join(unknown)}; it has {', '.join(known) or 'none'}")
