"""The laws that every program obeys, by name, and the error of one that does not."""

from __future__ import annotations

from typing import NamedTuple

from .program import Program
from .render import text_grid


class Law(NamedTuple):
    """One of the laws: its number in DESIGN.md, a name, and what it demands."""

    number: int
    name: str
    demand: str

    def __str__(self) -> str:
        return f"law {self.number} ({self.name}: {self.demand})"


PLACES = Law(1, "places", "every micro-batch is forwarded and backwarded once on every stage, on its direction's rank")
ORDER = Law(2, "order", "nothing runs before what it needs has run")
PROGRESS = Law(3, "progress", "no rank waits for ever, and messages are used in the order in which they are sent")
WINDOWS = Law(4, "windows", "an update applies the gradients of its own window, all of them, once and in turn")
BOUNDS = Law(5, "bounds", "the gap and what is in flight stay within what the schedule states")
FLUSH = Law(6, "flush", "a stage forwards nothing beyond a flush before the update that it waits for")


class ProgramError(ValueError):
    """A program breaks a law. The message names the rank, its step and the law, and shows the cell in the grid.

    Args:
        law: its number, as DESIGN.md counts them.
        cell: (rank, position in its row); the position may be the row's length, which means its end.
    """

    def __init__(self, message: str, law: int, cell: tuple[int, int] | None = None) -> None:
        super().__init__(message)
        self.law = law
        self.cell = cell


def breach(program: Program, rank: int, position: int, law: Law, what: str) -> ProgramError:
    """The error for ``law`` broken by ``program`` at the action ``position`` of ``rank``."""
    row = program.rows[rank]
    cell = f"{row[position]} (rank {rank}, step {position})" if position < len(row) else f"the end of rank {rank}"
    grid = text_grid(program, mark=(rank, position))
    message = f"{program.schedule.name} breaks {law} at {cell}: {what}\n{grid}"
    return ProgramError(message, law.number, (rank, position))
