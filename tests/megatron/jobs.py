"""What these tests train: a tiny GPT of Megatron's, its data, and what a job gives Megatron's schedules."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from tests.devices import device

SEQUENCE, VOCABULARY, ROWS = 8, 32, 2
WEIGHT_DECAY = 0.1
DROPOUT: dict[str, Any] = {"hidden_dropout": 0.1}
DISTRIBUTED: dict[str, Any] = {
    "ddp": {"use_distributed_optimizer": True},
    "optimizer": {"use_distributed_optimizer": True},
}


@dataclass(frozen=True)
class Job:
    """One training job.

    Args:
        schedule: as users write it; ``None`` for stock Megatron.
        pipeline: stages.
        micro_batches: of a window.
        tensor, data: ranks of a stage.
        alike: whether all data-parallel replicas read the same micro-batches.
        lengths: of the sequences; of micro-batch ``i`` the ``i``-th, over and over.
        masked: some labels do not count, and the loss function reports the number of those that do.
        clip: limit of the norm of gradients; 0 for none.
        model: more of ``TransformerConfig``.
        optimizer: more of ``OptimizerConfig``.
        ddp: more of ``DistributedDataParallelConfig``.
    """

    schedule: Any
    pipeline: int = 2
    micro_batches: int = 4
    tensor: int = 1
    data: int = 1
    alike: bool = False
    lengths: tuple[int, ...] = (SEQUENCE,)
    masked: bool = False
    bf16: bool = False
    tied: bool = False
    clip: float = 0.0
    model: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    ddp: dict[str, Any] = field(default_factory=dict)

    @property
    def world(self) -> int:
        return self.pipeline * self.tensor * self.data

    @property
    def stock(self) -> Job:
        return replace(self, schedule=None)

    @property
    def fp16(self) -> bool:
        return bool(self.model.get("fp16"))

    @property
    def distributed_optimizer(self) -> bool:
        return bool(self.optimizer.get("use_distributed_optimizer"))

    def config(self) -> TransformerConfig:
        dtype = torch.bfloat16 if self.bf16 else torch.float32
        values: dict[str, Any] = dict(
            num_layers=self.pipeline,
            hidden_size=16,
            num_attention_heads=2,
            use_cpu_initialization=True,
            attention_dropout=0.0,
            hidden_dropout=0.0,
            pipeline_model_parallel_size=self.pipeline,
            tensor_model_parallel_size=self.tensor,
            pipeline_dtype=dtype,
            params_dtype=dtype,
            bf16=self.bf16,
            bias_dropout_fusion=False,
            bias_activation_fusion=False,
            masked_softmax_fusion=False,
            persist_layer_norm=False,
            gradient_accumulation_fusion=False,
            deallocate_pipeline_outputs=True,
        )
        return TransformerConfig(**{**values, **self.model})

    def optimizer_config(self) -> OptimizerConfig:
        values: dict[str, Any] = dict(
            optimizer="adam", lr=1e-2, adam_beta1=0.9, adam_beta2=0.95, adam_eps=1e-8, weight_decay=WEIGHT_DECAY,
            clip_grad=self.clip, bf16=self.bf16, params_dtype=torch.bfloat16 if self.bf16 else torch.float32,
        )  # fmt: skip
        return OptimizerConfig(**{**values, **self.optimizer})

    def provider(self, pre_process: bool, post_process: bool, vp_stage: Any = None, config: Any = None,
                 pg_collection: Any = None) -> GPTModel:  # fmt: skip
        """One stage, whose weights depend on the stage alone."""
        stage = parallel_state.get_pipeline_model_parallel_rank()
        torch.manual_seed(5 if self.tied and post_process else 5 + stage)
        model: GPTModel = GPTModel(
            config or self.config(),
            self.layers(),
            vocab_size=VOCABULARY,
            max_sequence_length=SEQUENCE,
            pre_process=pre_process,
            post_process=post_process,
            share_embeddings_and_output_weights=self.tied,
            pg_collection=pg_collection,
        ).to(device())
        return model

    def layers(self) -> Any:
        """The layers of one stage."""
        layer = get_gpt_layer_local_spec()
        if not self.model.get("sequence_parallel"):
            return layer
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = MarkedNorm
        specs = [layer] * (self.config().num_layers // self.pipeline)
        return TransformerBlockSubmodules(layer_specs=specs, layer_norm=MarkedNorm)

    def batches(self, first: int = 0, replica: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """``(tokens, labels)``, int64 [ROWS, length], from micro-batch ``first`` on; each depends on its number and
        the replica alone."""
        index, stride = first, 1 if self.alike else self.data
        while True:
            generator = torch.Generator().manual_seed(1000 + index * stride + (0 if self.alike else replica))
            length = self.lengths[index % len(self.lengths)]
            tokens = torch.randint(VOCABULARY, (ROWS, length + 1), generator=generator).to(device())
            yield tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
            index += 1


class MarkedNorm(nn.LayerNorm):
    """For sequence parallelism Megatron wants Apex's or TransformerEngine's norm, and of it this: a mark on weights
    whose gradients the ranks of a stage have a part of each."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps)
        for parameter in self.parameters():
            parameter.sequence_parallel = True


def run_model(model: Any, tokens: Tensor | None, labels: Tensor | None) -> Tensor:
    """One stage; ``tokens`` and ``labels`` [rows, length] are those that it needs."""
    rows, length = next((given.shape for given in (tokens, labels) if given is not None), (ROWS, SEQUENCE))
    mask = torch.triu(torch.ones(1, 1, length, length, dtype=torch.bool, device=device()), 1)
    output: Tensor = model(tokens, torch.arange(length, device=device()).expand(rows, -1), mask, labels=labels)
    return output


def forward_step(iterator: Any, model: Any) -> tuple[Tensor, Any]:
    """A job's own: only the first and the last stage read."""
    first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
    tokens, labels = next(iterator) if first or last else (None, None)
    return run_model(model, tokens, labels if last else None), report


def report(output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, [1] to backward, and what is reported of it."""
    loss = output.float().mean()
    return loss, {"lm loss": loss.detach().clone()}


def masked_forward_step(iterator: Any, model: Any) -> tuple[Tensor, Any]:
    """As :func:`forward_step`, with the sum of the losses that count, and their number."""
    first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
    tokens, labels = next(iterator) if first or last else (None, None)
    return run_model(model, tokens, labels if last else None), partial(masked_report, labels)


def masked_report(labels: Tensor, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The sum, how many there are of it, and both as what is reported."""
    counts = labels % 3 > 0
    total, number = (output.float() * counts).sum(), counts.sum()
    return total, number.int(), {"lm loss": torch.stack([total.detach(), number.float()])}
