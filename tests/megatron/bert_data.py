"""A small masked-word-piece corpus as Megatron-LM's ``pretrain_bert.py`` reads it: real English, no download.

One document a module of the standard library (its docstring), one sequence a sentence, which is what BERT's dataset
cuts its pairs from. Words that are not in the vocabulary are spelled: a first piece of one character, then ``##`` ones.
"""

from __future__ import annotations

import ast
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder, get_bin_path, get_idx_path

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

Document = list[list[str]]  # the words of each sentence


def standard_library_documents() -> list[Document]:
    """The docstrings of the standard library's modules, by name; those of one sentence are left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = (ast.get_docstring(ast.parse(path.read_bytes())) or "" for path in sorted(root.glob("*.py")))
    documents = [split_into_sentences(text) for text in texts]
    return [document for document in documents if len(document) >= 2]


def split_into_sentences(text: str) -> Document:
    """Lower-case words, digits and signs of each sentence; sentences without any are left out."""
    sentences = (re.findall(r"[a-z]+|[0-9]|[!-/:-@\[-`{-~]", s.lower()) for s in re.split(r"(?<=[.!?:])\s+", text))
    return [words for words in sentences if words]


def make_vocabulary(documents: Iterable[Document], size: int) -> list[str]:
    """``size`` word pieces: the special ones, every character (first and later in a word), and the commonest words."""
    counts = Counter(word for document in documents for sentence in document for word in sentence)
    characters = sorted({character for word in counts for character in word})
    needed = [*SPECIAL, *characters, *(f"##{character}" for character in characters)]
    if size < len(needed):
        raise ValueError(f"a vocabulary of {size} cannot spell this text: it needs {len(needed)} pieces or more")
    words = [word for word, _ in counts.most_common() if len(word) > 1]
    return (needed + words)[:size]


def spell(word: str, vocabulary: dict[str, int]) -> list[int]:
    """The pieces of one word: itself, or its characters."""
    if word in vocabulary:
        return [vocabulary[word]]
    return [vocabulary[word[0]], *(vocabulary[f"##{character}"] for character in word[1:])]


def write_bert_data(folder: Path, vocabulary_size: int = 1000) -> tuple[Path, Path]:
    """Write the corpus below ``folder``; return what ``--data-path`` and ``--vocab-file`` take."""
    documents = standard_library_documents()
    pieces = make_vocabulary(documents, vocabulary_size)
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    prefix, vocabulary_file = folder / "sentences", folder / "vocabulary.txt"
    vocabulary_file.write_text("\n".join(pieces) + "\n")
    builder = IndexedDatasetBuilder(get_bin_path(str(prefix)))
    for document in documents:
        for sentence in document:
            builder.add_item(torch.tensor([piece for word in sentence for piece in spell(word, vocabulary)]))
        builder.end_document()
    builder.finalize(get_idx_path(str(prefix)))
    return prefix, vocabulary_file
