"""The comparison as a table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isclose
from statistics import mean, median
from typing import Any

from ..plan.costs import CostModel
from .measured import LAST_LOSSES, WARM_UP_STEPS, Run
from .recording import STOCK, Memory

SPEED_HEADER = (
    "configuration", "s/step", "tokens/s", "ratio", "predicted", "largest gap", "train loss", "validation loss",
)  # fmt: skip
RANKS_HEADER = ("configuration", "waiting by rank", "in flight by rank")
MEMORY_HEADER = ("configuration", "weights", "gradients", "optimizer state", "exchange", "sum", "peak")
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
MEMORY_NOTE = (
    "- memory: of the rank that has most. Weights and gradients are those of all stages that it holds, fp32 copies are "
    "with the optimizer state; exchange: what replicas of a stage use to send gradients and weights. peak: the most "
    "that the process had, with activations; on the CPU with Python and all libraries."
)
ALIKE = 1e-6
"""Relative difference of first losses that comes from cutting the same samples into other micro-batches."""
DISTURBING_CORES = 0.2
"""Cores busy with other work from which on times are not to be trusted."""


@dataclass(frozen=True)
class Row:
    """One configuration's figures; see :class:`~.measured.Run`.

    Args:
        turns: how often it was run; times, shares and ratios are medians over them, ratios being taken within a turn.
        ratio: how many times the samples a second of the baseline.
        predicted_ratio: the same, predicted from what actions and messages took in the baseline's run.
        predicted_seconds_per_step: what that prediction is, in seconds.
        ratio_by_turn: what ``ratio`` is the median of.
        time_to_loss: training time to the baseline's last validation loss, over the baseline's own, at the median pace.
        measured_options: what to tell a schedule so that its program is made for what was measured in this run.
        clock: what actions and waits were timed with.
    """

    name: str
    engine: str
    schedule: str
    baseline: str
    steps: int
    warm_steps: int
    turns: int
    stages: int
    ranks: int
    micro_batches: int
    seconds_per_step: float
    tokens_per_second: float | None
    samples_per_second: float
    ratio: float
    ratio_by_turn: list[float]
    predicted_ratio: float
    predicted_seconds_per_step: float
    measured_options: dict[str, Any]
    waiting_share_by_rank: list[float]
    running_share_by_rank: list[float]
    peak_in_flight_by_rank: list[int]
    memory_by_rank: list[Memory | None]
    largest_gap: int
    first_train_loss: float | None
    final_train_loss: float | None
    final_validation_loss: float | None
    time_to_loss: float | None
    others_cores: float | None
    clock: str


def rows(turns: Sequence[Sequence[Run]]) -> list[Row]:
    """The figures of all runs, beside the first one of a stock host, or the first one where none is.

    Args:
        turns: in each, one run of every configuration, in one order.
    """
    of_turns = []
    for runs in turns:
        baseline = next((run for run in runs if run.first.engine == STOCK), runs[0])
        of_turns.append([_row(run, baseline) for run in runs])
    return [_medians(of_configuration) for of_configuration in zip(*of_turns, strict=True)]


def _medians(found: Sequence[Row]) -> Row:
    """One row of the same configuration's in several turns. What does not depend on time is the last turn's."""
    last = found[-1]
    tokens = [row.tokens_per_second for row in found if row.tokens_per_second is not None]
    times = [row.time_to_loss for row in found if row.time_to_loss is not None]
    others = [row.others_cores for row in found if row.others_cores is not None]
    return replace(
        last,
        turns=len(found),
        seconds_per_step=median(row.seconds_per_step for row in found),
        tokens_per_second=median(tokens) if tokens else None,
        samples_per_second=median(row.samples_per_second for row in found),
        ratio=median(row.ratio for row in found),
        ratio_by_turn=[row.ratio for row in found],
        predicted_ratio=median(row.predicted_ratio for row in found),
        predicted_seconds_per_step=median(row.predicted_seconds_per_step for row in found),
        time_to_loss=median(times) if len(times) == len(found) else None,
        waiting_share_by_rank=by_rank([row.waiting_share_by_rank for row in found]),
        running_share_by_rank=by_rank([row.running_share_by_rank for row in found]),
        others_cores=max(others, default=None),
    )


def by_rank(shares: Sequence[Sequence[float]]) -> list[float]:
    """Of every rank, the median over the turns; ``shares`` has a row for each turn."""
    return [median(of_rank) for of_rank in zip(*shares, strict=True)]


def _row(run: Run, baseline: Run) -> Row:
    first, costs = run.first, baseline.costs()
    samples, baseline_samples = (each.first.steps[-1].samples for each in (run, baseline))
    # Micro-batches may differ in size: then an action takes time in proportion to it.
    size = (samples / first.micro_batches) / (baseline_samples / baseline.first.micro_batches)
    predicted, reference = size * run.predicted_seconds(costs), baseline.predicted_seconds(costs)
    ratio = run.samples_per_second / baseline.samples_per_second
    predicted_ratio = (samples / predicted) / (baseline_samples / reference)
    return Row(
        name=run.name,
        engine=first.engine,
        schedule=first.schedule,
        baseline=baseline.name,
        steps=len(first.steps),
        warm_steps=min(map(len, run.intervals)),
        turns=1,
        stages=first.stages,
        ranks=len(run.records),
        micro_batches=first.micro_batches,
        seconds_per_step=run.seconds_per_step,
        tokens_per_second=run.tokens_per_second,
        samples_per_second=run.samples_per_second,
        ratio=ratio,
        ratio_by_turn=[ratio],
        predicted_ratio=predicted_ratio,
        predicted_seconds_per_step=predicted,
        measured_options=_options(run.costs()),
        waiting_share_by_rank=run.waiting_share_by_rank,
        running_share_by_rank=run.running_share_by_rank,
        peak_in_flight_by_rank=run.peak_in_flight_by_rank,
        memory_by_rank=run.memory_by_rank,
        largest_gap=run.largest_gap,
        first_train_loss=run.losses[0],
        final_train_loss=run.final_train_loss,
        final_validation_loss=run.final_validation_loss,
        time_to_loss=_time_to_loss(run, baseline),
        others_cores=run.others_cores,
        clock=first.clock,
    )


def _time_to_loss(run: Run, baseline: Run) -> float | None:
    target = baseline.final_validation_loss
    own, baseline_own = (each.seconds_to(target) if target is not None else None for each in (run, baseline))
    return own / baseline_own if own is not None and baseline_own else None


def table(found: Sequence[Row]) -> str:
    """The figures as Markdown tables, and what they mean."""
    samples = any(row.tokens_per_second is None for row in found)
    speed_header = ["samples/s" if samples and title == "tokens/s" else title for title in SPEED_HEADER]
    memory = [cells for row in found if (cells := _memory(row))]
    lines = [
        *_markdown(speed_header, [_speed(row, samples) for row in found]),
        *_markdown(RANKS_HEADER, [_ranks(row) for row in found]),
        *(_markdown(MEMORY_HEADER, memory) if memory else []),
        *_notes(found, bool(memory)),
    ]
    return "\n".join([*lines, ""])


def _markdown(header: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table, and an empty one."""
    cells = [header, *body]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in cells)
    return [*(f"| {' | '.join(line)} |" for line in padded), ""]


def _name(row: Row) -> str:
    return f"{row.name} ({row.engine} {row.schedule})"


def _speed(row: Row, samples: bool) -> list[str]:
    rate = row.samples_per_second if samples else row.tokens_per_second or 0.0
    return [
        _name(row),
        f"{row.seconds_per_step:.4f}",
        f"{rate:,.1f}" if samples else f"{rate:,.0f}",
        f"{row.ratio:.3f}",
        f"{row.predicted_ratio:.3f}",
        str(row.largest_gap),
        _loss(row.final_train_loss),
        _loss(row.final_validation_loss),
    ]


def _ranks(row: Row) -> list[str]:
    waiting = " ".join(f"{share:.1%}" for share in row.waiting_share_by_rank)
    return [_name(row), waiting, " ".join(map(str, row.peak_in_flight_by_rank))]


def _memory(row: Row) -> list[str]:
    """The largest figures of all ranks; nothing where memory was not measured."""
    measured = [memory for memory in row.memory_by_rank if memory]
    if not measured:
        return []
    largest = Memory.largest(measured)
    kept = (largest.weights, largest.gradients, largest.optimizer_state, largest.exchange)
    return [_name(row), *map(readable, (*kept, max(memory.kept for memory in measured), largest.peak))]


def readable(size: float) -> str:
    """``size`` bytes, with a unit: ``1.50 GiB``."""
    unit = 0
    while round(size) >= 1024 and unit < len(UNITS) - 1:
        size, unit = size / 1024, unit + 1
    return f"{size:.{2 if unit else 0}f} {UNITS[unit]}"


def _loss(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.4f}"


def _options(costs: CostModel) -> dict[str, Any]:
    """``costs`` as options of the ``schedule`` section: in mean forwards."""
    forward = mean(costs.forward)
    return {
        "backward_ratio": round(sum(costs.backward) / sum(costs.forward), 2),
        "link_cost": round(costs.link_latency / forward, 3),
        "stage_costs": [round(seconds / forward, 2) for seconds in costs.forward],
    }


def _notes(found: Sequence[Row], memory: bool) -> list[str]:
    row = found[0]
    sizes = [each.micro_batches for each in found]
    windows = ", ".join(map(str, sizes if len(set(sizes)) > 1 else sizes[:1]))
    return [
        f"{row.stages} stages on {row.ranks} ranks, windows of {windows} micro-batches, {row.steps} steps.",
        "",
        *_spread(found),
        f"- s/step: median time from the end of one training step to the end of the next, on the slowest rank, without "
        f"the first {WARM_UP_STEPS} steps; where a schedule repeats only after several steps, a step's part of that "
        "many. It holds the script's own work between steps (data, progress), but not evaluations and checkpoints. "
        "Tokens a second are at that pace.",
        f"- ratio: samples a second, compared with {row.baseline}. predicted: the same from the plan, with the medians "
        f"of what forwards, backwards, updates and messages took in the run of {row.baseline} (in proportion to the "
        "size of the micro-batches, where that differs).",
        f"- {row.baseline} measured, as options of a schedule: {json.dumps(_of_baseline(found).measured_options)}.",
        "- waiting: share of the time in which a rank waits for others. in flight: the most micro-batches forwarded "
        "and not yet backwarded. largest gap: the most updates between a forward and its backward, as measured.",
        f"- clock of actions and waits: {_clocks(found)}. Steps are timed by the host.",
        *([MEMORY_NOTE] if memory else []),
        "- on the host, the C library keeps what any of them frees (MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_THRESHOLD_), "
        "as PyTorch does on a GPU.",
        f"- train loss: mean of the last {LAST_LOSSES} steps. {_first_losses(found)}",
        *_times_to_loss(found),
        *_disturbances(found),
    ]


def _times_to_loss(found: Sequence[Row]) -> list[str]:
    baseline = _of_baseline(found)
    if baseline.time_to_loss is None:
        return []
    others = [row for row in found if row is not baseline]
    times = ", ".join(
        f"{row.name} {'never' if row.time_to_loss is None else f'{row.time_to_loss:.2f}'}" for row in others
    )
    return [
        f"- training time until an evaluation is as good as the last of {baseline.name}, over its own: {times} "
        "(straight between evaluations, without their time)."
    ]


def _clocks(found: Sequence[Row]) -> str:
    """The clock of all, or of each where they differ: then shares and predictions are not alike."""
    clocks = {row.clock for row in found}
    return clocks.pop() if len(clocks) == 1 else ", ".join(f"{row.clock} in {row.name}" for row in found)


def _spread(found: Sequence[Row]) -> list[str]:
    """How far turns differ, where there are several."""
    if found[0].turns == 1:
        return []
    ranges = ", ".join(f"{row.name} {min(row.ratio_by_turn):.3f} to {max(row.ratio_by_turn):.3f}" for row in found)
    return [
        f"- medians of {found[0].turns} turns, in each of which all ran one after another. ratio by turn: {ranges}."
    ]


def _of_baseline(found: Sequence[Row]) -> Row:
    return next(row for row in found if row.name == row.baseline)


def _disturbances(found: Sequence[Row]) -> list[str]:
    disturbed = [row for row in found if (row.others_cores or 0.0) > DISTURBING_CORES]
    busy = [f"{row.others_cores:.1f} during {row.name}" for row in disturbed]
    if not busy:
        return []
    return [f"- NOTE: other work on this machine kept cores busy ({', '.join(busy)}); do not trust the times."]


def _first_losses(found: Sequence[Row]) -> str:
    losses = [row.first_train_loss for row in found]
    known = [loss for loss in losses if loss is not None]
    if len(known) == len(losses) and isclose(min(known), max(known), rel_tol=ALIKE):
        return f"All began alike: their first step's loss is {losses[0]}."
    pairs = ", ".join(f"{row.name} {row.first_train_loss}" for row in found)
    return f"NOTE: the losses of the first step differ ({pairs}): other weights, data or precision."
