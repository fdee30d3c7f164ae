"""What is refused, with the reason and the alternative, before anything is made."""

from __future__ import annotations

from functools import wraps
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.pipe import PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import nn

import amdp_plugin
from amdp_plugin.deepspeed import entry
from amdp_plugin.deepspeed.config import check_places, offloads
from amdp_plugin.deepspeed.engine import ScheduledPipelineEngine
from amdp_plugin.deepspeed.feedback import error_feedback
from amdp_plugin.settings import read_schedule
from tests.processes import run_ranks
from tests.runtime.models import WIDTH, data, loss

from .jobs import Job, build_layers, configuration, make_engine

PACI = {"pipeline": {"schedule": "paci"}}


def section(value: Any) -> dict[str, Any]:
    return {"pipeline": {"schedule": value}}


CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown schedule": (section("pacy"), ["unknown schedule 'pacy'", "1f1b", "gpipe", "paci"]),
    "unknown schedule in an object": (section({"name": "pacy"}), ["unknown schedule 'pacy'", "paci"]),
    "no name": (section({"extra_in_flight": 1}), ["must be a name", '"name"', "paci"]),
    "a number": (section(3), ["must be a name", "3", "paci"]),
    "null": (section(None), ["must be a name", "None", "paci"]),
    "a list": (section(["paci"]), ["must be a name", "['paci']"]),
    "a name that is a number": (section({"name": 1}), ["must be a name", "1f1b"]),
    "unknown option": (
        section({"name": "paci", "in_flight": 3}),
        ["'paci' has no option 'in_flight'", "timeout_seconds", "did you mean 'extra_in_flight'?"],
    ),
    "option of another schedule": (
        section({"name": "1f1b", "extra_in_flight": 1}),
        ["'1f1b' has no option 'extra_in_flight'", "timeout_seconds"],
    ),
    "option of a wrong type": (
        section({"name": "paci", "extra_in_flight": "one"}),
        ["'extra_in_flight' of schedule 'paci' is 'one'", "integer"],
    ),
    "option that is no whole number": (section({"name": "paci", "extra_in_flight": 1.5}), ["'extra_in_flight'", "1.5"]),
    "option that is a truth value": (section({"name": "paci", "extra_in_flight": True}), ["'extra_in_flight'", "True"]),
    "option out of range": (section({"name": "paci", "extra_in_flight": -1}), ["extra_in_flight", "negative", "-1"]),
    "costs of other stages": (
        section({"name": "paci", "stage_costs": [1.0, 1.0, 1.5]}),
        ["stage costs need one entry for each of 2 stages, got 3"],
    ),
    "costs of nothing": (
        section({"name": "paci", "stage_costs": [1.0, 0.0]}),
        ["stage costs are numbers above 0; that of stage 1 is 0"],
    ),
    "backward in no time": (section({"name": "paci", "backward_ratio": 0.0}), ["'backward_ratio'", "greater than 0"]),
    "timeout of nothing": (section({"name": "paci", "timeout_seconds": 0}), ["'timeout_seconds'", "greater than 0"]),
    "timeout without end": (
        section({"name": "paci", "timeout_seconds": float("inf")}), ["'timeout_seconds'", "less than or equal to"]
    ),
    "two wrong options": (
        section({"name": "paci", "a": 1, "timeout_seconds": "x"}),
        ["'a'", "'timeout_seconds'", "'x'"],
    ),
    "misspelled key": ({"pipeline": {"shedule": "paci"}}, ["'shedule'", 'did you mean "schedule"?']),
    "key with a capital": ({"pipeline": {"Schedule": "paci"}}, ["'Schedule'", 'did you mean "schedule"?']),
    "unknown key beside it": (
        {"pipeline": {"schedule": "paci", "stagess": 2}},
        ["no key stagess", "activation_checkpoint_interval", "schedule"],
    ),
    "a name for the section": ({"pipeline": "paci"}, ["\"pipeline\" is an object, not 'paci'", '{"schedule": "paci"}']),
    "at the top": ({"schedule": "paci"}, ["no key 'schedule' at the top", '"pipeline": {"schedule": "paci"}']),
    "another section": ({"Pipeline": {"schedule": {"name": "paci"}}}, ["no key 'Pipeline' at the top"]),
    "a name in the section": ({"pipeline": {"name": "paci"}}, ["no key 'name'", '{"name": "paci", ...}']),
    "option in the section": (
        {"pipeline": {"schedule": "paci", "compensation": "error_feedback"}},
        ["no key 'compensation', which belongs to the object", '{"name": "paci", ...}'],
    ),
    "misspelled option": (section({"name": "paci", "flush_frist": 2}), ["did you mean 'flush_first'?"]),
    "a window for others to fill in": (
        {**PACI, "gradient_accumulation_steps": "auto"},
        ["\"gradient_accumulation_steps\" must be a number, got 'auto'"],
    ),
    "a norm that is text": ({**PACI, "gradient_clipping": "1.0"}, ["must be a number, got '1.0'"]),
    "messages that take too long": (section({"name": "paci", "link_cost": 1e300}), ["a message takes at most 1e+09"]),
    "fp16 with short windows": (
        {
            **section({"name": "paci", "decisions": "relayed"}),
            "gradient_accumulation_steps": 1,
            "fp16": {"enabled": True},
        },
        ["windows of at least 2 micro-batches", "these are of 1", 'use "bf16", "decisions": "meeting", or a schedule'],
    ),
    "window that does not divide": ({**section("chimera"), "gradient_accumulation_steps": 3}, ["3", "use 2 or 4"]),
    "directions that do not divide": (section({"name": "amdp", "directions": 3}), ["directions"]),
    "parked gradients": (section({"name": "amdp", "parked": True}), ["sums the next window's", 'leave out "parked"']),
    "unknown decisions": (section({"name": "amdp", "decisions": "never"}), ["meeting", "latest", "'never'"]),
    "compensation of nothing": (
        section({"name": "1f1b", "compensation": "error_feedback"}),
        ["1f1b: compensation 'error_feedback' means nothing", "no gradient is late (staleness 0)", "free-running"],
    ),
    "unknown compensation": (
        section({"name": "paci", "compensation": "x"}),
        ["'compensation'", "'x'", "error_feedback"],
    ),
    "strength of nothing": (
        section({"name": "paci", "compensation": "error_feedback", "strength": 0.0}),
        ["'strength'", "greater than 0"],
    ),
    "compensation and steps on the host": (
        {
            **section({"name": "paci", "compensation": "error_feedback"}),
            "zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}},
        },
        ["\"offload_optimizer\"", "two iterates", "leave one of them out"],
    ),
    "predictions and steps on the host": (
        {**section("xpipe"), "zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}},
        ["\"offload_optimizer\"", "weights that are extrapolated", "or use paci"],
    ),
    "compensation of what is one": (
        section({"name": "pipemare", "compensation": "error_feedback"}),
        ["corrected weights are a compensation already", '"none"', "paci, amdp, pipedream and pipedream-2bw take it"],
    ),
    "an average that forgets nothing": (
        section({"name": "pipemare", "correction_decay": 1.0}),
        ["correction_decay is of corrected weights, above 0 and below 1", "got 1.0"],
    ),
    "fp16": (
        {**section({"name": "paci", "decisions": "latest"}), "fp16": {"enabled": True}},
        ['"fp16"', "all stages must decide together", '"bf16", "decisions": "relayed" or "meeting"'],
    ),
    "fp16 with independent updates": (
        {**section({"name": "amdp", "decisions": "local"}), "fp16": {"enabled": True}},
        ['"fp16"', 'use "bf16", "decisions": "meeting", or a schedule that flushes'],
    ),
    "amp": ({**PACI, "amp": {"enabled": True}}, ['"amp"', "apex", '"bf16"']),
    "torch_autocast": (
        {**PACI, "torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
        ['"torch_autocast"', "old weights", '"bf16"'],
    ),
    "ZeRO-2": ({**PACI, "zero_optimization": {"stage": 2}}, ["ZeRO stage 2", '"stage": 1']),
    "ZeRO-3": ({**PACI, "zero_optimization": {"stage": 3}}, ["ZeRO stage 3", '"stage": 1']),
}


def test_what_is_no_schedule_is_left_alone() -> None:
    """Keys of other programs, which DeepSpeed ignores, and an optimizer that is offloaded to nowhere."""
    check_places({"schedule": "cosine", "scheduler": {"type": "WarmupLR"}, "pipelines": 2, "pipeline": {"stages": 2}})
    assert not offloads({"zero_optimization": {"offload_optimizer": {"device": "none"}}})
    assert offloads({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}})


class Made(Exception):
    """An engine was about to be made."""


@wraps(deepspeed.initialize)
def forbid(*_: Any, **__: Any) -> None:
    raise Made


def attempt(model: Any, config: dict[str, Any]) -> str:
    """The refusal of this configuration, of which nothing may have come."""
    stock, entry._stock_initialize = entry._stock_initialize, forbid  # type: ignore[assignment]
    try:
        amdp_plugin.initialize(model=model, config=config)
    except ValueError as error:
        return str(error)
    finally:
        entry._stock_initialize = stock
        assert deepspeed.PipelineEngine is not ScheduledPipelineEngine
    raise AssertionError("was not refused")


def attempt_all(rank: int, job: Job) -> dict[str, str]:
    """The refusals of all cases, and then an engine that works all the same."""
    deepspeed.init_distributed("gloo")
    module = PipelineModule(build_layers(job), num_stages=2, loss_fn=loss, partition_method="uniform")
    plain = configuration(job.stock)
    messages = {case: attempt(module, {**plain, **config}) for case, (config, _) in CASES.items()}
    messages["other module"] = attempt(nn.Linear(2, 2), {**plain, **PACI})
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    engine, *_ = amdp_plugin.initialize(model=module, config={**plain, **PACI}, optimizer=optimizer)
    assert type(engine) is ScheduledPipelineEngine
    return messages


@pytest.fixture(scope="module")
def refusals() -> list[dict[str, str]]:
    return run_ranks(2, attempt_all, Job("paci"))


@pytest.mark.parametrize("case", CASES)
def test_configuration_is_refused(case: str, refusals: list[dict[str, str]]) -> None:
    for messages in refusals:
        for part in CASES[case][1]:
            assert part in messages[case]


def test_other_modules_are_refused(refusals: list[dict[str, str]]) -> None:
    assert "must be a deepspeed.pipe.PipelineModule, it is a Linear" in refusals[0]["other module"]


def tied(key: str) -> TiedLayerSpec:
    return TiedLayerSpec(key, nn.Linear, WIDTH, WIDTH)


def attempt_tied(rank: int, job: Job) -> str:
    deepspeed.init_distributed("gloo")
    plain, stages = [nn.Linear(WIDTH, WIDTH) for _ in range(6)], job.stages
    across = PipelineModule(
        [tied("words"), *plain, tied("words")], num_stages=stages, loss_fn=loss, partition_method="uniform"
    )
    message = attempt(across, configuration(job))
    within = PipelineModule(
        [tied("near"), tied("near"), *plain], num_stages=stages, loss_fn=loss, partition_method="uniform"
    )
    optimizer = torch.optim.SGD(within.parameters(), lr=0.1)
    engine, *_ = amdp_plugin.initialize(model=within, config=configuration(job), optimizer=optimizer)
    batch = torch.ones(3, WIDTH), torch.zeros(3, WIDTH)
    assert torch.isfinite(engine.train_batch(iter([batch] * 8)))
    return message


@pytest.mark.parametrize("schedule", ["pipedream-2bw", {"name": "amdp", "decisions": "local"}], ids=str)
def test_tied_layers_across_stages_are_refused(schedule: Any) -> None:
    """Where stages neither meet nor have their latest weights alone, in one direction. On one stage they work."""
    for message in run_ranks(4, attempt_tied, Job(schedule, 4, 4)):
        assert "tied layers words live on several stages" in message
        assert "untie them" in message and "use paci" in message and '"decisions": "meeting"' in message


def attempt_partitioned(rank: int, job: Job) -> list[str]:
    deepspeed.init_distributed("gloo")
    topology = PipeModelDataParallelTopology(num_pp=1, num_mp=2, num_dp=1)
    module = PipelineModule(build_layers(job), topology=topology, loss_fn=loss)
    config = configuration(job)
    keys = ("pipe_partitioned", "grad_partitioned")
    return [attempt(module, {**config, "pipeline": {"schedule": "paci", key: True}}) for key in keys]


def test_partitioned_activations_are_refused() -> None:
    for messages in run_ranks(2, attempt_partitioned, Job("paci", stages=1)):
        for key, message in zip(("pipe_partitioned", "grad_partitioned"), messages, strict=True):
            assert f'"{key}": true cannot be used with 2 tensor-parallel ranks' in message


def attempt_different_programs(rank: int) -> str:
    try:
        make_engine(rank, Job({"name": "paci", "extra_in_flight": rank % 2}, 3, 2))
    except ValueError as error:
        return str(error)
    raise AssertionError("was not refused")


def test_different_configurations_on_the_ranks_are_refused() -> None:
    """On all of them, and at once: they would wait for each other."""
    for rank, message in enumerate(run_ranks(3, attempt_different_programs)):
        assert f"different programs, rank {rank} for ('paci', {{'extra_in_flight': {rank % 2}}}, 3, 2" in message


@pytest.mark.parametrize("legacy", ["fused_adam_legacy", "fused_lamb_legacy"])
def test_error_feedback_needs_steps_that_leave_the_weights_alone(legacy: str) -> None:
    layer = nn.Linear(2, 2)
    optimizer = SimpleNamespace(optimizer=torch.optim.SGD(layer.parameters(), lr=0.1), **{legacy: True})
    engine = SimpleNamespace(module=layer, optimizer=optimizer)
    settings = read_schedule({"name": "paci", "compensation": "error_feedback"}, "here")
    with pytest.raises(ValueError, match=f"'error_feedback' cannot be used with {legacy} of fp16, whose step writes"):
        error_feedback(engine, settings)
    error_feedback(engine, read_schedule("paci", "here"))
    setattr(optimizer, legacy, False)
    error_feedback(engine, settings)


class Learning(nn.Module):
    """A loss with a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return self.weight * loss(output, label)


def attempt_learning_loss(rank: int, job: Job) -> str:
    deepspeed.init_distributed("gloo")
    module = PipelineModule(build_layers(job), num_stages=4, loss_fn=Learning(), partition_method="uniform")
    return attempt(module, configuration(job))


def test_a_loss_that_learns_is_refused_where_the_last_stage_has_replicas() -> None:
    for message in run_ranks(4, attempt_learning_loss, Job("amdp", 4, 4)):
        assert "loss_fn cannot have weights to train" in message


def attempt_cuda_graphs(rank: int, job: Job) -> str:
    engine = make_engine(rank, job)
    engine.compile(compile_kwargs={"mode": "reduce-overhead"})
    with pytest.raises(ValueError, match="CUDA graphs") as caught:
        engine.train_batch(data())
    return str(caught.value)


def test_an_engine_compiled_to_cuda_graphs_is_refused() -> None:
    for message in run_ranks(2, attempt_cuda_graphs, Job("paci")):
        assert "write the outputs of every micro-batch to the same memory" in message


def attempt_optimizers(rank: int) -> list[str]:
    deepspeed.init_distributed("gloo")
    messages = []
    for optimizer in (torch.optim.RMSprop, torch.optim.SGD):
        module = PipelineModule(build_layers(Job("xpipe")), num_stages=2, loss_fn=loss, partition_method="uniform")
        with pytest.raises(ValueError) as refusal:
            amdp_plugin.initialize(
                model=module, config=configuration(Job("xpipe")), optimizer=optimizer(module.parameters(), lr=0.1)
            )
        messages.append(str(refusal.value))
    return messages


def test_predictions_need_an_optimizer_with_a_smooth_direction() -> None:
    instead = "use Adam, AdamW or SGD with momentum, or another schedule: pipemare and paci take any optimizer"
    for unlike, still in run_ranks(2, attempt_optimizers):
        assert "no smooth direction of the optimizer RMSprop is known" in unlike and instead in unlike
        assert "SGD with momentum 0 has no smooth direction" in still and instead in still
