"""The embedding that the first and the last stage of a Megatron model share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..plan.sharing import Tied
from .stage_view import bare

SHARES = "share_embeddings_and_output_weights"
"""What Megatron looks up on a model, to know whether they share it."""


def is_tied(chunk: nn.Module) -> bool:
    """Whether the model of ``chunk`` computes its logits with its embedding."""
    return bool(getattr(bare(chunk), SHARES, False))


def tied_embedding(stages: int, tied: bool) -> Tied:
    """The stages that share it, as a schedule names them."""
    return ((0, stages - 1),) if tied and stages > 1 else ()


def tied_parameters(chunk: nn.Module, stage: int, tied: Tied) -> list[nn.Parameter | None]:
    """Of the chunk of ``stage``, the parameter of every weight of ``tied``; ``None`` where it has no part."""
    model: Any = bare(chunk)
    return [model.shared_embedding_or_output_weight() if stage in stages else None for stages in tied]


@contextmanager
def apart(chunk: nn.Module) -> Iterator[None]:
    """Within it Megatron does not sum the gradients of a tied embedding over its stages: a program has done so, or has
    sent them."""
    model = bare(chunk)
    before = getattr(model, SHARES, None)
    if before is None:
        yield
        return
    setattr(model, SHARES, False)
    try:
        yield
    finally:
        setattr(model, SHARES, before)
