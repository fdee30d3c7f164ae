"""The options of a schedule: the keyword-only arguments of its function, and those that every schedule has.

Their annotations are all there is to say which values they take, from a configuration or from a command line.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import inf
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

Options = Mapping[str, inspect.Parameter]
"""The options of a schedule, each with its annotation and its default."""


@dataclass(frozen=True)
class CommonOptions:
    """What every schedule can be told, beside its own options.

    Args:
        name: which schedule.
        timeout_seconds: the longest that one message or collective of the pipeline may take.
        backward_ratio: time of a backward, in forwards of its stage.
        link_cost: time of a message between ranks, in forwards of cost 1.
        stage_costs: time of every stage's forward, where they differ.
        compensation: what a free-running schedule does about gradients that are late.
        strength: of error feedback, in units of the plan's own figure.
        flush_first: windows at the start of the job that end with a flush all the same.
        decisions: how stages decide what concerns all of them, such as a norm to clip by; ``"auto"``: by what the job
            needs.
    """

    name: str
    timeout_seconds: Annotated[float, Field(gt=0, le=1e8)] = 600.0  # three years; clocks do not hold infinity
    backward_ratio: Annotated[float, Field(gt=0, lt=inf)] = 2.0
    link_cost: Annotated[float, Field(ge=0, lt=inf)] = 0.0
    stage_costs: list[float] | None = None
    compensation: Literal["none", "error_feedback"] = "none"
    strength: Annotated[float, Field(gt=0, lt=inf)] = 1.0
    flush_first: Annotated[int, Field(ge=0)] = 0
    decisions: Literal["auto", "local", "latest", "relayed", "meeting"] = "auto"


COMMON: Mapping[str, Any] = get_type_hints(CommonOptions, include_extras=True)
"""The annotations of the common options."""

IN_WORDS = {"int_type": "a whole number", "float_type": "a number", "bool_type": "true or false"}


def options_of(function: Any, who: str) -> Options:
    """The options of a schedule's ``function``.

    Args:
        who: how messages name the schedule.

    Raises:
        ValueError: when it is no function of a depth and a window, or one of its options has no default, no
            annotation that a value could be checked by, or the name of an option that every schedule has.
    """
    wanted = "a function (num_stages, micro_batches, *, option: type = default, ...)"
    try:
        signature = inspect.signature(function, eval_str=True)
    except Exception as error:  # whatever evaluating an annotation may raise
        raise ValueError(f"{who} must be {wanted}; its signature cannot be read: {error}") from error
    options = {key: value for key, value in signature.parameters.items() if value.kind is value.KEYWORD_ONLY}
    others = [value for key, value in signature.parameters.items() if key not in options]
    if len(others) != 2 or any(value.kind in (value.VAR_POSITIONAL, value.VAR_KEYWORD) for value in others):
        raise ValueError(f"{who} must be {wanted}; it is {signature}")
    for key, option in options.items():
        if key in COMMON:
            raise ValueError(f"{who}: every schedule has an option {key!r} already; give its own another name")
        if option.default is option.empty or option.annotation is option.empty:
            lacks = "default" if option.default is option.empty else "annotation"
            raise ValueError(f"{who}: its option {key!r} has no {lacks}; write {key}: type = default")
        try:
            TypeAdapter(option.annotation)
        except PydanticUserError as error:
            what = f"{who}: no value can be read for its option {key!r}, annotated with {option.annotation!r}"
            raise ValueError(what) from error
    return options


def read_value(annotation: Any, value: Any) -> Any:
    """``value`` of a configuration, as what ``annotation`` says. Raises ``ValidationError`` where it is not that."""
    return TypeAdapter(annotation).validate_python(value, strict=True)


def read_text(annotation: Any, text: str) -> Any:
    """The value that ``text`` stands for on a command line: what it would be in a JSON file, quotes left out.

    Raises:
        ValueError: saying what it should be.
    """
    refusals = []
    for value in _readings(text):
        try:
            return read_value(annotation, value)
        except ValidationError as error:
            refusals.append(error)
    problem = refusals[0].errors()[0]
    expected = IN_WORDS.get(problem["type"]) or problem.get("ctx", {}).get("expected")
    raise ValueError(f"is {expected}, got {text!r}" if expected else f"is {text!r}: {problem['msg']}")


def _readings(text: str) -> Iterator[Any]:
    for written in dict.fromkeys([text, text.lower()]):  # True is as good as true
        try:
            yield json.loads(written)
        except ValueError:
            continue
    yield text
