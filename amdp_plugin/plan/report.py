"""The figures that a user reads before a run."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from textwrap import wrap
from typing import Any

from .action import BACKWARD, UPDATE
from .collection import uncollected
from .decisions import WindowsAgo, windows_ago
from .devices import Provision, provide
from .extrapolation import Extrapolation, planned_extrapolation
from .laws import PROGRESS, ProgramError
from .planner import Planner
from .program import Program
from .schedule import Schedule
from .simulate import in_flight, simulate
from .staleness import coefficient, mean_staleness
from .tied import TiedWeight, tied_weights
from .verify import verify
from .versions import Version, versions

RECOMPUTATION = (
    "Activation recomputation re-runs the forward at backward time: where the gap is above 0 it uses the new weights "
    "for both."
)

DECIDED = {
    "local": "each stage by its own sum",
    "relayed": "by the sums of all stages for the same window, which go down with gradients and up with activations, "
    "so that updates stand some backwards after their windows have closed",
    "meeting": "all stages meet at every update",
}


@dataclass(frozen=True)
class Report:
    """What a schedule costs and gives, in its steady state unless said otherwise.

    Args:
        windows: windows that the user asked to see. The figures do not depend on it.
        utilization: busy share of all ranks between two like instants.
        bubble: ``1 - utilization``.
        seconds_per_window: time of one window.
        forwards_per_window: the same, in forwards of one (mean) stage.
        max_version_gap: the largest of ``version_gap_by_stage``.
        max_version_gap_stated: the largest gap that the schedule states it may show.
        max_staleness: updates between a forward and the update its gradient goes into, at most.
        mean_staleness_by_stage: the same in the mean over the micro-batches of a window.
        compensation: what is done about it.
        decisions: how stages decide what concerns all of them.
        windows_ago: ``[stage][other]``: how many windows before that of an update of ``stage`` the sum of ``other`` is
            that it takes; ``None`` where each decides alone, or all meet.
        update_delay_by_stage: backwards of later windows between the last of a window and its update, at most.
        flush_first: windows at the start of a job that end with a flush all the same.
        opening_forwards_per_window: time of one of these, as ``forwards_per_window``; ``None`` without them.
        coefficient: what error feedback multiplies a stage's last update with; see :mod:`.staleness`.
        extrapolation: of weights that no update has made, and of learning rates; ``None`` where there is nothing of it.
        version_gap_by_stage: (version at backward) - (version at forward), the largest of each stage.
        mismatched_by_stage: micro-batches with a gap above 0, in the window that has most of them.
        peak_in_flight_by_rank: micro-batches forwarded and not yet backwarded, at most, over all stages of the rank
            and with the warm-up.
        master_weights: whether optimizers step master copies. With error feedback those are the plain iterate; else
            it is one more copy at the home of a stage.
        weight_copies_by_rank: copies of the weights of one stage that a rank holds, master copies not counted.
        gradient_copies_by_rank: the same of sums of gradients: one for every stage here, and one for every closed
            window that is parked.
        optimizer_states_by_rank: stages whose optimizer state a rank keeps. Under 1F1B all three are 1.
        tied: weights that several stages share: how late they are on each, and copies of them and of their gradients.
        deadlock_free: whether no rank waits for ever; ``breach`` says who does.
        provision: what ranks have on GPUs, so that this holds there, too; ``None`` where that was not asked for.
        verified_windows: windows on which all laws were checked, from the first on.
        period: windows after which everything repeats, so that the laws hold for ever; ``None`` where a flush comes
            after more windows than were looked at: the figures are those of the later half of ``verified_windows``.
    """

    schedule: str
    options: Mapping[str, Any]
    stages: int
    ranks: int
    directions: int
    micro_batches: int
    windows: int
    utilization: float
    bubble: float
    seconds_per_window: float
    forwards_per_window: float
    max_version_gap: int
    max_version_gap_stated: int
    max_staleness: int
    mean_staleness_by_stage: tuple[float, ...]
    compensation: str
    decisions: str
    windows_ago: WindowsAgo | None
    update_delay_by_stage: tuple[int, ...]
    flush_first: int
    opening_forwards_per_window: float | None
    coefficient: float | None
    extrapolation: Extrapolation | None
    master_weights: bool
    version_gap_by_stage: tuple[int, ...]
    mismatched_by_stage: tuple[int, ...]
    peak_in_flight_by_rank: tuple[int, ...]
    weight_copies_by_rank: tuple[int, ...]
    gradient_copies_by_rank: tuple[int, ...]
    optimizer_states_by_rank: tuple[int, ...]
    tied: tuple[TiedWeight, ...]
    deadlock_free: bool
    breach: str | None
    provision: Provision | None
    verified_windows: int
    period: int | None

    def to_json(self) -> str:
        """One JSON object whose keys are the fields."""
        return json.dumps(asdict(self), indent=2)

    def to_text(self, width: int = 100) -> str:
        """A few lines for the terminal, wrapped to ``width`` characters."""
        options = "".join(f", {name} = {value}" for name, value in self.options.items())
        lines = [
            f"{self.schedule}: {_count(self.stages, 'stage')} on {_count(self.ranks, 'rank')}, "
            f"{_count(self.directions, 'direction')}, windows of {_count(self.micro_batches, 'micro-batch')}{options}",
            "",
            *_item("utilization", f"{self.utilization:.3f} in the steady state (bubble {self.bubble:.3f})", width),
            *_item("window", f"takes {self.forwards_per_window:.6g} stage forwards", width),
            *self._opening(width),
            *_item("largest gap", f"{_count(self.max_version_gap, 'update')} between a forward and its backward "
                   f"({self.max_version_gap_stated} stated); staleness {self.max_staleness}", width),
            *_item("deadlock-free", self._proof(), width),
            *(_item("on GPUs", self._provided(self.provision), width) if self.provision else ()),
            *_item("gap", f"by stage: {_numbers(self.version_gap_by_stage)}", width),
            *_item("mismatched", f"micro-batches of a window, by stage: {_numbers(self.mismatched_by_stage)}", width),
            *_item("in flight", f"at most, by rank: {_numbers(self.peak_in_flight_by_rank)}", width),
            *_item("compensation", self._compensated(), width),
            *_item("decisions", self._decided(), width),
            *(_item("weights", str(self.extrapolation), width) if self.extrapolation else ()),
            *_item("weight copies", f"by rank: {_numbers(self.weight_copies_by_rank)}", width),
            *_item("gradients", f"copies, by rank: {_numbers(self.gradient_copies_by_rank)}; optimizer states: "
                   f"{_numbers(self.optimizer_states_by_rank)}", width),
            *(line for each in self.tied for line in _item("tied weight", _shared(each), width)),
            "",
            RECOMPUTATION,
        ]
        return "\n".join(lines)

    def _opening(self, width: int) -> list[str]:
        if self.opening_forwards_per_window is None:
            return []
        took = f"end with a flush and take {self.opening_forwards_per_window:.6g} stage forwards each"
        return list(_item("opening", f"the first {_count(self.flush_first, 'window')} of a job {took}", width))

    def _compensated(self) -> str:
        stale = f"the largest mean staleness of a stage is r = {max(self.mean_staleness_by_stage):.6g}"
        if self.coefficient is None:
            return f"none; {stale}"
        more = "one more copy of a stage's weights at its home, none with master weights"
        place = "the master weights" if self.master_weights else more
        return f"error feedback, x = z + {self.coefficient:.6g} (z - z_before); {stale}; z is {place}"

    def _decided(self) -> str:
        if self.decisions == "latest" and self.windows_ago is not None:
            most = _count(max(map(max, self.windows_ago)), "window")
            return f"by a stage's own sum and the latest that it knows of the others, at most {most} old; nobody waits"
        delays = _numbers(self.update_delay_by_stage)
        return DECIDED[self.decisions] + (f" (by stage: {delays})" if self.decisions == "relayed" else "")

    def _provided(self, provision: Provision) -> str:
        replicated = f"; {provision}" if self.directions > 1 else ""
        return f"yes, with messages that occupy their device until they are received, as NCCL's do{replicated}"

    def _proof(self) -> str:
        if self.breach is not None:
            return f"NO: {self.breach.splitlines()[0]}"
        checked = f"yes: every law holds on {_count(self.verified_windows, 'window')}"
        if self.period is None:
            return f"{checked}; no repetition was seen in them"
        repeat = "the last repeats" if self.period == 1 else f"the last {self.period} repeat"
        return f"{checked}, and {repeat} for ever"


@uncollected()
def report(planner: Planner, windows: int, master_weights: bool = False, on_devices: bool = False) -> Report:
    """The figures of ``planner``'s schedule under its costs.

    Args:
        windows: that the user asked to see.
        master_weights: whether optimizers step master copies.
        on_devices: whether to prove it for GPUs, too, and say what that takes (:mod:`.devices`).

    Raises:
        ProgramError: when the schedule breaks a law, or nothing makes it run on GPUs. Only ranks that wait for each
            other (law 3) are reported instead, by ``deadlock_free``.
    """
    schedule, opening = planner.schedule, planner.schedule.opening()
    begins = Planner(opening, planner.costs) if opening else None
    begun = report(begins, 1) if begins else None
    settled = planner.settled_windows()
    first, last = settled.start, settled.stop
    program = planner.program(last)
    order, ago, breach = _proof(planner, program)
    timing = simulate(program, planner.costs, order)
    found = versions(program)
    utilization, seconds = timing.utilization(first, last), timing.seconds_per_window(first, last)
    gaps = _gap_by_stage(schedule, found)
    staleness, extrapolation = mean_staleness(schedule, found, settled), planned_extrapolation(planner)
    peaks = tuple(max(in_flight(program, rank)) for rank in range(schedule.num_ranks))
    gradients = _gradient_copies(program)
    if begun is not None:
        peaks = tuple(map(max, peaks, begun.peak_in_flight_by_rank))
        gradients = tuple(map(max, gradients, begun.gradient_copies_by_rank))
    return Report(
        schedule=schedule.name,
        options=schedule.options,
        stages=schedule.num_stages,
        ranks=schedule.num_ranks,
        directions=schedule.placement.directions,
        micro_batches=schedule.micro_batches,
        windows=windows,
        utilization=utilization,
        bubble=1 - utilization,
        seconds_per_window=seconds,
        forwards_per_window=seconds * schedule.num_stages / sum(planner.costs.forward),
        max_version_gap=max(gaps),
        max_version_gap_stated=max(schedule.max_gap),
        max_staleness=max(version.staleness for version in found.values()),
        mean_staleness_by_stage=staleness,
        compensation=schedule.compensation,
        decisions="meeting" if schedule.updates_meet else schedule.decisions,
        windows_ago=ago,
        update_delay_by_stage=schedule.update_delay,
        flush_first=schedule.flush_first,
        opening_forwards_per_window=begun.forwards_per_window if begun else None,
        coefficient=coefficient(schedule, staleness),
        extrapolation=extrapolation,
        master_weights=master_weights,
        version_gap_by_stage=gaps,
        mismatched_by_stage=_mismatched_by_stage(schedule, found, settled),
        peak_in_flight_by_rank=peaks,
        weight_copies_by_rank=_weight_copies(schedule, extrapolation, master_weights),
        gradient_copies_by_rank=gradients,
        optimizer_states_by_rank=tuple(len(homes) for homes in _homes(schedule)),
        tied=tied_weights(planner, settled),
        deadlock_free=breach is None,
        breach=breach,
        provision=provide([planner, begins] if begins else [planner]) if on_devices and not breach else None,
        verified_windows=last,
        period=planner.period,
    )


def _proof(
    planner: Planner, program: Program
) -> tuple[Sequence[int] | None, WindowsAgo | None, str | None]:
    """(an order of its actions, the sums that its updates take, ``None``), or at the end who waits for whom."""
    try:
        order = verify(program)
        return order, windows_ago(planner, order), None
    except ProgramError as error:
        if error.law != PROGRESS.number:
            raise
        return None, None, str(error)


def _gap_by_stage(schedule: Schedule, found: Mapping[tuple[int, int], Version]) -> tuple[int, ...]:
    gaps = [0] * schedule.num_stages
    for (stage, _), version in found.items():
        gaps[stage] = max(gaps[stage], version.gap)
    return tuple(gaps)


def _mismatched_by_stage(
    schedule: Schedule, found: Mapping[tuple[int, int], Version], windows: range
) -> tuple[int, ...]:
    counts = {window: [0] * schedule.num_stages for window in windows}
    for (stage, micro_batch), version in found.items():
        window = micro_batch // schedule.micro_batches
        if version.gap and window in counts:
            counts[window][stage] += 1
    return tuple(map(max, zip(*counts.values(), strict=True)))


def _weight_copies(
    schedule: Schedule, extrapolation: Extrapolation | None, master_weights: bool
) -> tuple[int, ...]:
    """A stage that uses several versions keeps each, beside the weights that its optimizer steps, and one that
    extrapolates keeps those meanwhile; with error feedback its home keeps the plain iterate too, where that is no
    master copy."""
    copies = [1 if number == 1 else 1 + number for number in schedule.weight_versions]
    if extrapolation is not None:
        copies = [1 + extrapolation.copies(stage) for stage in range(schedule.num_stages)]
    plain = 0 if schedule.compensation == "none" or master_weights else 1
    return tuple(
        sum(copies[stage] for stage in stages) + plain * len(homes)
        for stages, homes in zip(schedule.placement.stages, _homes(schedule), strict=True)
    )


def _homes(schedule: Schedule) -> list[list[int]]:
    """For every rank, the stages that have their home there."""
    home = schedule.placement.home
    return [[stage for stage in stages if home(stage) == rank] for rank, stages in enumerate(schedule.placement.stages)]


def _gradient_copies(program: Program) -> tuple[int, ...]:
    """On a rank, for every stage there, the most windows that have begun and are not in the weights. Where several
    ranks hold a stage, what is parked is what the home has gathered."""
    schedule, homes = program.schedule, _homes(program.schedule)
    if schedule.reduces:
        parked = int(any(schedule.update_delay))
        return tuple(len(held) + parked * len(homes[rank]) for rank, held in enumerate(schedule.placement.stages))
    copies = []
    for rank, row in enumerate(program.rows):
        backwards, updates, most = Counter[int](), Counter[int](), dict.fromkeys(schedule.placement.stages[rank], 1)
        for stage, kind, _ in row:
            if schedule.sharing.is_tied(stage):
                continue
            backwards[stage] += kind == BACKWARD
            updates[stage] += kind == UPDATE
            begun = -(-backwards[stage] // schedule.backwards_per_window(rank, stage))
            most[stage] = max(most[stage], begun - updates[stage])
        copies.append(sum(most.values()))
    return tuple(copies)


def _shared(weight: TiedWeight) -> str:
    means = " ".join(f"{mean:.6g}" for mean in weight.mean_staleness)
    return (
        f"{weight.unit}, of the stages {_numbers(weight.stages)}, stepped with the first: gap {_numbers(weight.gap)}, "
        f"staleness {_numbers(weight.staleness)} (in the mean {means}); copies beside it: "
        f"{_numbers(weight.values)} of its value, {_numbers(weight.sums)} of a sum of its gradients"
    )


def _count(number: int, word: str) -> str:
    plural = {"micro-batch": "micro-batches"}.get(word, f"{word}s")
    return f"{number} {word if number == 1 else plural}"


def _numbers(numbers: tuple[int, ...]) -> str:
    """``1 1 0``; a long run of one number is written ``1 (x60)``."""
    runs = [(number, len(list(run))) for number, run in groupby(numbers)]
    return " ".join(f"{number} (x{count})" if count > 8 else " ".join([str(number)] * count) for number, count in runs)


def _item(name: str, text: str, width: int) -> list[str]:
    """``text`` behind ``name``, wrapped and indented."""
    indent = 15
    first, *rest = wrap(text, max(20, width - indent))
    return [name.ljust(indent) + first, *(" " * indent + line for line in rest)]
