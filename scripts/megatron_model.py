"""A GPT of Megatron's, stage by stage, with its optimizer; and what its schedules call for each micro-batch."""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from text_data import VOCABULARY
from torch import Tensor

WARMUP_BEGINS_AT = 0.1
"""The first step's learning rate, in parts of the full one."""
RECOMPUTE = {
    "none": {},
    "selective": {"recompute_granularity": "selective"},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


@dataclass
class Trained:
    """What training changes."""

    model: DistributedDataParallel
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler


def make_config(arguments: argparse.Namespace) -> TransformerConfig:
    """The layers."""
    dtype = torch.bfloat16 if arguments.bf16 else torch.float32
    return TransformerConfig(
        num_layers=arguments.layers,
        hidden_size=arguments.hidden,
        num_attention_heads=arguments.heads,
        hidden_dropout=arguments.dropout,
        attention_dropout=arguments.dropout,
        tensor_model_parallel_size=arguments.tensor_parallel,
        pipeline_model_parallel_size=arguments.pipeline_parallel,
        bf16=arguments.bf16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        use_cpu_initialization=not torch.cuda.is_available(),
        **RECOMPUTE[arguments.recompute],
    )


def provide_stage(
    arguments: argparse.Namespace,
    config: TransformerConfig,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    pg_collection: Any = None,
) -> GPTModel:
    """One stage of the model: Megatron's model provider, of which a rank may hold several under some schedules."""
    if gpt_layer_specs.HAVE_TE:
        layer = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec()
    else:
        layer = gpt_layer_specs.get_gpt_layer_local_spec()
    return GPTModel(
        config,
        layer,
        vocab_size=VOCABULARY,
        max_sequence_length=arguments.sequence_length,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=arguments.tie_embeddings,
        vp_stage=vp_stage,
        pg_collection=pg_collection,
    )


def make_trained(arguments: argparse.Namespace, config: TransformerConfig, device: torch.device) -> Trained:
    """This rank's own stage under Megatron's data parallelism, its optimizer and its learning rate."""
    first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
    stage: torch.nn.Module = provide_stage(arguments, config, first, last).to(device)
    if arguments.bf16:
        stage = Float16Module(config, stage)
    replication = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=arguments.distributed_optimizer
    )
    model = DistributedDataParallel(config, replication, stage)
    optimizer = make_optimizer(arguments, config, model)
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    return Trained(model, optimizer, make_scheduler(arguments, optimizer))


def make_optimizer(
    arguments: argparse.Namespace, config: TransformerConfig, model: DistributedDataParallel
) -> MegatronOptimizer:
    """AdamW."""
    return get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=arguments.learning_rate,
            min_lr=0.0,
            adam_beta1=0.9,
            adam_beta2=0.95,
            weight_decay=arguments.weight_decay,
            clip_grad=arguments.clip_grad,
            bf16=arguments.bf16,
            params_dtype=config.params_dtype,
            use_distributed_optimizer=arguments.distributed_optimizer,
        ),
        [model],
    )


def make_scheduler(arguments: argparse.Namespace, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """A learning rate that warms up and stays; counted in optimizer steps."""
    return OptimizerParamScheduler(
        optimizer,
        init_lr=WARMUP_BEGINS_AT * arguments.learning_rate,
        max_lr=arguments.learning_rate,
        min_lr=0.0,
        lr_warmup_steps=arguments.warmup_steps,
        lr_decay_steps=arguments.warmup_steps + 1,
        lr_decay_style="constant",
        start_wd=arguments.weight_decay,
        end_wd=arguments.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )


def forward_step(
    device: torch.device, batches: Iterator[dict[str, Tensor]], model: torch.nn.Module
) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """Run one micro-batch through one stage; what Megatron's schedules call. A stage takes of it what it needs."""
    batch = next(batches)
    tokens, positions, labels = (batch[name].to(device) for name in ("tokens", "position_ids", "labels"))
    return model(tokens, positions, None, labels=labels), report_loss


def report_loss(losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Of one micro-batch, from ``losses`` (batch, sequence): nats per byte to train on, and to tell."""
    loss = losses.float().mean()
    return loss, {"loss": loss.detach().clone()}  # Megatron divides the first in place
