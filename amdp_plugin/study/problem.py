"""What a study trains."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor, nn

REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True)
class Problem:
    """A model, its data and its loss, all of one seed.

    Args:
        layers: the model, one after the other; each takes and returns a tensor, or a tuple of tensors. They are cut
            into stages of as many layers each as can be.
        loss: ``loss(output, label)`` of the last layer's output, a scalar.
        micro_batches: ``(input, label)``, without end.
        validation: likewise, but not trained on.
        tokens: of one micro-batch, for the axis of the picture.
    """

    layers: Sequence[nn.Module]
    loss: Callable[[Any, Any], Tensor]
    micro_batches: Iterator[tuple[Any, Any]]
    validation: Sequence[tuple[Any, Any]]
    tokens: int

    def stages(self, number: int) -> list[nn.Module]:
        """The layers cut into ``number`` stages.

        Raises:
            ValueError: for more stages than layers.
        """
        if number > len(self.layers):
            raise ValueError(f"the model's {len(self.layers)} layers make no {number} stages: give it more layers")
        ends = [stage * len(self.layers) // number for stage in range(number + 1)]
        parts = [self.layers[start:end] for start, end in pairwise(ends)]
        return [part[0] if len(part) == 1 else nn.Sequential(*part) for part in parts]


def load(where: str) -> Callable[[int], Problem]:
    """The function that ``FILE:FUNCTION`` names; it takes a seed and returns a :class:`Problem`.

    Raises:
        ValueError: for a file or a function that is not there.
    """
    file, colon, function = where.rpartition(":")
    if not colon:
        raise ValueError(f"--model wants FILE:FUNCTION, got {where!r}")
    path = Path(file) if Path(file).is_file() else REPOSITORY / file
    if not path.is_file():
        raise ValueError(f"--model: there is no file {file}")
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)  # as if the file were run: what lies beside it can be imported
    specification = importlib.util.spec_from_file_location(path.stem, path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[path.stem] = module
    specification.loader.exec_module(module)
    found: Callable[[int], Problem] | None = getattr(module, function, None)
    if found is None:
        raise ValueError(f"--model: {file} has no function {function!r}")
    return found
