"""A small GPT as a list of pipeline layers.

Every layer takes one tensor and returns one tensor, which is what a DeepSpeed ``PipelineModule`` sends from stage to
stage. A layer draws its initial weights from a generator of its own, seeded by ``(seed, position in the model)``, so
the weights do not depend on how many stages there are, nor on which process builds the layer, nor when.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from deepspeed.pipe import LayerSpec
from seeds import derive_seed
from torch import Tensor, nn
from torch.nn import functional

INITIAL_WEIGHT_DEVIATION = 0.02


@dataclass(frozen=True)
class ModelSettings:
    """What the model looks like; equal settings give equal initial weights."""

    vocabulary: int
    layers: int
    hidden: int
    heads: int
    sequence_length: int
    dropout: float
    seed: int

    def __post_init__(self) -> None:
        for name in ("vocabulary", "layers", "hidden", "heads", "sequence_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.hidden % self.heads:
            raise ValueError(f"heads must divide hidden: {self.hidden} is not a multiple of {self.heads}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")


@contextmanager
def layer_random_state(settings: ModelSettings, position: int) -> Iterator[None]:
    """Draw from a generator seeded for one layer, and leave the process's random state as it was."""
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: that would also reseed the accelerators, whose state fork_rng([]) does not restore.
        torch.default_generator.manual_seed(derive_seed("weights", settings.seed, position))
        yield


def initialize_linear(linear: nn.Linear, deviation: float = INITIAL_WEIGHT_DEVIATION) -> None:
    """Normal weights, zero bias, as in GPT-2."""
    nn.init.normal_(linear.weight, std=deviation)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


class TokenAndPositionEmbedding(nn.Module):
    """Token identifiers to vectors: the first layer of the pipeline."""

    def __init__(self, settings: ModelSettings, position: int) -> None:
        super().__init__()
        with layer_random_state(settings, position):
            self.tokens = nn.Embedding(settings.vocabulary, settings.hidden)
            self.positions = nn.Embedding(settings.sequence_length, settings.hidden)
            self.dropout = nn.Dropout(settings.dropout)
            nn.init.normal_(self.tokens.weight, std=INITIAL_WEIGHT_DEVIATION)
            nn.init.normal_(self.positions.weight, std=INITIAL_WEIGHT_DEVIATION)

    def forward(self, token_ids: Tensor) -> Tensor:
        """(batch, sequence) int64 -> (batch, sequence, hidden)."""
        positions = self.positions.weight[: token_ids.size(1)]
        embedded: Tensor = self.dropout(self.tokens(token_ids) + positions)
        return embedded


class TransformerBlock(nn.Module):
    """Causal self-attention and a feed-forward network, each behind a LayerNorm and around a residual."""

    def __init__(self, settings: ModelSettings, position: int) -> None:
        super().__init__()
        hidden = settings.hidden
        self.heads = settings.heads
        self.attention_dropout = settings.dropout
        with layer_random_state(settings, position):
            self.attention_norm = nn.LayerNorm(hidden)
            self.query_key_value = nn.Linear(hidden, 3 * hidden)
            self.attention_output = nn.Linear(hidden, hidden)
            self.feed_forward_norm = nn.LayerNorm(hidden)
            self.feed_forward_in = nn.Linear(hidden, 4 * hidden)
            self.feed_forward_out = nn.Linear(4 * hidden, hidden)
            self.dropout = nn.Dropout(settings.dropout)
            # GPT-2 scales what is added to the residual stream, so that its size does not grow with depth.
            residual_deviation = INITIAL_WEIGHT_DEVIATION / math.sqrt(2 * settings.layers)
            initialize_linear(self.query_key_value)
            initialize_linear(self.attention_output, residual_deviation)
            initialize_linear(self.feed_forward_in)
            initialize_linear(self.feed_forward_out, residual_deviation)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, sequence, hidden) -> (batch, sequence, hidden)."""
        attended: Tensor = self.dropout(self.attend(self.attention_norm(x)))
        x = x + attended
        inner = functional.gelu(self.feed_forward_in(self.feed_forward_norm(x)), approximate="tanh")
        transformed: Tensor = self.dropout(self.feed_forward_out(inner))
        return x + transformed

    def attend(self, x: Tensor) -> Tensor:
        """Multi-head causal attention, (batch, sequence, hidden) -> (batch, sequence, hidden)."""
        batch, sequence, hidden = x.shape
        # (batch, sequence, 3 * hidden) -> three of (batch, heads, sequence, hidden / heads)
        split = self.query_key_value(x).view(batch, sequence, 3, self.heads, hidden // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4).unbind(0)
        dropout = self.attention_dropout if self.training else 0.0
        attended = functional.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        output: Tensor = self.attention_output(attended.transpose(1, 2).reshape(batch, sequence, hidden))
        return output


class NormAndHead(nn.Module):
    """Final LayerNorm and projection to the vocabulary, which shares no weight with the embedding: the last layer."""

    def __init__(self, settings: ModelSettings, position: int) -> None:
        super().__init__()
        with layer_random_state(settings, position):
            self.norm = nn.LayerNorm(settings.hidden)
            self.head = nn.Linear(settings.hidden, settings.vocabulary, bias=False)
            initialize_linear(self.head)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, sequence, hidden) -> logits (batch, sequence, vocabulary)."""
        logits: Tensor = self.head(self.norm(x))
        return logits


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean negative log likelihood in nats per token, computed in float32 whatever the logits are.

    logits: (batch, sequence, vocabulary); labels: (batch, sequence) int64; returns a scalar.
    """
    return functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())


def gpt_layers(settings: ModelSettings) -> list[LayerSpec]:
    """Embedding, ``settings.layers`` blocks, head, in order; each is built only by the process that needs it."""
    layer_types = [TokenAndPositionEmbedding, *[TransformerBlock] * settings.layers, NormAndHead]
    return [LayerSpec(layer_type, settings, position) for position, layer_type in enumerate(layer_types)]
