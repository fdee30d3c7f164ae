"""Random numbers of a rank that runs several directions: a stream of its own for each.

Within a direction a rank's forwards come in one order, whatever the schedule does between them. So what a
forward draws does not depend on the other directions, and a cancelled forward takes nothing from them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn


class Generators(NamedTuple):
    """All generators that layers draw from, the CPU's among them, as one.

    Args:
        get: returns their state.
        put: puts such a state back.
        seed: begins a state from a number.
    """

    get: Callable[[], Any]
    put: Callable[[Any], None]
    seed: Callable[[int], Any]


def together(generators: Sequence[torch.Generator]) -> Generators:
    """``generators`` as one, whose state is the tuple of theirs."""

    def get() -> tuple[torch.Tensor, ...]:
        return tuple(generator.get_state() for generator in generators)

    def put(states: tuple[torch.Tensor, ...]) -> None:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)

    def seed(number: int) -> None:
        for generator in generators:
            generator.manual_seed(number)

    return Generators(get, put, seed)


def generators_of(modules: Iterable[nn.Module]) -> Generators:
    """What the layers of ``modules`` draw from: torch's own generators, of the CPU and of each device that they are
    on."""
    places = {tensor.device for module in modules for tensor in (*module.parameters(), *module.buffers())}
    indices = sorted(place.index for place in places if place.type == "cuda")
    return together([torch.default_generator, *(torch.cuda.default_generators[index] for index in indices)])


def split(directions: int, generators: Generators) -> list[Any]:
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

    def __init__(self, directions: int, generators: Generators) -> None:
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
