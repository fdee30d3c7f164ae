"""Stages that an engine holds beside its own: replicas of stages whose home is on another rank.

A guest is built from the ``PipelineModule``'s layer specs like the home. DeepSpeed's optimizer never sees it.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.keep_in_fp32 import keep_in_fp32_pattern
from torch import Tensor, nn

from ..plan.schedule import Schedule
from ..runtime.replica import GradientOf, gradient_of, make_replicas
from ..runtime.stage import Stage
from ..runtime.tied import Replicas, make_tied
from .meeting import tied_parameters
from .random_state import GENERATORS


def build_replicas(engine: Any, schedule: Schedule) -> tuple[dict[int, PipelineModule], Replicas, dict[int, nn.Module]]:
    """The guests that ``schedule`` puts on the engine's rank, by stage; its replicas (its home stage, if others hold it
    too, the guests, and the weights that stages share), and what they hold."""
    home, placement = engine.stage_id, schedule.placement
    guests = {stage: build_guest(engine, stage) for stage in placement.stages[home] if stage != home}
    modules = {stage: layers(module) for stage, module in {home: engine.module, **guests}.items()}
    gradient = home_gradient(engine.optimizer)
    dtype = sum_dtype(engine.optimizer)
    replicas = make_replicas(placement, home, modules, dtype, gradient)
    held: dict[int, nn.Module] = {stage: modules[stage] for stage in replicas}
    tied = tied_parameters(engine.module) if schedule.tied else []
    shared, parameters = make_tied(schedule, home, tied, dtype, gradient)
    return guests, {**replicas, **shared}, {**held, **parameters}


def layers(module: PipelineModule) -> nn.ModuleList:
    """The layers of a stage, without what else the module has, such as its loss; in one order on all ranks."""
    return nn.ModuleList([module.tied_modules, *(module._modules[name] for name in module.fwd_map)])


def build_guest(engine: Any, stage: int) -> PipelineModule:
    """``stage`` of the engine's model, on its device and in its dtype, with weights of no meaning yet."""
    home: PipelineModule = engine.module
    guest = copy.copy(home)
    guest._modules = {}
    for name, module in home._modules.items():
        if name not in home.fwd_map:
            object.__setattr__(guest, name, module)  # shared, such as a loss, and no part of the guest
    guest._forward_pre_hooks, guest._forward_hooks = copy.copy(home._forward_pre_hooks), copy.copy(home._forward_hooks)
    guest.stage_id, guest.tied_comms = stage, {}
    guest.forward_funcs, guest.fwd_map = [], {}
    guest.__dict__.pop("tied_modules")
    guest.tied_modules, guest.tied_weight_attrs = nn.ModuleDict(), {}
    guest.is_checkpointable_results, guest.is_checkpointable_results_interval = [], None
    guest._set_bounds(home.parts[stage], home.parts[stage + 1])
    state = GENERATORS.get()
    guest._build()
    GENERATORS.put(state)
    guest.to(engine.device)
    _cast(engine, guest)
    if guest.activation_checkpoint_interval > 0:
        guest._precompute_checkpointable_values()
    return guest


def guest_stage(engine: Any, guest: PipelineModule) -> Stage:
    """``guest`` as it is run: as DeepSpeed runs the home, but for its optimizer's part in a backward."""
    loss = None
    if guest.stage_id == guest.num_stages - 1:
        loss = guest.loss_fn or (lambda output, label: output)

    def scaled(loss: Tensor) -> Tensor:
        loss = loss / engine.gradient_accumulation_steps()
        return engine.optimizer.scale_if_loss(loss) if isinstance(engine.optimizer, ZeROOptimizer) else loss

    return Stage(lambda inputs: guest(_cloned(inputs)), loss, scaled)


def to_device(value: Any, engine: Any, differentiable: bool = False) -> Any:
    """A micro-batch's input or label as DeepSpeed loads it: a tensor or a tuple of tensors, on the engine's device.

    Args:
        differentiable: whether floating-point tensors require gradients (for reentrant recomputation).
    """
    if isinstance(value, Tensor):
        tensor = value.detach().clone().to(engine.device)
        return tensor.requires_grad_(differentiable and tensor.is_floating_point())
    if isinstance(value, list | tuple):
        return tuple(to_device(part, engine, differentiable) for part in value)
    return value


def sum_dtype(optimizer: Any) -> torch.dtype | None:
    """The dtype in which ``optimizer`` sums gradients, where that is not the parameters'."""
    if isinstance(optimizer, BF16_Optimizer):
        return optimizer.grad_acc_dtype
    if getattr(optimizer, "use_grad_accum_attribute", False):
        return optimizer.gradient_accumulation_dtype
    return None


def home_gradient(optimizer: Any) -> GradientOf:
    """Where ``optimizer`` sums the gradient of a parameter."""
    if isinstance(optimizer, BF16_Optimizer):
        return _high_precision_gradient(optimizer)
    if getattr(optimizer, "use_grad_accum_attribute", False):
        return lambda parameter: _accumulated(optimizer, parameter)
    return gradient_of


def _high_precision_gradient(optimizer: BF16_Optimizer) -> GradientOf:
    places = {
        parameter: (group, number)
        for group, parameters in enumerate(optimizer.bf16_groups)
        for number, parameter in enumerate(parameters)
    }

    def gradient(parameter: Any) -> Tensor:
        group, number = places[parameter]
        own: Tensor = optimizer.fp32_groups_gradients[group][number]
        optimizer.fp32_groups_has_gradients[group][number] = True
        parameter._hp_grad = own
        return own

    return gradient


def _accumulated(optimizer: Any, parameter: Any) -> Tensor:
    if parameter.grad_accum is None:
        parameter.grad_accum = torch.zeros_like(parameter, dtype=optimizer.gradient_accumulation_dtype)
    accumulated: Tensor = parameter.grad_accum
    return accumulated


def _cast(engine: Any, guest: PipelineModule) -> None:
    """To the dtypes of the engine, which casts its own module alone."""
    param_dtype, buffer_dtype = engine._mixed_precision_dtypes()
    pattern = keep_in_fp32_pattern(guest, engine._config.keep_in_fp32_modules, param_dtype)
    home, engine.module = engine.module, guest
    try:
        engine._cast_module_mixed_precision(param_dtype, buffer_dtype, False, pattern)
    finally:
        engine.module = home


def _cloned(inputs: Any) -> Any:
    """Layers may change their input in place, which a leaf does not allow."""
    return tuple(tensor.clone() for tensor in inputs) if isinstance(inputs, tuple) else inputs.clone()
