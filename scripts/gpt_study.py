"""What ``amdp study`` trains by default: the byte GPT of this folder on the standard library's sources.

Small, so that hours of two cores are enough; :func:`gpt2_small` is for a GPU.
"""

import torch
from gpt_model import ModelSettings, cross_entropy, gpt_layers
from text_data import VOCABULARY, load_text, split_text, training_micro_batches
from torch import nn

from amdp_plugin.study.problem import Problem

VALIDATION_MICRO_BATCHES = 16


def problem(seed: int) -> Problem:
    """8 blocks of 96, sequences of 64, micro-batches of 2: 128 tokens."""
    return build(seed, layers=8, hidden=96, heads=4, sequence_length=64, rows=2, validation_rows=16)


def quick_start(seed: int) -> Problem:
    """The model and the micro-batches of the quick start: 8 blocks of 192, 512 tokens."""
    return build(seed, layers=8, hidden=192, heads=6, sequence_length=128, rows=4, validation_rows=16)


def gpt2_small(seed: int) -> Problem:
    """12 blocks of 768, sequences of 1024, micro-batches of 4: 4096 tokens. With ``--device cuda``."""
    return build(seed, layers=12, hidden=768, heads=12, sequence_length=1024, rows=4, validation_rows=4)


def build(
    seed: int, layers: int, hidden: int, heads: int, sequence_length: int, rows: int, validation_rows: int
) -> Problem:
    """The embedding goes with the first block, the output with the last, so that stages of whole blocks are alike."""
    settings = ModelSettings(VOCABULARY, layers, hidden, heads, sequence_length, dropout=0.0, seed=seed)
    first, *blocks, last = (layer.build() for layer in gpt_layers(settings))
    blocks[0], blocks[-1] = nn.Sequential(first, blocks[0]), nn.Sequential(blocks[-1], last)
    training, validation = split_text(load_text(None), sequence_length)
    held_out = training_micro_batches(validation, validation_rows, sequence_length, 0, 0, 0)
    with torch.random.fork_rng(devices=[]):
        return Problem(
            blocks, cross_entropy, training_micro_batches(training, rows, sequence_length, seed, 0, 0),
            [next(held_out) for _ in range(VALIDATION_MICRO_BATCHES)], rows * sequence_length,
        )  # fmt: skip
