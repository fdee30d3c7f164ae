"""What a job's loss function reports of micro-batches, as one message from where a direction ends to the last rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..runtime.pipeline import Pipeline

Reported = Mapping[str, Tensor]
"""What Megatron's loss functions report: a tensor of one element, or of a sum and a count, by name."""


class WindowReports:
    """What the loss function reported, gathered on the last pipeline rank, which is where Megatron reads it."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline, self._schedule = pipeline, pipeline.schedule
        self._reader = pipeline.schedule.num_ranks - 1
        self._here: dict[tuple[int, int], list[Any]] = {}

    def collect(self, window: int, direction: int) -> None:
        """Where ``direction`` ends, after its last backward of ``window``: keep what it reported, or send it as soon as
        the host has it."""
        reported = self._pipeline.losses.take(self._schedule.micro_batches_of(window, direction))
        if self._pipeline.site.rank == self._reader:
            self._here[window, direction] = reported
        else:
            assert self._pipeline.channels is not None
            send = partial(self._pipeline.channels.send_report, self._reader, direction=direction)
            self._pipeline.watch.bring(pack(reported), "reporting the losses", send)

    def of_window(self, window: int) -> list[Any]:
        """On the last rank, of all micro-batches in their order; elsewhere empty."""
        if self._pipeline.site.rank != self._reader:
            return []
        found: dict[int, Any] = {}
        pattern = self._here[window, 0][0]
        for direction, row in enumerate(self._schedule.placement.ranks):
            numbers = self._schedule.micro_batches_of(window, direction)
            if row[-1] == self._reader:
                reported = self._here.pop((window, direction))
            else:
                assert self._pipeline.channels is not None
                length = pack([pattern]).numel() * len(numbers)
                values = self._pipeline.channels.receive_report(row[-1], length, direction)
                if any(value.device.type != "cpu" for value in pattern.values()):
                    values = self._pipeline.watch.timeline.device.to_device(values)
                reported = unpack(values, pattern)
            found.update(zip(numbers, reported, strict=True))
        return [found[number] for number in sorted(found)]


def pack(reported: Sequence[Reported]) -> Tensor:
    """All values of all micro-batches: float64, one-dimensional, where they are.

    Raises:
        ValueError: where something else than tensors by name is reported, which only one direction can return.
    """
    for each in reported:
        if not isinstance(each, Mapping) or not all(isinstance(value, Tensor) for value in each.values()):
            raise ValueError(
                "a schedule of several directions returns dictionaries of tensors from the loss function, as "
                f"Megatron's do; this one returned {type(each).__name__}"
            )
    parts = [value.detach().reshape(-1) for each in reported for value in each.values()]
    return torch.cat([part.to(torch.float64) for part in parts])


def unpack(values: Tensor, pattern: Reported) -> list[Reported]:
    """What :func:`pack` packed; names, shapes, dtypes and device are those of ``pattern``."""
    sizes = [value.numel() for value in pattern.values()]
    micro_batches = values.split(sum(sizes))
    return [
        {
            name: part.to(like.device, like.dtype).view(like.shape)
            for (name, like), part in zip(pattern.items(), each.split(sizes), strict=True)
        }
        for each in micro_batches
    ]
