"""``initialize`` and ``install``: how a job gets the engine that runs schedules."""

from __future__ import annotations

import inspect
from base64 import urlsafe_b64decode
from collections.abc import Mapping
from functools import wraps
from pathlib import Path
from typing import Any

import deepspeed
import hjson  # type: ignore[import-untyped]
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.pipe.dualpipev import DualPipeVModule
from torch import nn

from ..runtime.runnable import check_homes, check_runnable
from ..settings import ScheduleSettings, check_loss_scale, refusing
from .config import check_compatible, check_places, check_topology, enabled, number_in, offloads, read_settings
from .engine import ScheduledPipelineEngine
from .meeting import needs, tied_across_stages

Engines = tuple[Any, Any, Any, Any]

_stock_initialize = deepspeed.initialize


@wraps(_stock_initialize)
def initialize(*args: Any, **kwargs: Any) -> Engines:
    """``deepspeed.initialize`` that honours the key. See :func:`amdp_plugin.initialize`."""
    arguments = inspect.signature(_stock_initialize).bind(*args, **kwargs).arguments
    config = _user_config(arguments)
    with refusing():
        check_places(config)
        settings = read_settings(config.get("pipeline"))
        if settings is not None:
            check_compatible(config, settings)
            _check_model(arguments.get("model"), config, settings)
    if settings is None:
        return _stock_initialize(*args, **kwargs)
    # deepspeed.initialize looks the engine's class up by name at each call.
    stock_engine = deepspeed.PipelineEngine
    deepspeed.PipelineEngine = ScheduledPipelineEngine
    try:
        return _stock_initialize(*args, **kwargs)
    finally:
        deepspeed.PipelineEngine = stock_engine


def install() -> None:
    """Put :func:`initialize` in the place of ``deepspeed.initialize``."""
    deepspeed.initialize = initialize


def uninstall() -> None:
    """Undo :func:`install`."""
    deepspeed.initialize = _stock_initialize


def _user_config(arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration as the user gave it: a dict, a path to (h)json, or its text in base64; empty where DeepSpeed
    has to judge it."""
    given = arguments.get("config") or arguments.get("config_params")
    given = given or getattr(arguments.get("args"), "deepspeed_config", None)
    if isinstance(given, Mapping):
        return given
    if not isinstance(given, str | Path):
        return {}
    try:
        text = Path(given).read_text() if Path(given).is_file() else urlsafe_b64decode(str(given)).decode()
        loaded = hjson.loads(text)
    except ValueError:  # no base64, no text, no (h)json: DeepSpeed's to say
        return {}
    return loaded if isinstance(loaded, Mapping) else {}


def _window(config: Mapping[str, Any], replicas: int) -> int:
    """Micro-batches of a window, which DeepSpeed derives where the configuration does not say."""
    keys = ("gradient_accumulation_steps", "train_batch_size", "train_micro_batch_size_per_gpu")
    given, whole, micro = (number_in(config, key, None) for key in keys)
    if given is None and whole and micro:
        given = whole // (micro * replicas)
    return max(1, given or 1)


def _check_model(model: Any, config: Mapping[str, Any], settings: ScheduleSettings) -> None:
    def refuse(why: str) -> None:
        raise ValueError(f"schedule {settings.name!r}: {why}")

    if not isinstance(model, PipelineModule):
        refuse(f"the model must be a deepspeed.pipe.PipelineModule, it is a {type(model).__name__}")
    if isinstance(model, DualPipeVModule):
        refuse("a DualPipeVModule brings a schedule of its own; use a PipelineModule, or leave the key out")
    grid = model.mpu()
    check_topology(config["pipeline"], grid.model_parallel_size, settings)
    fp16 = enabled(config, "fp16")
    clipping = number_in(config, "gradient_clipping", 1.0)  # DeepSpeed's default
    size = _window(config, grid.data_parallel_size)
    schedule = settings.make(grid.pipe_parallel_size, size, needs(model, clipping, fp16))
    settings.costs(schedule.num_stages)  # refuses what is wrong with them
    check_runnable(schedule)
    check_homes(schedule)
    loss = model.loss_fn
    learns = isinstance(loss, nn.Module) and any(parameter.requires_grad for parameter in loss.parameters())
    if schedule.reduces and learns:
        refuse("its last stage runs on several ranks, so loss_fn cannot have weights to train; make it the last layer")
    if schedule.extrapolates and offloads(config):
        refuse(
            '"offload_optimizer": its step on the host has not been tried with weights that are extrapolated; leave it '
            "out, or use paci"
        )
    if schedule.updates_meet:
        return
    tied = dict.fromkeys(each.key for each in tied_across_stages(model))
    if tied and not schedule.tied:
        refuse(
            f"the tied layers {', '.join(tied)} live on several stages, whose gradients must meet at every step, or "
            "travel in one direction between stages that have their latest weights; untie them (LayerSpec for "
            "TiedLayerSpec), keep them on one stage, or use paci, or a schedule whose updates meet (amdp with "
            '"decisions": "meeting", or 1f1b)'
        )
    if fp16:
        check_loss_scale(schedule, '"fp16"', '"bf16"')
