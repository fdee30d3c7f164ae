"""Text as Megatron's indexed datasets, and micro-batches of them for next-byte prediction.

Micro-batch ``n`` of a replica depends on its number and the seed alone, so that nothing of the data has to be in a
checkpoint, and all schedules see the same micro-batches in the same order.
"""

import hashlib
import os
import tempfile
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder, get_bin_path, get_idx_path
from megatron.core.tokenizers.text.libraries import NullTokenizer
from text_data import VOCABULARY, load_text, split_text
from torch import Tensor
from torch.utils.data import DataLoader

TRAINING, VALIDATION = "training", "validation"


def cache_folder() -> Path:
    """Where indexed datasets are kept, unless the user says otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "amdp_plugin" / "text"


def build_datasets(files: list[Path] | None, cache: Path, sequence_length: int, seed: int) -> tuple[GPTDataset, ...]:
    """The training and the validation set, on every rank; rank 0 alone reads the text, and writes what is not there.

    Args:
        files: the text, or ``None`` for the standard library's.
        cache: a folder that all ranks see.
    """
    found = [write_indexed(files, cache, sequence_length) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found)
    (folder,) = found
    blends = [([str(folder / name)], None) for name in (TRAINING, VALIDATION)]
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=sequence_length,
        blend_per_split=[*blends, None],
        path_to_cache=str(folder / "indices"),
        tokenizer=NullTokenizer(VOCABULARY),  # bytes are their own identifiers
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,  # the layers know that they are causal
    )
    # One pass over each set, whatever the length of the run: its order then depends on the seed alone.
    training, validation, _ = BlendedMegatronDatasetBuilder(GPTDataset, [None] * 3, lambda: True, config).build()
    return training, validation


def write_indexed(files: list[Path] | None, cache: Path, sequence_length: int) -> Path:
    """Write both parts of the text as indexed datasets of one document each, where that was not done before.

    Returns:
        Their folder, which is named by the content and complete as soon as it is there.
    """
    text = load_text(files)
    training, validation = split_text(text, sequence_length)
    folder = cache / hashlib.blake2b(text.numpy(), digest_size=16).hexdigest()
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as unfinished:
            for name, part in ((TRAINING, training), (VALIDATION, validation)):
                write_document(Path(unfinished) / "text" / name, part)
            try:
                (Path(unfinished) / "text").rename(folder)
            except OSError:
                if not folder.exists():  # else another job was faster
                    raise
    return folder


def write_document(prefix: Path, tokens: Tensor) -> None:
    """An indexed dataset that holds one document, ``tokens`` (bytes,) uint8."""
    prefix.parent.mkdir(exist_ok=True)
    builder = IndexedDatasetBuilder(get_bin_path(str(prefix)), dtype=tokens.numpy().dtype.type)
    builder.add_item(tokens)
    builder.end_document()
    builder.finalize(get_idx_path(str(prefix)))


def sample_numbers(samples: int, batch_size: int, replica: int, replicas: int, first: int) -> Iterator[list[int]]:
    """Which samples the micro-batches ``first``, ``first + 1``, ... of one replica hold, without end.

    All replicas together take the samples in their order, and begin again after the last. So the samples of a step do
    not depend on the micro-batches that it is cut into.
    """
    for number in count(first):
        begin = (number * replicas + replica) * batch_size
        yield [sample % samples for sample in range(begin, begin + batch_size)]


def training_micro_batches(
    dataset: GPTDataset, batch_size: int, replica: int, replicas: int, first: int
) -> Iterator[dict[str, Tensor]]:
    """Micro-batches as ``GPTDataset`` gives them: ``tokens``, ``labels``, ``position_ids`` (batch, sequence) int64."""
    return load(dataset, sample_numbers(len(dataset), batch_size, replica, replicas, first))


def validation_micro_batches(
    dataset: GPTDataset, batch_size: int, replica: int, replicas: int, number: int
) -> list[dict[str, Tensor]]:
    """The first ``number`` micro-batches of one replica."""
    return list(load(dataset, islice(sample_numbers(len(dataset), batch_size, replica, replicas, 0), number)))


def load(dataset: GPTDataset, batches: Iterator[list[int]]) -> Iterator[dict[str, Tensor]]:
    """The samples that ``batches`` names."""
    # With a generator of its own: else it draws a number from that of the model's layers.
    return iter(DataLoader(dataset, batch_sampler=batches, generator=torch.Generator()))
