"""fp16 where updates meet: Megatron's own loss scale is one number, and all stages skip the same windows."""

from __future__ import annotations

import copy
from bisect import bisect
from dataclasses import replace
from itertools import accumulate, pairwise
from math import isfinite
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from amdp_plugin.plan.schedules import make
from amdp_plugin.settings import Needs, check_loss_scale, read_schedule
from tests.processes import run_ranks

from .jobs import DISTRIBUTED, DROPOUT, Job
from .oracle import assert_equals_oracle, nothing, oracle_loss, run_oracle
from .test_oracle import FEEDBACK
from .test_stock import HALF
from .training import Trainer, assert_same, copies

WINDOWS = 12
FIRST_SCALE, HYSTERESIS, GROWTH_INTERVAL = 2.0**20, 2, 3
FP16: dict[str, Any] = {
    "model": {**HALF, **DROPOUT, "pipeline_dtype": torch.float16},
    "ddp": {"grad_reduce_in_fp32": True},
    "optimizer": {
        **HALF, "initial_loss_scale": FIRST_SCALE, "hysteresis": HYSTERESIS, "loss_scale_window": GROWTH_INTERVAL
    },
}  # fmt: skip


class LossScale:
    """What Megatron's scale should do, on the oracle. Powers of two, so that scaling rounds nothing.

    Attributes:
        scales: after every window.
        overflows: for every window the numbers of parameters, of all stages in a row, whose gradients are not finite.
    """

    def __init__(self) -> None:
        self.scales: list[float] = [FIRST_SCALE]
        self.overflows: list[list[int]] = []
        self._patience, self._good = HYSTERESIS, 0

    def loss(self, output: Any, labels: Tensor) -> Tensor:
        """A backward takes the scale of its time: a forward may be of a window before the scale changed."""
        loss = oracle_loss(output, labels)
        loss.register_hook(lambda gradient: gradient * self.scales[-1])
        return loss

    def before_step(self, parameters: list[nn.Parameter]) -> None:
        """Unscale; or leave the optimizers without gradients, so that they change nothing."""
        gradients = [parameter.grad for parameter in parameters]
        overflows = [number for number, each in enumerate(gradients) if each is not None and not each.isfinite().all()]
        for parameter in parameters:
            parameter.grad = None if overflows or parameter.grad is None else parameter.grad / self.scales[-1]
        self.overflows.append(overflows)
        self.scales.append(self._next(bool(overflows)))

    def _next(self, overflow: bool) -> float:
        if overflow:
            self._patience, self._good = self._patience - 1, 0
            return self.scales[-1] / 2 if self._patience <= 0 else self.scales[-1]
        self._good += 1
        if self._good < GROWTH_INTERVAL:
            return self.scales[-1]
        self._patience, self._good = HYSTERESIS, 0
        return self.scales[-1] * 2


def run_scaled_oracle(rank: int, job: Job) -> dict[str, Any]:
    scale = LossScale()
    result = run_oracle(rank, job, [(WINDOWS, job.micro_batches)], scale.before_step, scale.loss)
    return {**result, "scales": scale.scales[1:], "overflows": scale.overflows}


def train(rank: int, job: Job) -> dict[str, Any]:
    """With the scale after every window, and whether the window changed weights or the optimizer's state."""
    trainer = Trainer(rank, job)
    scales, changed = [], []
    for _ in range(WINDOWS):
        before = trained(trainer)
        trainer.train(1)
        scales.append(float(trainer.optimizer.get_loss_scale()))
        changed.append(not same(before, trained(trainer)))
    return {**trainer.result(), "scales": scales, "changed": changed}


def trained(trainer: Trainer) -> list[Any]:
    """What an update changes here."""
    inner = trainer.optimizer.optimizer
    masters = [parameter for group in inner.param_groups for parameter in group["params"]]
    return copy.deepcopy([*copies(trainer.bare), *masters, *(dict(inner.state[each]) for each in masters)])


def same(left: Any, right: Any) -> bool:
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    return torch.equal(left, right) if isinstance(left, Tensor) else bool(left == right)


@pytest.mark.parametrize(
    "job",
    [
        Job("amdp", 4, 4, **FP16),
        Job("amdp", 2, 2, **FP16),
        Job("chimera", 2, 2, **FP16),
        Job("amdp", 4, 4, **{key: {**value, **DISTRIBUTED.get(key, {})} for key, value in FP16.items()}),
    ],
    ids=["amdp, four stages", "amdp, two stages", "chimera", "amdp, distributed optimizer"],
)
def test_all_stages_skip_and_rescale_together(job: Job) -> None:
    found = run_ranks(job.world, train, job)
    [expected] = run_ranks(1, run_scaled_oracle, job)
    skipped = [bool(overflow) for overflow in expected["overflows"]]
    sizes = [len(held[stage]) for stage, held in enumerate(expected["weights"])]
    ends = list(accumulate(sizes))
    stages = [{bisect(ends, number) for number in overflow} for overflow in expected["overflows"]]
    assert any(0 < len(each) < job.pipeline for each in stages), "some stages alone would have gone on"
    assert any(after > before for before, after in pairwise(expected["scales"])), "the scale rises too"
    assert_equals_oracle(found, expected)
    for result in found:
        assert result["scales"] == expected["scales"]
        assert [norm is None for norm in result["norms"]] == skipped, "what the loop moves its learning rate by"
        assert result["changed"] == [not each for each in skipped]


class RelayedScale(LossScale):
    """Where every stage decides for itself, by what it is told of all: the same, one update after the other."""

    def __init__(self) -> None:
        super().__init__()
        self._updates: dict[int, int] = {}

    def after(self, updates: int) -> float:
        return self.scales[updates]

    def decide(self, parameters: list[nn.Parameter], total: float) -> None:
        """Leave a stage's optimizer without gradients where any stage's are not finite."""
        stage, broken = id(parameters[0]), not isfinite(total)
        self._updates[stage] = self._updates.get(stage, 0) + 1
        own = [number for number, each in enumerate(parameters) if each.grad is not None]
        if len(self.scales) == self._updates[stage]:
            self.overflows.append([])
            self.scales.append(self._next(broken))
        finite = all(parameters[number].grad.isfinite().all() for number in own)
        self.overflows[self._updates[stage] - 1].append(0 if finite else 1)
        for parameter in parameters:
            parameter.grad = None if broken else parameter.grad


def run_relayed_oracle(rank: int, job: Job) -> dict[str, Any]:
    scale = RelayedScale()
    more = {"decide": scale.decide, "loss_scale": scale.after}
    result = run_oracle(rank, job, [(WINDOWS, job.micro_batches)], nothing, **more)
    return {**result, "scales": scale.scales, "overflows": scale.overflows}


def train_relayed(rank: int, job: Job) -> dict[str, Any]:
    """With the scale after every call, and at the end."""
    trainer = Trainer(rank, job)
    scales = []
    for _ in range(WINDOWS):
        trainer.train(1)
        scales.append(float(trainer.optimizer.get_loss_scale()))
    result = trainer.result()
    return {**result, "scales": [*scales, float(trainer.optimizer.get_loss_scale())]}


RELAYED_FP16 = {key: {**value, **DISTRIBUTED.get(key, {})} for key, value in FP16.items()}


@pytest.mark.parametrize(
    ("stages", "size", "more", "tied"),
    [
        (2, 2, FP16, False),
        (2, 2, RELAYED_FP16, True),
        (3, 4, FP16, True),
        (3, 4, RELAYED_FP16, False),
        (4, 4, FP16, False),
        (4, 4, RELAYED_FP16, True),
    ],
    ids=["2-2", "2-2, distributed, tied", "3-4, tied", "3-4, distributed", "4-4", "4-4, distributed, tied"],
)
def test_all_stages_skip_and_rescale_without_a_meeting(
    stages: int, size: int, more: dict[str, Any], tied: bool
) -> None:
    """The scale is, micro-batch for micro-batch, that of the oracle, which divides every gradient by its own; so it
    does those of a tied embedding, which are scaled alike on both stages when their window closes."""
    ahead = FEEDBACK if stages == size else {}  # a step that is skipped leaves what its stage computes with
    job = Job({"name": "paci", "decisions": "relayed", **ahead}, stages, size, tied=tied, **more)
    found = run_ranks(job.world, train_relayed, job)
    [expected] = run_ranks(1, run_relayed_oracle, job)
    alone = [0 < sum(stages_hit) < job.pipeline for stages_hit in expected["overflows"]]
    assert any(alone), "some stages alone would have gone on"
    scales = expected["scales"]
    assert any(after > before for before, after in pairwise(scales)), "the scale rises too"
    assert_equals_oracle(found, expected)
    for result in found:
        late = 1 if result["stage"] else 0
        assert result["scales"] == [*scales[1 - late : WINDOWS + 1 - late], scales[WINDOWS]]


def train_with_other_windows(rank: int, job: Job, sizes: tuple[int, ...]) -> dict[str, Any]:
    """With an attempt in between at windows that are too short to relay anything."""
    trainer = Trainer(rank, job)
    for size in sizes:
        if size < job.pipeline <= job.micro_batches:
            with pytest.raises(ValueError, match=f"windows of at least {job.pipeline} micro-batches"):
                trainer.train(1, num_microbatches=size)
        else:
            trainer.train(2, num_microbatches=size)
    return {**trainer.result(), "decisions": trainer.hook.pipeline.schedule.decisions}


def test_windows_of_another_size_decide_as_those_before() -> None:
    """Those that grow past the number of stages, too; where they cannot, the job goes on as if nobody had asked."""
    job = Job("paci", 2, 2, **FP16)
    found, expected = (run_ranks(2, train_with_other_windows, job, sizes) for sizes in ((2, 1, 2), (2, 2)))
    assert_same(found, expected)
    assert [result["decisions"] for result in found] == ["relayed"] * 2
    short = replace(job, micro_batches=1)
    told = replace(short, schedule={"name": "paci", "decisions": "meeting"})
    found, expected = (run_ranks(2, train_with_other_windows, each, (1, 4)) for each in (short, told))
    assert_same(found, expected)
    assert [result["decisions"] for result in found] == ["meeting"] * 2


@pytest.mark.parametrize("schedule", ["paci", {"name": "paci", "decisions": "meeting"}])
def test_a_job_with_a_loss_scale_asks_for_exact_decisions(schedule: Any) -> None:
    """By itself; with windows too short to relay, in a meeting."""
    assert read_schedule(schedule, "here").make(4, 2, Needs(exact=True)).decisions == "meeting"
    relays = read_schedule(schedule, "here").make(4, 4, Needs(exact=True)).decisions
    assert relays == ("relayed" if schedule == "paci" else "meeting")
    with pytest.raises(ValueError, match="between windows of at least 4 micro-batches, with one in flight"):
        check_loss_scale(make("paci", 4, 3, decisions="relayed"), "--fp16", "--bf16")
