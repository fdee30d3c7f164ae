"""A stretch of a schedule as a value: for every rank, the ordered tuple of actions it executes."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from functools import cached_property

from .action import BACKWARD, UPDATE, Action
from .graph import Graph
from .schedule import Schedule

Row = tuple[Action, ...]


@dataclass(frozen=True)
class Program:
    """The first ``windows`` windows of ``schedule``; ``rows[rank]`` is what that rank does, in order.

    What a free-running schedule has forwarded beyond the last window stays in the rows: it is in flight.
    """

    schedule: Schedule
    windows: int
    rows: tuple[Row, ...]

    @cached_property
    def graph(self) -> Graph:
        """What its actions wait for."""
        return Graph(self.schedule, self.rows)

    def to_csv(self) -> str:
        """One line a rank. A flush implies the updates, so a flushing program in one direction without tied weights
        holds only forwards and backwards, and torch.distributed.pipelining reads it as its own compute CSV."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        for row in self.rows:
            writer.writerow(str(action) for action in row if not (self._implies_updates and action.kind == UPDATE))
        return text.getvalue()

    @classmethod
    def from_csv(cls, text: str, schedule: Schedule) -> Program:
        """Read what :meth:`to_csv` wrote. Raises ``ValueError`` when the rows are not of ``schedule``."""
        rows = [tuple(Action.parse(cell) for cell in line if cell.strip()) for line in csv.reader(io.StringIO(text))]
        if len(rows) != schedule.num_ranks:
            raise ValueError(f"{schedule.name} has {schedule.num_ranks} ranks, the text has {len(rows)} rows")
        backwards = [sum(action.kind == BACKWARD for action in row) for row in rows]
        per_window = [
            sum(schedule.backwards_per_window(rank, stage) for stage in stages)
            for rank, stages in enumerate(schedule.placement.stages)
        ]
        windows = min(count // window for count, window in zip(backwards, per_window, strict=True))
        program = cls(schedule, windows, tuple(rows))
        return program._with_updates() if program._implies_updates else program

    @property
    def _implies_updates(self) -> bool:
        return self.schedule.flush and self.schedule.placement.directions == 1 and not self.schedule.tied

    def _with_updates(self) -> Program:
        last = {(window + 1) * self.schedule.micro_batches - 1: window for window in range(self.windows)}

        def updated(row: Row) -> Row:
            actions: list[Action] = []
            for action in row:
                actions.append(action)
                if action.kind == BACKWARD and action.index in last:
                    actions.append(Action(action.stage, UPDATE, last[action.index]))
            return tuple(actions)

        return Program(self.schedule, self.windows, tuple(updated(row) for row in self.rows))
