"""Programs as text: one line a rank, one column a step or a slot of time."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

from .action import BACKWARD, FORWARD, UPDATE
from .program import Program, Row
from .timing import Timing

STEPS_AROUND = 6
RANKS_AROUND = 4
SLOTS_PER_SHORTEST = 4
"""A column of time is at most this many times shorter than the shortest forward or backward."""

IDLE = "."
BUSY = "-"
LEGEND = f"{IDLE} idle   {BUSY} still at work   * update   + reduce"

Mark = tuple[int, int]
"""(rank, position in its row); the position may be the row's length, which means its end."""


def text_grid(
    program: Program, mark: Mark | None = None, timing: Timing | None = None, width: int | None = None
) -> str:
    """``program`` as a grid of action names, one line a rank.

    Args:
        mark: a cell to put in brackets; only its neighbourhood is shown, so that errors stay readable.
        timing: when given, a column is a slot of time, as in the figures of papers, and idle time shows.
            It must be the timing of ``program``.
        width: characters of a line; what is wider goes on in a further block below. Default: one block.

    Returns:
        Lines joined by newlines, without one at the end.
    """
    if timing is not None:
        head, cells = _slots(timing)
        legend = [LEGEND]
    else:
        head = [str(step) for step in range(max((len(row) for row in program.rows), default=0) + 1)]
        cells = [[str(action) for action in row] for row in program.rows]
        legend = []
    ranks, columns = range(len(cells)), range(max((len(row) for row in cells), default=0))
    if mark is not None and timing is None:
        ranks, columns = _neighbourhood(mark, cells)
        cells = _marked(cells, mark)
    label = "time" if timing is not None else "step"
    return "\n".join([*_blocks(label, head, cells, ranks, columns, width), *legend])


def _neighbourhood(mark: Mark, cells: Sequence[Sequence[str]]) -> tuple[range, range]:
    rank, position = mark
    ranks = range(max(0, rank - RANKS_AROUND), min(len(cells), rank + RANKS_AROUND + 1))
    last = max([position, *(len(cells[near]) - 1 for near in ranks)])
    return ranks, range(max(0, position - STEPS_AROUND), min(last, position + STEPS_AROUND) + 1)


def _marked(cells: Sequence[Sequence[str]], mark: Mark) -> list[list[str]]:
    rank, position = mark
    rows = [list(row) for row in cells]
    row = [*rows[rank], "end"]
    row[position] = f"[{row[position]}]"
    rows[rank] = row[: max(position + 1, len(row) - 1)]
    return rows


def _blocks(
    label: str, head: Sequence[str], cells: Sequence[Sequence[str]], ranks: range, columns: range, width: int | None
) -> list[str]:
    """The grid's lines; a gap in front of or behind the shown columns is an ellipsis."""

    def cell(row: Sequence[str], column: int) -> str:
        return row[column] if column < len(row) else ""

    name = max(len(f"rank {ranks[-1]}") if ranks else 0, len(label)) + 2
    shown_rows = (head, *(cells[rank] for rank in ranks))
    size = max((len(cell(row, column)) for row in shown_rows for column in columns), default=1)
    per_block = max(1, (width - name) // (size + 1)) if width else max(1, len(columns))
    lines: list[str] = []
    for start in range(0, len(columns), per_block) or range(1):
        shown = columns[start : start + per_block]
        lines += [""] if start else []
        lead = "... " if shown and shown[0] > 0 and start == 0 else ""
        rows = [(label, head, False), *((f"rank {rank}", cells[rank], True) for rank in ranks)]
        for title, row, elides in rows:
            tail = " ..." if elides and width is None and shown and len(row) > shown[-1] + 1 else ""
            body = " ".join(cell(row, column).ljust(size) for column in shown).rstrip()
            prefix = lead if elides and len(row) else " " * len(lead)
            lines.append(f"{title.ljust(name)}{prefix}{body}{tail}".rstrip())
    return lines


def _slot_ticks(timing: Timing) -> int:
    """Nanoseconds of a column: what all forwards and backwards are multiples of, if that is not too short."""
    lengths = [
        end - start
        for row, spans in zip(timing.program.rows, timing.spans, strict=True)
        for action, (start, end) in zip(row, spans, strict=True)
        if action.kind in (FORWARD, BACKWARD)
    ]
    if not lengths:
        return 1
    return max(gcd(*lengths), -(-min(lengths) // SLOTS_PER_SHORTEST))


def _slots(timing: Timing) -> tuple[list[str], list[list[str]]]:
    """The head and the cells of a grid whose columns are time."""
    slot = _slot_ticks(timing)
    rows = [_slot_row(row, spans, slot) for row, spans in zip(timing.program.rows, timing.spans, strict=True)]
    return [str(column) for column in range(max(map(len, rows), default=0))], rows


def _slot_row(row: Row, spans: Sequence[tuple[int, int]], slot: int) -> list[str]:
    """One rank's columns. What is too short for a column is a sign behind the one that it follows."""
    cells: list[str] = []
    for action, (start, end) in zip(row, spans, strict=True):
        first, last = _column(start, slot), _column(end, slot)
        cells += [IDLE] * (first - len(cells))
        if last > first:
            cells += [str(action), *[BUSY] * (last - first - 1)]
        elif action.kind not in (FORWARD, BACKWARD):
            cells = cells or [IDLE]
            cells[-1] += "*" if action.kind == UPDATE else "+"
    return cells


def _column(instant: int, slot: int) -> int:
    """The column that begins nearest to ``instant``; a whole slot is never rounded away."""
    return (2 * instant + slot) // (2 * slot)
