"""Random numbers of a rank that runs several directions: a stream of its own for each.

Within a direction a rank's forwards come in one order, whatever the schedule does between them. So what a
forward draws does not depend on the other directions, and a cancelled forward takes nothing from them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch


class Generators(NamedTuple):
    """All generators that layers draw from, as one.

    Args:
        get: returns their state.
        put: puts such a state back.
        seed: begins a state from a number.
    """

    get: Callable[[], Any]
    put: Callable[[Any], None]
    seed: Callable[[int], Any]


CPU = Generators(torch.get_rng_state, torch.set_rng_state, torch.manual_seed)
"""torch's own on the CPU."""


def split(directions: int, generators: Generators = CPU) -> list[Any]:
    """A state for each direction: the present one for the first, others seeded with numbers that it would draw."""
    present = generators.get()
    seeds = torch.randint(2**62, (directions,)).tolist()
    states = [present]
    for number in seeds[1:]:
        generators.seed(number)
        states.append(generators.get())
    generators.put(present)
    return states


class RandomStreams:
    """The streams of one rank. With one direction, that is the process's own state, left where it is.

    Args:
        directions: how many.
        generators: what is drawn from.
    """

    def __init__(self, directions: int, generators: Generators = CPU) -> None:
        self._directions, self._generators = directions, generators
        self._states: list[Any] = []

    @contextmanager
    def drawing(self, direction: int) -> Iterator[None]:
        """Within it, numbers are drawn from the stream of ``direction``."""
        if self._directions == 1:
            yield
            return
        outside = self._generators.get()
        self._generators.put(self.states()[direction])
        try:
            yield
        finally:
            self._states[direction] = self._generators.get()
            self._generators.put(outside)

    def states(self) -> list[Any]:
        """What every stream would draw next; at first use the process's state is split."""
        if self._directions == 1:
            return [self._generators.get()]
        if not self._states:
            self._states = split(self._directions, self._generators)
        return self._states

    def restore(self, direction: int, state: Any) -> None:
        """Let the stream of ``direction`` go on from ``state``."""
        if self._directions == 1:
            self._generators.put(state)
        else:
            self.states()[direction] = state

    def load(self, states: list[Any]) -> None:
        """Go on from :meth:`states` of another run; where that had another number of streams, from its first."""
        self._generators.put(states[0])
        self._states = list(states) if len(states) == self._directions > 1 else []
