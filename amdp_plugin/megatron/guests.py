"""Chunks that a rank holds beside its own: replicas of stages whose home is on another rank.

A guest is built by the job's own ``model_provider``. Megatron's DDP and optimizer never see it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import Float16Module
from megatron.core.utils import get_model_config
from torch import Tensor, nn

from ..plan.placement import Placement
from ..plan.schedule import Schedule
from ..runtime.replica import make_replicas
from ..runtime.tied import Replicas, make_tied
from .random_state import GENERATORS
from .stage_view import StageGroup, accepted, acting_as, bare, building_with
from .tied import tied_parameters

ModelProvider = Callable[..., nn.Module]


def build_guests(
    provider: ModelProvider | None, home: nn.Module, rank: int, placement: Placement
) -> dict[int, nn.Module]:
    """The guests that ``placement`` puts on ``rank``, by stage, with weights of no meaning yet.

    Args:
        provider: the job's: ``model_provider(pre_process, post_process)`` builds one stage; it gets ``config`` and
            ``pg_collection`` where it takes them.
        home: this rank's own chunk, as Megatron trains it.

    Raises:
        ValueError: where there is no provider.
    """
    stages = [stage for stage in placement.stages[rank] if stage != rank]
    if not stages:
        return {}
    if provider is None:
        raise ValueError(
            f"pipeline rank {rank} also holds the stages {stages}: attach() needs the model_provider(pre_process, "
            "post_process) that builds them"
        )
    state = GENERATORS.get()
    guests = {stage: _build(provider, home, stage, placement.num_stages) for stage in stages}
    GENERATORS.put(state)
    return guests


def build_replicas(
    home: nn.Module, rank: int, guests: Mapping[int, nn.Module], schedule: Schedule
) -> tuple[Replicas, dict[int, nn.Module]]:
    """The stages on ``rank`` that others hold too, and the embedding where it is tied; and what they hold."""
    modules = {stage: bare(chunk) for stage, chunk in {rank: home, **guests}.items()}
    replicas = make_replicas(schedule.placement, rank, modules, sum_dtype(home), _main_gradient)
    tied = tied_parameters(home, rank, schedule.tied)
    shared, parameters = make_tied(schedule, rank, tied, sum_dtype(home), _main_gradient)
    return {**replicas, **shared}, {**{stage: modules[stage] for stage in replicas}, **parameters}


def sum_dtype(home: nn.Module) -> torch.dtype:
    """In what Megatron's DDP sums the gradients of ``home``."""
    return next(_main_gradient(parameter).dtype for parameter in home.parameters() if parameter.requires_grad)


def _build(provider: ModelProvider, home: nn.Module, stage: int, num_stages: int) -> nn.Module:
    config = copy.copy(get_model_config(home))
    config.gradient_accumulation_fusion = False  # it adds into the buffers of DDP, which a guest has not
    groups = copy.copy(ProcessGroupCollection.use_mpu_process_groups())
    groups.pp = StageGroup(stage, num_stages)
    groups.embd = groups.pos_embd = None  # tied weights come from the home, not from a broadcast at the building
    ends = {"pre_process": stage == 0, "post_process": stage == num_stages - 1}
    with acting_as(stage), building_with(groups):
        guest: Any = provider(**ends, **accepted(provider, config=config, pg_collection=groups))
    guest.model_type = getattr(bare(home), "model_type", None)
    guest.to(next(home.parameters()).device)
    return Float16Module(config, guest) if config.fp16 or config.bf16 else guest


def _main_gradient(parameter: Any) -> Tensor:
    gradient: Tensor = parameter.main_grad
    return gradient
