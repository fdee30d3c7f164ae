"""Layers tied over stages under paci, whose stages never meet."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.pipe import PipelineModule, TiedLayerSpec
from torch import nn

import amdp_plugin
from amdp_plugin.deepspeed.meeting import tied_parameters
from amdp_plugin.deepspeed.tied_state import EngineStates
from amdp_plugin.plan.planner import Planner
from amdp_plugin.plan.report import report
from amdp_plugin.plan.schedules import make
from amdp_plugin.runtime.serial import SerialPipeline
from tests import devices
from tests.processes import run_ranks
from tests.runtime.models import OPTIMIZERS, ROWS, WIDTH, Plain, data, loss

from .jobs import Job, configuration, finish, stream
from .test_oracle import BF16, LIMIT, NON_REENTRANT, REENTRANT, clip, clip_masters, squares
from .tied_layers import Last, Words, assert_equals_oracle, head, make_tied_engine, oracle_of_tied, train_tied

FEEDBACK = {"compensation": "error_feedback"}
MASTERS: dict[str, Any] = {"config": {**BF16, "communication_data_type": "fp32"}, "dtype": torch.bfloat16}
ZERO: dict[str, Any] = {"config": {"zero_optimization": {"stage": 1}}}


def check(job: Job, **options: Any) -> list[dict[str, Any]]:
    found = run_ranks(job.world, train_tied, job)
    assert_equals_oracle(found, *oracle_of_tied(job, (job.windows,), **options))
    return found


@pytest.mark.parametrize(("stages", "size"), [(2, 1), (2, 2), (2, 4), (3, 2), (4, 1), (4, 4), (4, 6)])
def test_paci(stages: int, size: int) -> None:
    """Windows below, at and above the stages."""
    check(Job("paci", stages, size, optimizer={2: "sgd", 3: "fused", 4: "adamw"}[stages]))


@pytest.mark.parametrize("size", [3, 8])
def test_a_deep_pipeline(size: int) -> None:
    check(Job("paci", 8, size, optimizer="adamw", windows=3))


@pytest.mark.parametrize("config", [REENTRANT, NON_REENTRANT], ids=["reentrant", "not reentrant"])
def test_recomputation(config: dict[str, Any]) -> None:
    check(Job("paci", 3, 2, optimizer="adamw", config=config), recomputed=True)


@pytest.mark.parametrize("masters", [ZERO, MASTERS], ids=["ZeRO-1", "bf16"])
@pytest.mark.parametrize(("stages", "size"), [(2, 1), (3, 3)])
def test_masters(masters: dict[str, Any], stages: int, size: int) -> None:
    """The guest's optimizer copies its own masters over the weights, and the value that came is put back."""
    job = Job("paci", stages, size, optimizer="adamw", **masters)
    check(job, master_dtype=torch.float32 if masters is MASTERS else None)


@pytest.mark.parametrize("more", [{}, ZERO, MASTERS], ids=["fp32", "ZeRO-1", "bf16"])
def test_replicas_that_are_alike(more: dict[str, Any]) -> None:
    job = Job("paci", 2, 2, optimizer="adamw", replicas=2, alike=True, **more)
    check(job, master_dtype=torch.float32 if more is MASTERS else None)


@pytest.mark.parametrize("more", [{}, ZERO, MASTERS], ids=["fp32", "ZeRO-1", "bf16"])
def test_replicas_with_data_of_their_own(more: dict[str, Any]) -> None:
    """Each pipeline sends its own sums, before they are reduced: all four ranks end with one value of the words."""
    found = run_ranks(4, train_tied, Job("paci", 2, 2, optimizer="adamw", replicas=2, **more))
    first, *others = (result["weights"][result["stage"]]["tied_modules.words.weight"] for result in found)
    assert all(torch.equal(first, other) for other in others)
    alike = run_ranks(2, train_tied, Job("paci", 2, 2, optimizer="adamw", **more))
    assert found[0]["losses"][0] != alike[0]["losses"][0], "the mean of both"


@pytest.mark.parametrize("more", [{}, MASTERS], ids=["fp32", "bf16"])
def test_error_feedback(more: dict[str, Any]) -> None:
    job = Job({"name": "paci", **FEEDBACK}, 3, 2, optimizer="adamw", **more)
    check(job, master_dtype=torch.float32 if more else None)


@pytest.mark.parametrize("more", [{"flush_first": 2}, {"flush_every": 2}])
def test_flushes(more: dict[str, int]) -> None:
    check(Job({"name": "paci", **more}, 3, 2, optimizer="adamw", windows=6))


@pytest.mark.parametrize("masters", [None, MASTERS], ids=["fp32", "bf16"])
def test_the_norm_counts_it_once_and_whole(masters: dict[str, Any] | None) -> None:
    """At its home, where the gradients of the guest have been added; the default: by what is known of all stages."""
    more = masters or {}
    job = Job({"name": "paci", "decisions": "latest"}, 4, 4, optimizer="adamw", **more)
    job = replace(job, config={**job.config, "gradient_clipping": LIMIT})
    if masters is None:
        check(job, measure=squares, decide=clip)
    else:
        check(job, measure=squares, decide=clip_masters, master_dtype=torch.float32)


@pytest.mark.parametrize("more", [{}, MASTERS], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("stages", "size"), [(2, 2), (3, 1), (4, 4)])
def test_relayed_decisions(stages: int, size: int, more: dict[str, Any]) -> None:
    """By the norm of the whole model for the same window; what is tied is sent before a window is parked."""
    job = Job({"name": "paci", "decisions": "relayed"}, stages, size, optimizer="adamw", windows=6, **more)
    job = replace(job, config={**job.config, "gradient_clipping": LIMIT})
    if more:
        check(job, measure=squares, decide=clip_masters, master_dtype=torch.float32)
    else:
        check(job, measure=squares, decide=clip)


@pytest.mark.parametrize("more", [ZERO, {**ZERO, "replicas": 2, "alike": True}, {"replicas": 2, "alike": True}])
def test_relayed_decisions_about_nothing(more: dict[str, Any]) -> None:
    """What is parked is reduced over replicas, and in parts; so is what has come from guests."""
    check(Job({"name": "paci", "decisions": "relayed"}, 2, 1, optimizer="adamw", windows=6, **more))


def train_in_parts(rank: int, job: Job, parts: tuple[int, ...]) -> dict[str, Any]:
    engine = make_tied_engine(rank, job)
    batches, losses = stream(engine, job), []
    for windows in parts:
        losses += [float(engine.train_batch(batches)) for _ in range(windows)]
        engine.executor.quiesce()
    return finish(engine, losses)


def test_quiesce_is_a_cut() -> None:
    job = Job("paci", 3, 1, optimizer="adamw")
    assert_equals_oracle(run_ranks(3, train_in_parts, job, (3, 1, 2)), *oracle_of_tied(job, (3, 1, 2)))


def save_and_go_on(rank: int, job: Job, folder: str) -> dict[str, Any]:
    engine = make_tied_engine(rank, job)
    batches, losses = stream(engine, job), []
    for window in range(job.windows):
        if window == 3:
            engine.save_checkpoint(folder, tag="third")
            losses.clear()
        losses.append(float(engine.train_batch(batches)))
    return finish(engine, losses)


def resume(rank: int, job: Job, folder: str) -> dict[str, Any]:
    """With an engine that has trained before, and that saves what it has loaded."""
    engine = make_tied_engine(rank, job)
    engine.train_batch(stream(engine, job, 77))
    engine.load_checkpoint(folder, tag="third")
    engine.save_checkpoint(folder, tag="again")
    shown = engine.module.state_dict()
    batches = stream(engine, job, 3 * job.size)
    result = finish(engine, [float(engine.train_batch(batches)) for _ in range(job.windows - 3)])
    return {**result, "loaded": {key: value.clone() for key, value in shown.items()}}


RELAYED = {"name": "paci", "decisions": "relayed"}


@pytest.mark.parametrize("schedule", ["paci", {"name": "paci", **FEEDBACK}, RELAYED], ids=["", "feedback", "relayed"])
@pytest.mark.parametrize("more", [{}, ZERO, MASTERS], ids=["fp32", "ZeRO-1", "bf16"])
def test_a_resumed_run_goes_on_as_if_nothing_had_happened(schedule: Any, more: dict[str, Any], tmp_path: Path) -> None:
    job = Job(schedule, 3, 1, optimizer="adamw", windows=7, **more)
    whole = run_ranks(3, save_and_go_on, job, str(tmp_path))
    resumed = run_ranks(3, resume, job, str(tmp_path))
    for one, other in zip(whole, resumed, strict=True):
        assert one["losses"] == other["losses"]
        for stage, weights in one["weights"].items():
            assert all(map(torch.equal, weights.values(), other["weights"][stage].values()))


def save_at_rest(rank: int, job: Job, folder: str) -> dict[str, Any]:
    """What this rank's optimizer keeps for the words when a checkpoint has been written."""
    engine = make_tied_engine(rank, job, dropout=False)
    batches = stream(engine, job)
    for _ in range(3):
        engine.train_batch(batches)
    engine.save_checkpoint(folder, tag="third")
    (parameter,) = tied_parameters(engine.module)
    kept = {} if parameter is None else EngineStates(engine).read(parameter).tensors
    return {"stage": engine.stage_id, "kept": {name: value.clone() for name, value in kept.items()}}


def go_on_as_stock(rank: int, job: Job, folder: str) -> dict[str, Any]:
    engine = make_tied_engine(rank, job.stock, dropout=False)
    engine.load_checkpoint(folder, tag="third")
    batches = stream(engine, job, 3 * job.size)
    return finish(engine, [float(engine.train_batch(batches)) for _ in range(4)])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("schedule", ["paci", {"name": "paci", **FEEDBACK}], ids=["", "error feedback"])
@pytest.mark.parametrize("more", [{}, {**ZERO, "replicas": 2}, MASTERS], ids=["fp32", "ZeRO-1", "bf16"])
def test_stock_goes_on_from_a_checkpoint(schedule: Any, more: dict[str, Any], optimizer: str, tmp_path: Path) -> None:
    """Where every stage steps its own copy: both keep what the home's optimizer has made of it. The oracle goes on from
    what it has, with a flush at every window."""
    job = Job(schedule, 2, 1, optimizer=optimizer, alike=True, **more)
    for first, last in _ends(run_ranks(job.world, save_at_rest, job, str(tmp_path))):
        assert first["kept"].keys() == last["kept"].keys() and first["kept"]
        assert all(torch.equal(value, last["kept"][name]) for name, value in first["kept"].items())
    found = run_ranks(job.world, go_on_as_stock, job, str(tmp_path))
    if schedule != "paci":
        return  # the oracle computes on with what it looked ahead to
    masters = torch.float32 if more is MASTERS else None
    pipeline, _ = oracle_of_tied(job, (3,), dropout=False, master_dtype=masters)
    pipeline.schedule = make("1f1b", 2, 1, tied=((0, 1),))
    pipeline.used.clear()
    losses = pipeline.train(itertools.islice(data(job.dtype), 3, None), 4)
    for result in found:
        assert result["losses"] == losses
        module: Any = pipeline.stages[result["stage"]]
        words = module[0].weight if result["stage"] == 0 else module.words.weight
        assert torch.equal(result["weights"][result["stage"]]["tied_modules.words.weight"], words)


def _ends(found: list[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The two stages of every replica."""
    by_stage = [[result for result in found if result["stage"] == stage] for stage in (0, 1)]
    return list(zip(*by_stage, strict=True))


def evaluate(rank: int, job: Job) -> dict[str, Any]:
    """Between two windows, with values on their way to the last stage; then with nothing in flight."""
    engine = make_tied_engine(rank, job)
    batches, losses = stream(engine, job), []
    losses += [float(engine.train_batch(batches)) for _ in range(3)]
    seen = [float(engine.eval_batch(data(job.dtype))) for _ in range(2)]
    losses += [float(engine.train_batch(batches)) for _ in range(2)]
    return {**finish(engine, losses), "evaluated": seen}


def evaluate_at_rest(rank: int, job: Job) -> float:
    engine = make_tied_engine(rank, job)
    batches = stream(engine, job)
    for _ in range(3):
        engine.train_batch(batches)
    engine.executor.quiesce()
    return float(engine.eval_batch(data(job.dtype)))


@pytest.mark.parametrize("more", [{}, MASTERS], ids=["fp32", "bf16"])
def test_an_evaluation_sees_one_weight_and_changes_nothing(more: dict[str, Any]) -> None:
    job = Job("paci", 4, 1, optimizer="adamw", **more)
    found = run_ranks(4, evaluate, job)
    assert_equals_oracle(found, *oracle_of_tied(job, (5,), master_dtype=torch.float32 if more else None))
    for result, seen in zip(found, run_ranks(4, evaluate_at_rest, job), strict=True):
        assert result["evaluated"] == [seen, seen]


def resize(rank: int, job: Job) -> dict[str, Any]:
    """Windows of another size, in the middle of a job; more values are under way then."""
    engine = make_tied_engine(rank, job)
    batches, losses = stream(engine, job), []
    losses += [float(engine.train_batch(batches)) for _ in range(3)]
    engine.set_train_batch_size(ROWS)
    losses += [float(engine.train_batch(batches)) for _ in range(5)]
    return finish(engine, losses)


def test_windows_of_another_size() -> None:
    job = Job("paci", 3, 4, optimizer="adamw")
    pipeline, losses = oracle_of_tied(job, ())
    batches = data()
    losses = pipeline.train(batches, 3)
    pipeline.schedule = make("paci", 3, 1, tied=((0, 2),))
    losses += pipeline.train(batches, 5)
    found = run_ranks(3, resize, job)
    for result in found:
        assert result["losses"] == losses


def measured(rank: int, job: Job) -> list[int]:
    engine = make_tied_engine(rank, job)
    batches = stream(engine, job)
    counts = []
    for _ in range(6):
        engine.train_batch(batches)
        counts.append(sum(tensor.numel() for tensor in engine.exchange_buffers()))
    return counts


@pytest.mark.parametrize(("stages", "size"), [(2, 2), (4, 1), (4, 4)])
def test_it_takes_the_memory_that_the_plan_says(stages: int, size: int) -> None:
    """From the start on, in copies of the words."""
    job = Job("paci", stages, size)
    (planned,) = report(Planner(make("paci", stages, size, tied=((0, stages - 1),))), 1).tied
    for stage, counts in enumerate(run_ranks(stages, measured, job)):
        place = {0: 0, stages - 1: 1}.get(stage)
        copies = 0 if place is None else planned.values[place] + planned.sums[place]
        assert counts == [copies * WIDTH * WIDTH] * 6, f"stage {stage}"


def pairs(stages: int, front: int, back: int) -> list[list[Any]]:
    """Two layers a stage; the words in front of one, the head behind another."""
    torch.manual_seed(5)
    layers: list[list[Any]] = [[Plain(), Plain()] for _ in range(stages)]
    layers[front][0], layers[back][1] = None, None
    return layers


def train_between(rank: int, job: Job, front: int, back: int) -> dict[str, Any]:
    deepspeed.init_distributed(devices.backend())
    layers = pairs(job.stages, front, back)
    layers[front][0] = TiedLayerSpec("words", Words)
    layers[back][1] = TiedLayerSpec("words", Words, forward_fn=head)
    module = PipelineModule(
        list(itertools.chain(*layers)), num_stages=job.stages, loss_fn=loss, partition_method="uniform"
    )
    optimizer = OPTIMIZERS[str(job.optimizer)](list(module.parameters()))
    engine, *_ = amdp_plugin.initialize(model=module, config=configuration(job), optimizer=optimizer)
    torch.manual_seed(100 + rank)
    batches = stream(engine, job)
    return finish(engine, [float(engine.train_batch(batches)) for _ in range(job.windows)])


@pytest.mark.parametrize(("front", "back", "size"), [(1, 3, 4), (1, 2, 1), (0, 2, 3)])
def test_stages_in_between(front: int, back: int, size: int) -> None:
    """With a norm of what is known of all stages: that of the home is known when the guests' gradients are in."""
    clipping = {"config": {"gradient_clipping": LIMIT}}
    job = Job({"name": "paci", "decisions": "latest"}, 4, size, optimizer="adamw", **clipping)
    found = run_ranks(4, train_between, job, front, back)
    layers = pairs(4, front, back)
    layers[front][0] = Words()
    stages: list[Any] = [nn.Sequential(*part) if stage != back else Last(part[0]) for stage, part in enumerate(layers)]
    schedule = make("paci", 4, size, decisions="latest", tied=((front, back),))
    pipeline = SerialPipeline(
        stages, OPTIMIZERS["adamw"], loss, schedule, seeds=[100 + stage for stage in range(4)],
        tied=[[(front, stages[front][0].weight), (back, stages[back].words.weight)]], measure=squares, decide=clip,
    )  # fmt: skip
    losses = pipeline.train(data(), job.windows)
    for result in found:  # processors differ in how they round a norm
        assert result["losses"] == pytest.approx(losses, rel=1e-5)
        words = result["weights"][result["stage"]].get("tied_modules.words.weight")
        assert (words is None) == (result["stage"] not in (front, back))
        if words is not None:
            for expected in (stages[front][0].weight, stages[back].words.weight):
                torch.testing.assert_close(words, expected.detach(), rtol=1e-5, atol=2e-6)
