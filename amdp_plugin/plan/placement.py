"""Which rank holds which stage of which direction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Placement:
    """``ranks[direction][stage]`` is the rank (0 .. num_ranks-1) that runs that stage.

    Micro-batch ``m`` belongs to direction ``m % directions``. The home of a stage, where its
    optimizer state lives, is its rank in direction 0; every other rank that runs it is a guest.
    """

    ranks: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if not self.ranks or not self.ranks[0]:
            raise ValueError("a placement needs at least one direction and one stage")
        if any(len(row) != self.num_stages for row in self.ranks):
            raise ValueError(f"every direction places all {self.num_stages} stages; got {self.ranks}")
        used = {rank for row in self.ranks for rank in row}
        if used != set(range(len(used))):
            raise ValueError(f"ranks are numbered 0 to {len(used) - 1}, every one with a stage; got {self.ranks}")

    @classmethod
    def one_direction(cls, num_stages: int) -> Placement:
        """Stage ``s`` on rank ``s``: the ordinary pipeline."""
        return cls((tuple(range(num_stages)),))

    @classmethod
    def complementary(cls, num_stages: int, directions: int) -> Placement:
        """AMDP's directions (arXiv 2605.29664): pairs that run against each other, every pair shifted by four ranks.

        In pipeline ``j``, even, stage ``i`` is on rank ``(2j + i) % num_stages``; pipeline ``j + 1`` is its mirror.
        """
        rows = []
        for direction in range(directions):
            first = direction // 2 * 4
            row = [(first + stage) % num_stages for stage in range(num_stages)]
            rows.append(tuple(reversed(row) if direction % 2 else row))
        return cls(tuple(rows))

    @cached_property
    def num_stages(self) -> int:
        return len(self.ranks[0])

    @property
    def directions(self) -> int:
        return len(self.ranks)

    @cached_property
    def num_ranks(self) -> int:
        return 1 + max(max(row) for row in self.ranks)

    def rank_of(self, stage: int, micro_batch: int) -> int:
        """The rank on which ``stage`` works on ``micro_batch``."""
        return self.ranks[micro_batch % len(self.ranks)][stage]

    def is_end(self, rank: int, micro_batch: int) -> bool:
        """Whether ``rank`` runs the first or the last stage for ``micro_batch``, and so needs its data."""
        row = self.ranks[micro_batch % len(self.ranks)]
        return rank in (row[0], row[-1])

    def home(self, stage: int) -> int:
        """The rank that keeps the optimizer state of ``stage``."""
        return self.ranks[0][stage]

    @cached_property
    def holders(self) -> Sequence[tuple[int, ...]]:
        """For every stage, the ranks that hold its weights, home first."""
        return tuple(
            tuple(dict.fromkeys(row[stage] for row in self.ranks)) for stage in range(self.num_stages)
        )

    @cached_property
    def stages(self) -> Sequence[tuple[int, ...]]:
        """For every rank, the stages whose weights it holds, ascending."""
        return tuple(
            tuple(stage for stage, ranks in enumerate(self.holders) if rank in ranks)
            for rank in range(self.num_ranks)
        )
