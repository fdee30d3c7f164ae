"""A run that is resumed, evaluated in between, or handed to stock and back, goes on as if nothing had been."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.lr_schedules import WarmupDecayLR

from tests import devices
from tests.processes import run_ranks
from tests.runtime.models import OPTIMIZERS
from tests.runtime.pipelines import placed

from .jobs import Job, assert_equals_oracle, assert_same, finish, make_engine, make_oracle, oracle, stream
from .test_oracle import BF16, FEEDBACK, MASTERS, NON_REENTRANT, WARMUP
from .test_other_weights import PIPEMARE

HALF = 5
"""Windows: more than fill the deepest pipeline here, so that what is saved is the steady state's."""
ZERO = {"zero_optimization": {"stage": 1}}
SCHEDULED = {"scheduler": {"type": "WarmupDecayLR", "params": {**WARMUP, "total_num_steps": 3 * HALF}}}
AHEAD_PACI, AHEAD_AMDP = {"name": "paci", **FEEDBACK}, {"name": "amdp", **FEEDBACK}
RELAYED = {"name": "paci", "decisions": "relayed", "compensation": "error_feedback"}
FLUSHED = {f"flushed first, {at}": {**AHEAD_PACI, "flush_first": first} for at, first in
           {"saved before": HALF + 1, "saved there": HALF, "saved after": HALF - 1}.items()}  # fmt: skip
"""With a flush at every window at first, until shortly before or after the checkpoint."""
JOBS = {
    "paci": Job("paci", 3, 2, optimizer="adamw", config=SCHEDULED),
    "paci, long window": Job("paci", 2, 5),
    "paci, deep": Job("paci", 4, 1, optimizer="fused"),
    "paci, recomputation": Job("paci", 3, 2, config=NON_REENTRANT),
    "paci, buffers": Job("paci", 3, 2, kind="counting"),
    "paci, ZeRO-1": Job("paci", 2, 2, optimizer="adamw", config=ZERO, replicas=2),
    "paci, bf16": Job("paci", 2, 2, optimizer="adamw", config=BF16, dtype=torch.bfloat16),
    "1f1b": Job("1f1b", 3, 2, optimizer="adamw", config=SCHEDULED),
    "amdp": Job("amdp", 4, 4, optimizer="adamw", config=SCHEDULED),
    "amdp, buffers": Job("amdp", 4, 8, kind="counting"),
    "amdp, bf16": Job("amdp", 4, 4, optimizer="adamw", config=BF16, dtype=torch.bfloat16),
    "amdp, ZeRO-1": Job("amdp", 4, 4, optimizer="adamw", config=ZERO, replicas=2),
    "amdp, clipping": Job("amdp", 4, 4, config={"gradient_clipping": 0.05}),
    "1f1b, ZeRO-1": Job("1f1b", 2, 2, optimizer="adamw", config=ZERO, replicas=2),
    "error feedback": Job(AHEAD_PACI, 3, 2, optimizer="adamw", config=SCHEDULED),
    "error feedback, replicas": Job(AHEAD_PACI, 2, 2, replicas=2),
    "error feedback, ZeRO-1": Job(AHEAD_PACI, 2, 2, optimizer="adamw", config=ZERO, replicas=2),
    "error feedback, bf16": Job(AHEAD_PACI, 2, 2, optimizer="adamw", config=BF16, dtype=torch.bfloat16, replicas=2),
    **{name: Job(schedule, 3, 2, optimizer="adamw") for name, schedule in FLUSHED.items()},
    "error feedback, amdp": Job(AHEAD_AMDP, 4, 4, kind="counting", optimizer="adamw"),
    "latest": Job({"name": "paci", "decisions": "latest"}, 3, 2, config={"gradient_clipping": 0.05}),
    "relayed": Job(RELAYED, 3, 2, optimizer="adamw", config={**SCHEDULED, "gradient_clipping": 0.05}),
    "relayed, deep": Job(RELAYED, 4, 1, kind="counting", config={"gradient_clipping": 0.05}),
    "relayed, bf16": Job(RELAYED, 2, 2, optimizer="adamw", config=BF16, dtype=torch.bfloat16, replicas=2),
    "relayed, ZeRO-1": Job(RELAYED, 2, 2, optimizer="adamw", config=ZERO, replicas=2),
    "pipemare": Job(PIPEMARE, 3, 2, optimizer="adamw", config=SCHEDULED),
    "pipemare, bf16": Job(PIPEMARE, 3, 2, optimizer="adamw", config=BF16, dtype=torch.bfloat16, replicas=2),
    "xpipe": Job("xpipe", 3, 2, optimizer="adamw", config=SCHEDULED),
    "spectrain, ZeRO-1": Job("spectrain", 3, 1, optimizer="adamw", config=ZERO, replicas=2),
    "error feedback, amdp, bf16": Job(AHEAD_AMDP, 4, 4, optimizer="adamw", config=BF16, dtype=torch.bfloat16),
}


def train(engine: Any, batches: Any, windows: int) -> list[float]:
    return [float(engine.train_batch(batches)) for _ in range(windows)]


def save_and_go_on(rank: int, job: Job, directory: Path) -> dict[str, Any]:
    """Train, save, train on with the same engine; under error feedback, evaluate before it."""
    engine = make_engine(rank, job)
    batches = stream(engine, job)
    train(engine, batches, HALF)
    if job.schedule in (AHEAD_PACI, AHEAD_AMDP):
        evaluate(engine, job)
    engine.save_checkpoint(str(directory), None, {"note": 7})  # by position, as stock allows
    return finish(engine, train(engine, batches, HALF))


def load_and_go_on(rank: int, job: Job, directory: Path) -> dict[str, Any]:
    """Train something else, load, train on with the data from there."""
    engine = make_engine(rank, job)
    train(engine, stream(engine, job, start=77), 2)
    torch.manual_seed(999)
    path, state = engine.load_checkpoint(str(directory))
    assert path is not None and state["note"] == 7
    assert engine.global_steps == HALF
    return finish(engine, train(engine, stream(engine, job, start=HALF * job.size), HALF))


@pytest.mark.parametrize("case", JOBS)
def test_resumed_run_equals_the_one_that_went_on(case: str, tmp_path: Path) -> None:
    job = JOBS[case]
    written = run_ranks(job.world, save_and_go_on, job, tmp_path)
    assert_same(run_ranks(job.world, load_and_go_on, job, tmp_path), written)


def test_saving_is_a_flush_to_the_oracle(tmp_path: Path) -> None:
    """What was in flight is cancelled and forwarded anew, random numbers included."""
    job = Job("paci", 3, 2)
    found = run_ranks(job.world, save_and_go_on, job, tmp_path)
    pipeline, batches = make_oracle(job), placed()
    pipeline.train(batches, HALF)
    losses = pipeline.train(batches, HALF)
    assert_equals_oracle(found, pipeline, losses)


def look_and_go_on(rank: int, job: Job, directory: Path | None) -> dict[str, Any]:
    """Train, look for a checkpoint where there is none, or only come to rest; train on."""
    engine = make_engine(rank, job)
    batches = stream(engine, job)
    train(engine, batches, HALF)
    if directory is None:
        engine.executor.quiesce()
    else:
        assert engine.load_checkpoint(str(directory)) == (None, None)
    return finish(engine, train(engine, batches, HALF))


def test_a_checkpoint_that_is_not_there_changes_nothing(tmp_path: Path) -> None:
    """Neither data that was read ahead nor, under error feedback, what the optimizer goes on from is lost."""
    job = Job(AHEAD_PACI, 3, 2)
    found, expected = (run_ranks(job.world, look_and_go_on, job, directory) for directory in (tmp_path, None))
    assert_same(found, expected)


def change_hands(rank: int, first: Job, second: Job, directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train and save under ``first``; load into a fresh engine of ``second``; what both hold."""
    before = make_engine(rank, first)
    train(before, stream(before, first), HALF)
    before.save_checkpoint(str(directory), tag="shared")
    after = make_engine(rank, second)
    path, _ = after.load_checkpoint(str(directory), tag="shared")
    assert path is not None
    left, right = holdings(before), holdings(after)
    for stage, guest in getattr(after, "guests", {}).items():
        assert stage != after.stage_id and guest.stage_id == stage
    train(after, stream(after, second, start=HALF * second.size), 2)
    assert after.global_steps == HALF + 2
    return left, right


def holdings(engine: Any) -> dict[str, Any]:
    """All that a checkpoint carries, as plain values."""
    optimizer = engine.optimizer.state_dict()
    return {
        "weights": {key: value.tolist() for key, value in engine.module.state_dict().items()},
        "optimizer": plain(optimizer),
        "scheduler": engine.lr_scheduler.state_dict(),
        "counters": (engine.global_steps, engine.global_samples, engine.skipped_steps, engine.get_lr()),
    }


def plain(value: Any) -> Any:
    """Tensors as lists, so that nested states compare."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value if isinstance(value, int | float | str | bool | None) else str(type(value))


@pytest.mark.parametrize("config", [{}, ZERO], ids=["plain", "ZeRO-1"])
@pytest.mark.parametrize(
    ("first", "second"),
    [("paci", None), (None, "paci"), ("amdp", None), (None, "amdp"), ("amdp", "paci"), ("paci", "amdp")],
)
def test_engines_load_each_other(
    first: str | None, second: str | None, config: dict[str, Any], tmp_path: Path
) -> None:
    """Weights, optimizer, learning-rate schedule and counters; ``None`` is stock."""
    stages = 4 if "amdp" in (first, second) else 2
    jobs = [Job(name, stages, 4, optimizer="adamw", config={**SCHEDULED, **config}) for name in (first, second)]
    for left, right in run_ranks(stages, change_hands, *jobs, tmp_path):
        assert left == right


@pytest.mark.parametrize("masters", [None, *MASTERS])
@pytest.mark.parametrize(
    ("first", "second"), [(AHEAD_PACI, None), (AHEAD_PACI, "paci"), (None, AHEAD_PACI), (AHEAD_AMDP, None)]
)
def test_checkpoints_hold_the_plain_iterate(first: Any, second: Any, masters: str | None, tmp_path: Path) -> None:
    """What another schedule loads is what the optimizer went on from, and not what the stages computed with. Under
    error feedback, too, a run that begins from there begins with that."""
    stages = 4 if first == AHEAD_AMDP else 2
    one, other = [
        replace(Job(each, stages, 4, optimizer="adamw"), **MASTERS.get(masters or "", {})) for each in (first, second)
    ]
    one, other = (replace(job, config={**SCHEDULED, **job.config}) for job in (one, other))
    found = run_ranks(stages, change_hands, one, other, tmp_path)
    for left, right in found:
        assert left == right
    if first is None:
        return
    pipeline = trained_oracle(one, masters)
    for rank, (left, _) in enumerate(found):
        plain = [value.to(one.dtype).tolist() for value in pipeline.plain(rank)]
        assert list(left["weights"].values()) == plain
        assert plain != [parameter.tolist() for parameter in pipeline.stages[rank].parameters()]


def trained_oracle(job: Job, masters: str | None) -> Any:
    def scheduled(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        optimizer = OPTIMIZERS["adamw"](parameters)
        scheduler = WarmupDecayLR(optimizer, **SCHEDULED["scheduler"]["params"])
        optimizer.register_step_post_hook(lambda *_: scheduler.step())
        return optimizer

    pipeline = make_oracle(job, scheduled, master_dtype=torch.float32 if masters == "bf16" else None)
    pipeline.train(placed(job.dtype), HALF)
    return pipeline


EVALUATED = {
    "paci": Job("paci", 3, 2),
    "paci, long window": Job("paci", 2, 4),
    "paci, deep": Job("paci", 4, 1),
    "1f1b": Job("1f1b", 3, 2),
    "amdp": Job("amdp", 4, 8),
    "error feedback": Job(AHEAD_PACI, 3, 2),
    "error feedback, amdp": Job(AHEAD_AMDP, 4, 8),
    "error feedback, ZeRO-1": Job(AHEAD_PACI, 3, 2, optimizer="adamw", config=ZERO),
}


def evaluate(engine: Any, job: Job, **options: Any) -> float:
    return float(engine.eval_batch(stream(engine, job, start=500), **options))


def with_evaluation(rank: int, job: Job, often: bool) -> tuple[dict[str, Any], list[float]]:
    """Train ten windows, with evaluations after the fifth and the tenth, or with none at all."""
    engine = make_engine(rank, job)
    batches = stream(engine, job)
    losses, evaluations = train(engine, batches, 5), []
    if often:
        evaluations += [evaluate(engine, job), evaluate(engine, job), evaluate(engine, job, num_micro_batches=1)]
    losses += train(engine, batches, 5)
    if often:
        evaluations += [evaluate(engine, job)]
    return finish(engine, losses), evaluations


def evaluated_by_the_oracle(job: Job, windows: int, micro_batches: int) -> float:
    """The mean loss with what the optimizers have made by ``windows`` updates, without dropout."""
    pipeline, _ = oracle(replace(job, windows=windows))
    for stage, module in enumerate(pipeline.stages):
        for parameter, plain in zip(module.parameters(), pipeline.plain(stage), strict=True):
            parameter.data.copy_(plain)
    batches, total = placed(job.dtype), devices.place(torch.zeros(()))
    with torch.no_grad():
        for number in range(500 + micro_batches):
            x, label = next(batches)
            if number >= 500:
                for stage in pipeline.stages:
                    x = stage.eval()(x)
                total += pipeline._loss(x, label)
    return float(total / micro_batches)


@pytest.mark.parametrize("job", EVALUATED.values(), ids=EVALUATED)
def test_evaluation_changes_nothing(job: Job) -> None:
    """In the middle of a stream; and its value is that of the weights after the latest update, on every rank."""
    plainly, _ = zip(*run_ranks(job.world, with_evaluation, job, False), strict=True)
    found, evaluations = zip(*run_ranks(job.world, with_evaluation, job, True), strict=True)
    assert_same(list(found), list(plainly))
    halfway = evaluated_by_the_oracle(job, 5, job.size)
    end = evaluated_by_the_oracle(job, 10, job.size)
    for values in evaluations:
        assert values == [halfway, halfway, evaluated_by_the_oracle(job, 5, 1), end]
