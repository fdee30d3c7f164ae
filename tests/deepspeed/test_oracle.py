"""DeepSpeed engines compute, bit for bit, what the serial oracle computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from deepspeed.ops.adam.fused_adam import FusedAdamBuilder
from deepspeed.runtime.lr_schedules import WarmupDecayLR
from deepspeed.runtime.zero.utils import get_norm_dtype
from torch import Tensor, nn

from tests import devices
from tests.runtime.models import OPTIMIZERS, ROWS
from tests.runtime.pipelines import AMDP_SHAPES

from .jobs import Job, assert_equals_oracle, assert_same, oracle, run

REENTRANT = {"pipeline": {"activation_checkpoint_interval": 1}}
NON_REENTRANT = {"pipeline": {"activation_checkpoint_interval": 1, "use_reentrant": False}}
BF16 = {
    "bf16": {"enabled": True},
    "data_types": {"grad_accum_dtype": "fp32"},
    "zero_optimization": {"stage": 1},
}
WARMUP = {
    "total_num_steps": 8, "warmup_min_lr": 0.001, "warmup_max_lr": 0.1, "warmup_num_steps": 4, "warmup_type": "linear"
}  # fmt: skip

SHAPES = [(2, 1), (2, 2), (2, 4), (3, 1), (3, 4), (4, 2), (4, 4), (4, 6)]


@pytest.mark.parametrize(("stages", "size"), SHAPES)
def test_paci(stages: int, size: int) -> None:
    """Windows below, at and above the number of stages, with dropout."""
    check(Job("paci", stages, size, optimizer={2: "sgd", 3: "adamw", 4: "fused"}[stages]))


@pytest.mark.parametrize(("stages", "size"), [(2, 2), (3, 4), (4, 2)])
def test_flushed(stages: int, size: int) -> None:
    check(Job("1f1b", stages, size, optimizer="adamw"))


def test_a_flush_every_few_windows() -> None:
    check(Job({"name": "paci", "flush_every": 2}, 3, 2))


@pytest.mark.parametrize(
    ("kind", "modelled_by", "config"),
    [
        ("masked", "masked", {}),
        ("tuples", "tuples", {}),
        ("recomputed", "recomputed", {}),
        ("plain", "recomputed", REENTRANT),
        ("plain", "recomputed", NON_REENTRANT),
        ("masked", "masked, recomputed", REENTRANT),
        ("masked", "masked, recomputed", NON_REENTRANT),
    ],
)
def test_tuples_and_recomputation(kind: str, modelled_by: str, config: dict[str, Any]) -> None:
    """DeepSpeed's recomputation is that of a module that recomputes itself: a forward with the new weights."""
    job = Job("paci", 3, 2, kind=kind, config=config)
    check(job, replace(job, kind=modelled_by))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["paci", "1f1b"])
def test_optimizer_of_the_configuration(name: str, fused: bool) -> None:
    parameters = {"lr": 0.02, "torch_adam": True, "foreach": not fused, "fused": fused}
    job = Job(name, 3, 2, optimizer=None, config={"optimizer": {"type": "AdamW", "params": parameters}})
    check(job, make_optimizer=OPTIMIZERS["fused" if fused else "adamw"])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_several_layers_on_a_stage(optimizer: str) -> None:
    check(Job("paci", 2, 3, layers_per_stage=3, optimizer=optimizer))


def test_learning_rate_scheduler() -> None:
    """Every stage goes through the learning rates by its own updates."""

    def scheduled(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        optimizer = OPTIMIZERS["sgd"](parameters)
        scheduler = WarmupDecayLR(optimizer, **WARMUP)
        optimizer.register_step_post_hook(lambda *_: scheduler.step())
        return optimizer

    check(
        Job("paci", 3, 2, config={"scheduler": {"type": "WarmupDecayLR", "params": WARMUP}}), make_optimizer=scheduled
    )


def test_clipping_by_the_norm_of_the_stage() -> None:
    def clip_alone(parameters: list[nn.Parameter]) -> None:
        norm = torch.stack([parameter.grad.norm() for parameter in parameters]).pow(2.0).sum().pow(0.5)
        assert norm > 0.05, "the case must clip"
        for parameter in parameters:
            parameter.grad.mul_(devices.place(torch.tensor([0.05])) / (norm + 1e-6))

    job = Job({"name": "paci", "decisions": "local"}, 3, 2, config={"gradient_clipping": 0.05})
    check(job, before_step=clip_alone)


@pytest.mark.parametrize(("name", "optimizer"), [("paci", "sgd"), ("paci", "fused"), ("1f1b", "adamw")])
def test_bf16_with_sums_and_masters_in_fp32(name: str, optimizer: str) -> None:
    config = {**BF16, "communication_data_type": "fp32"}
    check(Job(name, 3, 2, optimizer=optimizer, config=config, dtype=torch.bfloat16), master_dtype=torch.float32)


def test_bf16_reduces_in_bf16_unless_told() -> None:
    """DeepSpeed rounds the sum to bf16 where it would reduce it over replicas, though there are none."""

    def round_gradients(parameters: list[nn.Parameter]) -> None:
        for parameter in parameters:
            parameter.grad.copy_(parameter.grad.to(torch.bfloat16))

    job = Job("paci", 3, 2, config=BF16, dtype=torch.bfloat16)
    check(job, master_dtype=torch.float32, before_step=round_gradients)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_zero_1(optimizer: str) -> None:
    check(Job("paci", 3, 2, optimizer=optimizer, config={"zero_optimization": {"stage": 1}}))


@pytest.mark.parametrize(
    ("stages", "size", "options"),
    [
        *AMDP_SHAPES,
        (6, 6, {"directions": 1}),
        (6, 6, {"directions": 2}),
        (8, 8, {"directions": 1}),
        (4, 8, {"decisions": "meeting"}),
        (8, 8, {"decisions": "meeting"}),
        (4, 4, {"preload": 0}),
    ],
)
def test_amdp(stages: int, size: int, options: dict[str, Any]) -> None:
    """Home and guests of every stage. The sum over replicas is taken in one order, so this is bit for bit, too."""
    optimizer = {2: "sgd", 4: "adamw", 6: "sgd", 8: "fused"}[stages]
    check(Job({"name": "amdp", **options}, stages, size, optimizer=optimizer))


def test_amdp_with_a_window_that_deepspeed_derives() -> None:
    config = {"gradient_accumulation_steps": None, "train_batch_size": 4 * ROWS}
    check(Job("amdp", 4, 4, config=config))


@pytest.mark.parametrize("kind", ["tuples", "recomputed", "counting", "masked"])
def test_amdp_on_layers_of_all_kinds(kind: str) -> None:
    check(Job("amdp", 4, 4, kind=kind, layers_per_stage=2))


@pytest.mark.parametrize("config", [REENTRANT, NON_REENTRANT])
def test_amdp_with_recomputation_by_deepspeed(config: dict[str, Any]) -> None:
    job = Job("amdp", 4, 4, config=config)
    check(job, replace(job, kind="recomputed"))


def test_amdp_in_bf16_with_sums_and_masters_in_fp32() -> None:
    config = {**BF16, "communication_data_type": "fp32"}
    check(Job("amdp", 4, 4, optimizer="adamw", config=config, dtype=torch.bfloat16), master_dtype=torch.float32)


MASTERS = {
    "bf16": {"config": {**BF16, "communication_data_type": "fp32"}, "dtype": torch.bfloat16},
    "ZeRO-1": {"config": {"zero_optimization": {"stage": 1}}},
}
"""Jobs whose optimizer steps master copies, which are the plain iterate."""

LIMIT = 0.05
"""Of norms: every case here clips."""


def squares(gradients: list[Tensor | None]) -> float:
    """As DeepSpeed adds up a stage's, in fp32."""
    norms = [gradient.float().norm() for gradient in gradients if gradient is not None]
    return float(torch.stack(norms).pow(2.0).sum())


def partitioned_squares(gradients: list[Tensor | None]) -> float:
    """As ZeRO-1 does, which adds up in a dtype of its own, and takes the root of its own sum first."""
    norms = [torch.linalg.vector_norm(gradient.to(get_norm_dtype())) for gradient in gradients if gradient is not None]
    norm = torch.stack(norms).pow(2.0).sum().float().pow(0.5)
    return float(torch.linalg.vector_norm(torch.stack([norm])).square())


def clip(parameters: list[nn.Parameter], total: float) -> None:
    """As DeepSpeed does in fp32."""
    norm = devices.place(torch.tensor(total)).pow(0.5)
    assert norm > LIMIT, "the case must clip"
    for parameter in parameters:
        parameter.grad.mul_(devices.place(torch.tensor([LIMIT])) / (norm + 1e-6))


def clip_partitions(parameters: list[nn.Parameter], total: float) -> None:
    """As ZeRO-1 does."""
    norm = devices.place(torch.tensor(total)).sqrt()
    assert norm > LIMIT, "the case must clip"
    for parameter in parameters:
        parameter.grad.mul_(1.0 / torch.clamp((norm + 1e-6) / LIMIT, min=1.0))


def clip_masters(parameters: list[nn.Parameter], total: float) -> None:
    """As DeepSpeed does in bf16."""
    norm = devices.place(torch.tensor(total)).pow(0.5)
    assert norm > LIMIT, "the case must clip"
    for parameter in parameters:
        parameter.grad.mul_(LIMIT / (norm + 1e-6))


@pytest.mark.parametrize(
    ("name", "stages", "size"),
    [("paci", 2, 1), ("paci", 3, 2), ("paci", 4, 4), ("paci", 4, 6), ("amdp", 4, 4), ("amdp", 4, 8),
     ("pipedream-2bw", 3, 3), ("pipedream", 3, 1)],
)  # fmt: skip
def test_clipping_by_what_is_known_of_all_stages(name: str, stages: int, size: int) -> None:
    job = Job({"name": name, "decisions": "latest"}, stages, size, config={"gradient_clipping": LIMIT})
    check(job, measure=squares, decide=clip)


@pytest.mark.parametrize("name", ["paci", "amdp"])
@pytest.mark.parametrize(
    ("config", "modelled"),
    [
        ({"zero_optimization": {"stage": 1}}, {"measure": partitioned_squares, "decide": clip_partitions}),
        (
            {**BF16, "communication_data_type": "fp32"},
            {"measure": squares, "decide": clip_masters, "master_dtype": torch.float32},
        ),
    ],
    ids=["ZeRO-1", "bf16"],
)
def test_clipping_of_masters_by_what_is_known(name: str, config: dict[str, Any], modelled: dict[str, Any]) -> None:
    dtype = torch.bfloat16 if "master_dtype" in modelled else torch.float32
    config = {**config, "gradient_clipping": LIMIT}
    job = Job({"name": name, "decisions": "latest"}, 4, 4, optimizer="adamw", config=config, dtype=dtype)
    check(job, **modelled)


RELAYED = {"decisions": "relayed"}


@pytest.mark.parametrize(("stages", "size"), [(2, 1), (2, 4), (3, 1), (3, 2), (4, 2), (4, 4), (4, 6)])
def test_clipping_by_relayed_decisions(stages: int, size: int) -> None:
    optimizer = {2: "sgd", 3: "adamw", 4: "fused"}[stages]
    config = {"gradient_clipping": LIMIT}
    job = Job({"name": "paci", **RELAYED}, stages, size, "masked", optimizer=optimizer, config=config, windows=6)
    check(job, measure=squares, decide=clip)


@pytest.mark.parametrize("decisions", ["latest", "relayed"])
def test_decisions_about_nothing(decisions: str) -> None:
    """Nobody tells anything, so that nobody waits for it at the end."""
    check(Job({"name": "paci", "decisions": decisions}, 3, 2, "recomputed", optimizer="adamw"))


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("options", [{"flush_every": 2}, {"flush_first": 2}, {"compensation": "error_feedback"}])
def test_relayed_decisions_and_other_options(options: dict[str, Any], size: int) -> None:
    schedule = {"name": "paci", **RELAYED, **options}
    job = Job(schedule, 3, size, optimizer="adamw", config={"gradient_clipping": LIMIT}, windows=6)
    check(job, measure=squares, decide=clip)


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("masters", ["ZeRO-1", "bf16"])
def test_relayed_decisions_with_masters(masters: str, size: int) -> None:
    config = {**MASTERS[masters]["config"], "gradient_clipping": LIMIT}
    dtype = MASTERS[masters].get("dtype", torch.float32)
    job = Job({"name": "paci", **RELAYED}, 3, size, optimizer="adamw", config=config, dtype=dtype, windows=5)
    if masters == "bf16":
        check(job, measure=squares, decide=clip_masters, master_dtype=torch.float32)
    else:
        check(job, measure=partitioned_squares, decide=clip_partitions)


def test_clipping_by_what_is_known_after_windows_with_a_flush() -> None:
    """At the change from one program to the other nothing is known of other stages."""
    options = {"decisions": "latest", "flush_first": 2, "compensation": "error_feedback"}
    job = Job({"name": "paci", **options}, 3, 4, config={"gradient_clipping": LIMIT}, windows=6)
    check(job, measure=squares, decide=clip)


@pytest.mark.parametrize("name", ["paci", "amdp"])
def test_the_norm_is_by_default_what_is_known_of_all_stages(name: str) -> None:
    job = Job(name, 4, 4, config={"gradient_clipping": LIMIT})
    assert_same(run(job), run(replace(job, schedule={"name": name, "decisions": "latest"})))


@pytest.mark.parametrize("config", [{}, {"zero_optimization": {"stage": 1}}])
def test_amdp_clips_by_the_norm_of_the_whole_model(config: dict[str, Any]) -> None:
    """In a meeting. Found in another order than the oracle's: equal to the rounding of a norm in fp32."""

    def clip_whole(parameters: list[nn.Parameter]) -> None:
        norms = [parameter.grad.norm() for parameter in parameters]
        assert len(norms) == 4 * 4 and max(norms) < torch.stack(norms).norm() > 0.05
        nn.utils.clip_grad_norm_(parameters, 0.05)

    job = Job({"name": "amdp", "decisions": "meeting"}, 4, 4, config={**config, "gradient_clipping": 0.05})
    found = run(job)
    pipeline, losses = oracle(job, before_step=clip_whole)
    for result in found:
        assert result["losses"] == pytest.approx(losses, rel=1e-5)
        for stage, weights in result["weights"].items():
            for value, expected in zip(weights.values(), pipeline.stages[stage].state_dict().values(), strict=True):
                torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)


def test_amdp_with_zero_1() -> None:
    check(Job("amdp", 4, 4, optimizer="adamw", config={"zero_optimization": {"stage": 1}}))


FEEDBACK = {"compensation": "error_feedback"}


@pytest.mark.parametrize(("stages", "size"), [(2, 1), (2, 4), (3, 2), (4, 2), (4, 6)])
def test_error_feedback(stages: int, size: int) -> None:
    optimizer = {2: "sgd", 3: "adamw", 4: "fused"}[stages]
    job = Job({"name": "paci", **FEEDBACK, "strength": 0.7}, stages, size, "counting", optimizer=optimizer)
    for result in check(job):
        assert_ahead(result)


@pytest.mark.parametrize("masters", [None, *MASTERS])
def test_error_feedback_under_amdp(masters: str | None) -> None:
    """Guests get what their home computes with."""
    check_masters(Job({"name": "amdp", **FEEDBACK}, 4, 8, optimizer="adamw"), masters)


@pytest.mark.parametrize(
    ("masters", "optimizer"),
    [("bf16", "sgd"), ("bf16", "adamw"), ("bf16", "fused"), ("ZeRO-1", "sgd"), ("ZeRO-1", "adamw")],
)
def test_error_feedback_with_masters(masters: str, optimizer: str) -> None:
    check_masters(Job({"name": "paci", **FEEDBACK}, 3, 2, optimizer=optimizer), masters)


@pytest.mark.parametrize("masters", [None, *MASTERS])
def test_error_feedback_on_replicas_that_are_alike(masters: str | None) -> None:
    """With ZeRO-1 and bf16 each holds a part of the masters."""
    job = Job({"name": "paci", **FEEDBACK}, 2, 2, optimizer="adamw", replicas=2, alike=True)
    check_masters(job, masters)


MUON = {"optimizer": {"type": "Muon", "params": {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.1}}}


@pytest.mark.parametrize("config", [{}, {"zero_optimization": {"stage": 1}}], ids=["", "ZeRO-1"])
def test_error_feedback_and_muon(config: dict[str, Any]) -> None:
    """Around whatever the optimizer does, for weights of all shapes: after one update, which is that without."""
    job = Job("paci", 2, 4, optimizer=None, config={**MUON, **config}, windows=1)
    # DeepSpeed compiles Muon and its Adam, minutes in which a rank that is stopped leaves a lock for which all wait.
    with torch._dynamo.config.patch(disable=True), patch.object(FusedAdamBuilder, "load", side_effect=RuntimeError):
        without, before = run(job), run(replace(job, windows=0))
        found = run(replace(job, schedule={"name": "paci", **FEEDBACK}))
    for stage, result in enumerate(found):
        values = zip(result["plain"], before[stage]["plain"], strict=True)
        ahead = [plain + 0.25 * (plain - first) for plain, first in values]
        assert all(map(torch.equal, result["plain"], without[stage]["plain"]))
        assert all(map(torch.equal, result["weights"][stage].values(), ahead))
        assert_ahead(result)


def check_masters(job: Job, masters: str | None) -> None:
    job = replace(job, **MASTERS.get(masters or "", {}))
    for result in check(job, master_dtype=torch.float32 if masters == "bf16" else None):
        assert_ahead(result)


def test_chimera() -> None:
    check(Job("chimera", 4, 4, optimizer="adamw"))


def check(
    job: Job,
    modelled: Job | None = None,
    make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """``job`` equals the oracle of ``modelled``, by default of the same job."""
    found = run(job)
    pipeline, losses = oracle(modelled or job, make_optimizer, **options)
    assert_equals_oracle(found, pipeline, losses)
    return found


def assert_ahead(result: dict[str, Any]) -> None:
    """A stage computes with other weights than its optimizer goes on from."""
    computing = [value for key, value in result["weights"][result["stage"]].items() if "mean" not in key]
    assert not any(map(torch.equal, computing, result["plain"]))
