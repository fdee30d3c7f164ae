"""A stage, or a weight of it, on one rank, in the serial oracle."""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce

import torch
from torch import Tensor, nn

NO_VERSION = -1
"""What is computed with, where that is no version."""


class Replica:
    """A stage on one of the ranks that hold it, or a weight of it: the parameters, the latest of their versions and as
    many before it as may be in use, and the sum of their gradients."""

    def __init__(
        self, module: nn.Module, parameters: list[nn.Parameter], master_dtype: torch.dtype | None, versions: int
    ) -> None:
        self.module, self.version, self._versions = module, 0, versions
        self._parameters = parameters
        self._master_dtype = master_dtype
        self._sums: list[Tensor | None] = [None] * len(self._parameters)
        self._values = {0: [parameter.detach().clone() for parameter in self._parameters]}
        self._used = 0

    def use(self, version: int) -> None:
        """Compute with that version from now on."""
        if version != self._used:
            for parameter, value in zip(self._parameters, self._values[version], strict=True):
                # Through .data, so that graphs that saved the parameter read this version.
                parameter.data.copy_(value)
            self._used = version

    def compute_with(self, values: list[Tensor] | None) -> None:
        """Compute with ``values``, where there are some, which are no version, until the next :meth:`use`."""
        if values is not None:
            for parameter, value in zip(self._parameters, values, strict=True):
                parameter.data.copy_(value)
            self._used = NO_VERSION

    def accumulate(self, scale: float) -> None:
        """After a backward: with a master dtype, the sum is kept in it, without the loss scale."""
        if self._master_dtype is not None:
            for number, parameter in enumerate(self._parameters):
                if parameter.grad is not None:
                    self._sums[number] = sum_of((self._sums[number], parameter.grad.to(self._master_dtype) / scale))
                    parameter.grad = None

    def take_gradients(self) -> list[Tensor | None]:
        """The sums, which begin anew."""
        if self._master_dtype is not None:
            taken, self._sums = self._sums, [None] * len(self._sums)
            return taken
        found = [parameter.grad for parameter in self._parameters]
        for parameter in self._parameters:
            parameter.grad = None
        return found

    def load(self, values: list[Tensor]) -> None:
        """Take them as the next version."""
        self.version += 1
        self._values[self.version] = [
            value.to(parameter.dtype, copy=True) for parameter, value in zip(self._parameters, values, strict=True)
        ]
        self._values.pop(self.version - self._versions - 1, None)
        self.use(self.version)


def sum_of(parts: Iterable[Tensor | None]) -> Tensor | None:
    """The sum, from left to right, of those that are there."""
    there = [part for part in parts if part is not None]
    return reduce(torch.add, there) if there else None
