"""The options of a schedule as users write them: one set, one set of messages, whatever the host."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError

from .plan import schedules
from .plan.costs import CostModel
from .plan.schedule import Schedule
from .plan.schedules.options import COMMON, CommonOptions, read_value
from .plan.sharing import Tied


class ScheduleRefused(ValueError):
    """A job asks for what no schedule can do. Launchers end it with this message alone."""


@contextmanager
def refusing() -> Iterator[None]:
    """What is wrong within is a refusal of the job, whose message says all: where it was found adds nothing."""
    try:
        yield
    except ValueError as error:
        raise ScheduleRefused(str(error)) from None


@dataclass(frozen=True)
class Needs:
    """What a job wants all stages to decide at every update.

    Args:
        norm: a norm to clip by.
        exact: what no stage can decide by what it knows already: a loss scale.
        tied: for every weight that several stages hold, those stages, ascending.
    """

    norm: bool = False
    exact: bool = False
    tied: Tied = ()

    def decisions(self, schedule: Schedule) -> str:
        """How a free-running ``schedule`` decides where its user leaves that open: exactly, and in a meeting where
        decisions cannot be relayed, where nothing less will do; else without anybody waiting."""
        if self.tied and schedule.reduces:
            return "meeting"
        if self.exact and schedule.weights == "latest":
            at_once = all(stages[0] == 0 for stages in self.tied)
            return "relayed" if at_once and scales_with_windows(schedule) else "meeting"
        return "latest" if self.norm else "local"

    def units(self, schedule: Schedule) -> Tied:
        """The weights of :attr:`tied` that are units of their own under ``schedule``: all, where its stages update one
        by one and each has its latest weights; where updates meet, the host sums their gradients."""
        apart = schedule.placement.directions == 1 and schedule.weights == "latest" and not schedule.updates_meet
        return self.tied if apart else ()


NOTHING = Needs()


def scales_with_windows(schedule: Schedule) -> bool:
    """Whether, with relayed decisions, all gradients of a window have one loss scale when it closes, which is the one
    of its update."""
    first, last = schedule.in_flight[0], schedule.in_flight[-1]
    return schedule.placement.directions == 1 and first <= schedule.micro_batches and last == 1


def check_loss_scale(schedule: Schedule, where: str, instead: str) -> None:
    """Refuse ``schedule`` where the loss is scaled and it cannot decide about that.

    Args:
        where: what asks for it, in the words of the host.
        instead: what needs none.

    Raises:
        ValueError: with the reason and what to do.
    """
    if schedule.updates_meet or (schedule.relays and scales_with_windows(schedule)):
        return
    decisions = '"meeting"'
    if schedule.relays:
        why = (
            f"relayed decisions change it between windows of at least {schedule.in_flight[0]} micro-batches, with one "
            f"in flight on the last stage; these are of {schedule.micro_batches}, with {schedule.in_flight[-1]}"
        )
    else:
        why = "all stages must decide together, at every step, whether to skip it"
        if schedule.weights == "latest" and scales_with_windows(schedule):
            decisions = '"relayed" or "meeting"'
    raise ValueError(
        f"schedule {schedule.name!r} cannot be used with {where}, which scales the loss: {why}; use {instead}, "
        f'"decisions": {decisions}, or a schedule that flushes (1f1b)'
    )


@dataclass(frozen=True)
class ScheduleSettings(CommonOptions):
    """Which schedule to run, and what it was told.

    Args:
        options: of its own options, those that were given.
    """

    options: Mapping[str, Any] = field(default_factory=dict)

    def costs(self, num_stages: int) -> CostModel:
        """What the program is made for. Only the ratios matter.

        Raises:
            ValueError: when ``stage_costs`` are of another number of stages, or no times.
        """
        return CostModel.relative(
            num_stages,
            backward_ratio=self.backward_ratio,
            link_cost=self.link_cost,
            stage_costs=self.stage_costs or (),
        )

    def make(self, num_stages: int, micro_batches: int, needs: Needs = NOTHING) -> Schedule:
        """The schedule for a pipeline of ``num_stages`` and windows (optimizer steps) of ``micro_batches``.

        Args:
            needs: what the job wants all stages to decide. It says which way ``"decisions": "auto"`` is.

        Raises:
            ValueError: when the numbers make no schedule.
        """
        told = dict(compensation=self.compensation, strength=self.strength, flush_first=self.flush_first)
        decisions: str = self.decisions
        tied: Tied = ()

        def make() -> Schedule:
            return schedules.make(
                self.name, num_stages, micro_batches, **told, decisions=decisions, tied=tied, **self.options  # type: ignore[arg-type]
            )

        made = make()
        if self.decisions == "auto" and not made.updates_meet and needs.decisions(made) != made.decisions:
            decisions = needs.decisions(made)
            made = make()
        tied = needs.units(made)
        return make() if tied else made

    def kept(self, schedule: Schedule) -> ScheduleSettings:
        """For windows of other sizes in the same job, which decide as ``schedule`` does: whether a host reduces norms
        and overflow over a stage or over all, and what stages share, it was told once."""
        return self if schedule.flush else replace(self, decisions=schedule.decisions)  # type: ignore[arg-type]


def read_schedule(section: Any, where: str) -> ScheduleSettings:
    """Read a schedule's name, or a mapping with its ``"name"`` and options.

    Args:
        section: what the user wrote.
        where: where and how it was written, for the message that refuses something else.

    Raises:
        ValueError: for an unknown schedule, and for options that it does not have or values that they do not take,
            all of them in one message.
    """
    if isinstance(section, str):
        section = {"name": section}
    if not isinstance(section, Mapping) or not isinstance(section.get("name"), str):
        raise ValueError(
            f'{where} must be a name, or an object with a "name" and options; '
            f"the names are {', '.join(schedules.names())}"
        )
    name = section["name"]
    own = {key: option.annotation for key, option in schedules.options(name).items()}
    known, values = {**COMMON, **own}, {}
    unknown = [key for key in section if key not in known]
    wrong = [_unknown(name, unknown, [option for option in known if option != "name"])] if unknown else []
    for key, value in section.items():
        if key in unknown:
            continue
        try:
            values[key] = read_value(known[key], value)
        except ValidationError as error:
            wrong += [_explain(name, key, problem) for problem in error.errors()]
    if wrong:
        raise ValueError("; ".join(wrong))
    options = {key: values.pop(key) for key in own if key in values}
    return ScheduleSettings(**values, options=options)


def _unknown(name: str, keys: Sequence[Any], known: Sequence[str]) -> str:
    meant = {key: get_close_matches(str(key).lower(), known, n=1, cutoff=0.75) for key in keys}
    said = [f"{key!r} (did you mean {meant[key][0]!r}?)" if meant[key] else repr(key) for key in keys]
    return f"schedule {name!r} has no option {', '.join(said)}; its options are {', '.join(known)}"


def _explain(name: str, key: str, problem: Mapping[str, Any]) -> str:
    option = ".".join([key, *map(str, problem["loc"])])
    return f"option {option!r} of schedule {name!r} is {problem['input']!r}: {problem['msg']}"
