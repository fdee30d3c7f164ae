"""What of Megatron the schedules cannot work with, refused by name before anything is made."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..plan.schedule import Schedule
from ..settings import ScheduleSettings, check_loss_scale

PLAIN = (None, False, 0, 0.0, "", "none", "no", ())
"""Values that turn an option off."""


@dataclass(frozen=True)
class Refused:
    """An option of Megatron that a schedule cannot work with.

    Args:
        names: as Megatron's arguments and configurations call it.
        why: the reason.
        instead: what to do.
        allowed: values that are no use of it.
        free_running: refused by free-running schedules alone.
        compensated: refused with error feedback and extrapolated weights alone.
    """

    names: tuple[str, ...]
    why: str
    instead: str
    allowed: Sequence[Any] = field(default=PLAIN)
    free_running: bool = False
    compensated: bool = False

    def concerns(self, schedule: Schedule) -> bool:
        """Whether ``schedule`` refuses it."""
        if self.compensated and schedule.compensation == "none" and not schedule.extrapolates:
            return False
        return not (self.free_running and schedule.flush)


OPTIONS = (
    Refused(
        ("virtual_pipeline_model_parallel_size",),
        "interleaved virtual stages are a schedule of their own",
        "leave it out, or use the stock schedule",
        allowed=(None, 1),
    ),
    Refused(("context_parallel_size",), "context parallelism has not been tried", "use 1", allowed=(None, 1)),
    Refused(
        ("num_experts", "num_moe_experts"),
        "routers balance their load over whole windows",
        "use a dense model, or the stock schedule",
    ),
    Refused(("mtp_num_layers",), "multi-token prediction shares the embedding over stages", "leave it out"),
    Refused(("fp8", "fp4"), "scales and cast copies of weights outlive an update", "use bf16"),
    Refused(
        ("enable_autocast",),
        "it keeps a cast copy of the weights in every graph, so a delayed backward would use the old weights",
        "use bf16",
    ),
    Refused(
        ("cuda_graph_impl", "enable_cuda_graph", "external_cuda_graph"),
        "a captured graph replays one window, and windows of these schedules differ",
        "leave CUDA graphs off",
    ),
    Refused(
        ("calculate_per_token_loss",),
        "the number of tokens of a window is known on the last stage alone when the others step",
        "leave it out: the loss is then averaged over micro-batches",
    ),
    Refused(
        ("overlap_param_gather", "overlap_param_gather_with_optimizer_step"),
        "weights would be gathered at the next forward, after backwards that need them",
        "leave it out; --overlap-grad-reduce may stay",
    ),
    Refused(
        ("use_torch_fsdp2", "use_megatron_fsdp"),
        "sharded weights are gathered for one forward at a time",
        "use the distributed optimizer",
    ),
    Refused(("num_distributed_optimizer_instances",), "norms are taken over one instance", "use 1", allowed=(None, 1)),
    Refused(
        ("defer_embedding_wgrad_compute", "delay_wgrad_compute"),
        "gradients of weights would come after the update of their window",
        "leave it out",
    ),
    Refused(
        ("num_microbatches_with_partial_activation_checkpoints",),
        "what is recomputed would depend on the order of stock 1F1B",
        "use --recompute-granularity for all micro-batches",
    ),
    Refused(
        ("save_wgrads_interval", "save_dgrads_interval"),
        "gradients are used and zeroed within a window",
        "leave it out",
    ),
    Refused(("iterations_to_skip",), "data is read ahead of the iteration", "leave it out", free_running=True),
    Refused(
        ("perform_rl_step",), "it changes the data of every iteration", "use the stock schedule", free_running=True
    ),
    Refused(
        ("use_precision_aware_optimizer",),
        "the optimizer keeps the master weights to itself, which error feedback and extrapolated weights start from",
        'leave it out, or use paci with "compensation": "none"',
        compensated=True,
    ),
    Refused(
        ("optimizer_cpu_offload",),
        "steps on the host have not been tried with error feedback or extrapolated weights",
        'leave it out, or use paci with "compensation": "none"',
        compensated=True,
    ),
    Refused(("overlap_moe_expert_parallel_comm",), "it is a schedule of its own", "leave it out"),
)


def check_options(settings: ScheduleSettings, schedule: Schedule, sources: Iterable[Any]) -> None:
    """Refuse options that the schedule cannot work with.

    Args:
        sources: whatever holds options: Megatron-LM's arguments, or the configurations of model, DDP and optimizer.

    Raises:
        ValueError: with the option, its value, the reason and the alternative.
    """
    sources = list(sources)
    for refused in OPTIONS:
        if not refused.concerns(schedule):
            continue
        for name in refused.names:
            for source in sources:
                value = getattr(source, name, None)
                if value not in refused.allowed and value != []:
                    refuse(settings.name, f"{_flag(name)} {value}", refused.why, refused.instead)


def check_common_decisions(settings: ScheduleSettings, schedule: Schedule, tied: bool, fp16: bool) -> None:
    """Refuse what needs one decision of all stages at every update, where they do not meet.

    Args:
        tied: whether the first and the last stage share the embedding.
        fp16: whether the loss is scaled.

    Raises:
        ValueError: with the reason and the alternative.
    """
    if schedule.updates_meet:
        return
    meets = "a schedule whose updates meet (amdp with decisions in a meeting, 1f1b, chimera)"
    if tied:
        refuse(
            settings.name,
            "tied embeddings",
            "the first and the last stage share a weight, whose gradients must meet at every step",
            f"use --untie-embeddings-and-output-weights, or {meets}",
        )
    if fp16:
        check_loss_scale(schedule, "--fp16", "--bf16")


def refuse(schedule: str, what: str, why: str, instead: str) -> None:
    """Raise the error that names them."""
    raise ValueError(f"schedule {schedule!r} cannot be used with {what}: {why}; {instead}")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
