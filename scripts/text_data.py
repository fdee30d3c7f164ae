"""Bytes of text as micro-batches for next-byte prediction.

A micro-batch is a pure function of what names it, so there is no hidden state to save: a run that resumes, runs another
schedule, or has more stages sees the same micro-batches in the same order.
"""

import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from seeds import derive_seed
from torch import Tensor

VOCABULARY = 256
STANDARD_LIBRARY_LIMIT = 16 * 2**20
SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})

MicroBatch = tuple[Tensor, Tensor]


def standard_library_files() -> list[Path]:
    """The Python sources of the standard library, without tests and installed packages, in sorted order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    relative = [path.relative_to(root) for path in root.rglob("*.py")]
    kept = [path for path in relative if SKIPPED_FOLDERS.isdisjoint(path.parts)]
    return [root / path for path in sorted(kept, key=lambda path: path.as_posix())]


def read_bytes(paths: Iterable[Path], limit: int | None = None) -> Tensor:
    """The files one after the other, at most ``limit`` bytes; returns (bytes,) uint8."""
    content = bytearray()
    for path in paths:
        content += path.read_bytes()
        if limit is not None and len(content) >= limit:
            break
    if not content:
        raise ValueError("the text is empty: there is nothing to train on")
    return torch.frombuffer(content[:limit], dtype=torch.uint8)


def load_text(paths: list[Path] | None) -> Tensor:
    """The user's files, or else the standard library's source; returns (bytes,) uint8."""
    if paths:
        return read_bytes(paths)
    return read_bytes(standard_library_files(), STANDARD_LIBRARY_LIMIT)


def split_text(text: Tensor, sequence_length: int, validation_fraction: float = 0.1) -> tuple[Tensor, Tensor]:
    """The first part for training, the last part for validation; each must hold one sequence and its label."""
    boundary = len(text) - int(len(text) * validation_fraction)
    training, validation = text[:boundary], text[boundary:]
    for name, part in (("training", training), ("validation", validation)):
        if len(part) <= sequence_length:
            raise ValueError(
                f"the {name} text has {len(part)} bytes, but a sequence of {sequence_length} needs at least "
                f"{sequence_length + 1}: give more --data or a shorter --sequence-length"
            )
    return training, validation


def cut(text: Tensor, starts: Tensor, sequence_length: int) -> MicroBatch:
    """Inputs and labels (the inputs one byte later) at ``starts`` (batch,); both (batch, sequence) int64."""
    windows = text[starts[:, None] + torch.arange(sequence_length + 1)].long()
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def training_micro_batches(
    text: Tensor, batch_size: int, sequence_length: int, seed: int, replica: int, first: int
) -> Iterator[MicroBatch]:
    """Micro-batches number ``first``, ``first + 1``, ... of one data-parallel replica, without end.

    Sample ``i`` is cut at a place drawn from a generator seeded by ``(seed, replica, i)`` alone: the samples of a step
    do not depend on the micro-batches that it is cut into.
    """
    generator = torch.Generator()
    sample, places = first * batch_size, len(text) - sequence_length
    while True:
        starts = []
        for number in range(sample, sample + batch_size):
            generator.manual_seed(derive_seed("data", seed, replica, number))
            starts.append(torch.randint(places, (), generator=generator))
        yield cut(text, torch.stack(starts), sequence_length)
        sample += batch_size


def validation_micro_batches(
    text: Tensor, batch_size: int, sequence_length: int, replica: int, replicas: int, count: int
) -> list[MicroBatch]:
    """``count`` micro-batches for one replica; those of all replicas are spread evenly over the text."""
    samples = replicas * count * batch_size
    starts = torch.linspace(0, len(text) - sequence_length - 1, samples, dtype=torch.float64).long()
    mine = starts.view(replicas, count, batch_size)[replica]
    return [cut(text, batch_starts, sequence_length) for batch_starts in mine]
