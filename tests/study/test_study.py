"""A study: validation at one version of all stages, figures by hand, going on where it was stopped, refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from torch import nn

from amdp_plugin.cli import main
from amdp_plugin.runtime.serial import SerialPipeline
from amdp_plugin.study import trial as trials
from amdp_plugin.study.problem import load
from amdp_plugin.study.runner import Store, run_all
from amdp_plugin.study.summary import summarize, table
from amdp_plugin.study.trial import Outcome, Setting, Trial, Variant, run

from .tiny import squares

MODEL = f"{Path(__file__).parent / 'tiny.py'}:squares"
PACI = Variant("paci")
SETTING = Setting(MODEL, stages=4, micro_batches=2, warm_up=2, clip=1.0)


def test_layers_are_cut_into_stages() -> None:
    problem, x = squares(1), torch.randn(2, 4)
    assert problem.stages(4) == list(problem.layers)
    assert [list(stage) for stage in problem.stages(2)] == [list(problem.layers[:2]), list(problem.layers[2:])]  # type: ignore[call-overload]
    for number in (1, 2, 3, 4):
        assert torch.equal(nn.Sequential(*problem.stages(number))(x), nn.Sequential(*problem.layers)(x))
    with pytest.raises(ValueError, match="4 layers make no 5 stages"):
        problem.stages(5)


@pytest.mark.parametrize("schedule", ["1f1b", "paci", "amdp", "pipemare", "xpipe"])
def test_all_stages_are_validated_at_the_same_version(schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a long run says at step 6 is what a run of 6 steps ends with, though its stages get there one by one."""
    monkeypatch.setattr(trials, "rate", lambda step, steps, warm_up: 1.0)
    variant = Variant(schedule)
    long = run(SETTING, Trial(variant, "sgd", 0.05, 1, 24))
    short = run(SETTING, Trial(variant, "sgd", 0.05, 1, 6))
    assert [step for step, _ in long.validation] == list(range(2, 25, 2))
    assert dict(long.validation)[6] == short.validation[-1][1] and short.validation[-1][0] == 6
    assert long.losses[:6] == short.losses
    assert len(set(dict(long.validation).values())) == 12


def test_the_last_validation_is_of_what_was_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[SerialPipeline] = []

    class Kept(SerialPipeline):
        def __init__(self, *arguments: object, **named: object) -> None:
            super().__init__(*arguments, **named)  # type: ignore[arg-type]
            made.append(self)

    monkeypatch.setattr(trials, "SerialPipeline", Kept)
    outcome = run(SETTING, Trial(PACI, "adamw", 0.01, 3, 5))
    model = nn.Sequential(*made[0].stages)
    with torch.no_grad():
        losses = [float(nn.functional.mse_loss(model(x), y)) for x, y in squares(3).validation]
    assert outcome.validation[-1] == (5, sum(losses) / 2)


def test_the_learning_rate_warms_up_and_falls() -> None:
    from amdp_plugin.study.optimizers import rate

    assert [rate(step, 102, 2) for step in (0, 1, 2)] == [0.5, 1.0, 1.0]
    assert rate(52, 102, 2) == pytest.approx(0.55)
    assert rate(102, 102, 2) == pytest.approx(0.1)


def test_muon_takes_the_hidden_matrices() -> None:
    from amdp_plugin.study.optimizers import muon

    parameters = [nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(256, 4)), nn.Parameter(torch.ones(4))]
    optimizer = muon(parameters, 0.02)
    assert [group["lr"] for group in optimizer.param_groups] == [0.02, 0.001]
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 2]
    before = [parameter.detach().clone() for parameter in parameters]
    for parameter in parameters:
        parameter.grad = torch.rand_like(parameter)
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # as the schedule of the learning rate sets it
    optimizer.step()
    assert all(torch.equal(parameter, value) for parameter, value in zip(parameters, before, strict=True))


def outcome(validation: list[tuple[int, float]], forwards_per_step: float) -> Outcome:
    return Outcome([1.0], validation, 128, forwards_per_step)


def test_figures_by_hand() -> None:
    bare, fed = Variant("paci"), Variant("paci", (("compensation", "error_feedback"),))
    reference = Variant("1f1b")
    found = {
        Trial(reference, "adamw", 0.1, 1, 10): outcome([(5, 3.0), (10, 2.0)], 20.0),
        Trial(reference, "adamw", 0.1, 2, 10): outcome([(5, 3.0), (10, 2.2)], 20.0),
        Trial(reference, "adamw", 0.2, 1, 10): outcome([(5, 3.0), (10, 2.0)], 20.0),
        Trial(bare, "adamw", 0.1, 1, 10): outcome([(5, 3.5), (10, 3.1)], 10.0),
        Trial(fed, "adamw", 0.1, 1, 10): outcome([(5, 2.6), (10, 2.35)], 10.0),
        Trial(fed, "adamw", 0.1, 1, 20): outcome([(10, 2.6), (20, 1.6)], 10.0),
    }
    rows = {(row.variant, row.learning_rate, row.steps): row for row in summarize(found, reference, 10)}
    first = rows[reference, 0.1, 10]
    assert first.losses == (2.0, 2.2) and first.loss == pytest.approx(2.1) and not first.best
    assert rows[reference, 0.2, 10].best and rows[reference, 0.2, 10].time == 1.0
    # Each at its best: 1f1b's at a rate of 0.2 ends with 2.0.
    assert rows[bare, 0.1, 10].above == pytest.approx(1.1) and rows[bare, 0.1, 10].time is None
    assert rows[fed, 0.1, 10].above == pytest.approx(0.35)
    assert rows[fed, 0.1, 10].recovered == pytest.approx(1 - 0.35 / 1.1)
    longer = rows[fed, 0.1, 20]
    # 2.6 falls to 1.6 in 10 steps, so that 2.0 is reached at step 16, of 10 forwards; the reference takes 10 of 20.
    assert longer.above == pytest.approx(-0.4) and longer.time == pytest.approx(0.8)
    line = "| paci:compensation=error_feedback | adamw | 0.1 (best) | 20 | 1.600 | one seed | -0.400 | - | 0.80 |"
    assert line in table(rows.values()).splitlines()


def test_a_variant_is_read_with_what_all_schedules_take() -> None:
    read = Variant.read("paci:extra_in_flight=1,compensation=error_feedback,strength=0.5")
    assert read.options == (("extra_in_flight", 1), ("compensation", "error_feedback"), ("strength", 0.5))
    assert str(read) == "paci:extra_in_flight=1,compensation=error_feedback,strength=0.5"


def test_what_is_there_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [Trial(PACI, "sgd", 0.05, seed, 4) for seed in (1, 2, 3)]
    kept = outcome([(4, 7.0)], 1.0)
    Store(tmp_path, SETTING).put(wanted[1], kept)
    found = run_all(SETTING, wanted, tmp_path, processes=1)
    assert found[wanted[1]].validation == [(4, 7.0)]
    assert found[wanted[0]].losses == run(SETTING, wanted[0]).losses
    monkeypatch.setattr("amdp_plugin.study.runner._run", None)  # nothing is left to do
    assert run_all(SETTING, wanted, tmp_path, processes=1)[wanted[0]] == found[wanted[0]]
    other = Setting(MODEL, stages=2, micro_batches=2, warm_up=2, clip=1.0)
    assert Store(tmp_path, other).get(wanted[1]) is None


def test_a_study_that_is_killed_goes_on_nowhere(tmp_path: Path) -> None:
    told = ["study", "--stages", "2", "--steps", "5000", "--model", MODEL, "--processes", "2", "--out", str(tmp_path)]
    study = subprocess.Popen([sys.executable, "-m", "amdp_plugin.cli", *told], stderr=subprocess.PIPE, text=True)
    assert study.stderr is not None
    seen = ""
    while " seed 1 " not in seen:  # the progress bar names what is being run
        seen += study.stderr.read(1)
    workers = psutil.Process(study.pid).children(recursive=True)
    study.kill()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert workers and not alive


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = ["study", "--schedules", "1f1b", "paci", "--optimizers", "sgd", "adamw", "--learning-rates", "sgd:0.05,0.1"]
    told += ["--stages", "2", "--micro-batches", "2", "--steps", "6", "--seeds", "2", "--model", MODEL]
    told += ["--at-equal-time", "--processes", "1", "--out", str(tmp_path / "out")]
    assert main(told) == 0
    text = (tmp_path / "out" / "table.md").read_text()
    assert capsys.readouterr().out.startswith(text)
    rows = json.loads((tmp_path / "out" / "result.json").read_text())["rows"]
    # 1f1b takes (M + N - 1) / M = 1.5 times as long.
    assert [(row["variant"], row["optimizer"], row["learning_rate"], row["steps"]) for row in rows] == [
        (variant, optimizer, learning_rate, steps)
        for variant, steps in (("1f1b", 6), ("paci", 6), ("paci", 9))
        for optimizer, learning_rate in (("sgd", 0.05), ("sgd", 0.1), ("adamw", 0.001))
    ]
    assert (tmp_path / "out" / "study.png").read_bytes().startswith(b"\x89PNG")


def test_schedules_that_run_freely_are_compensated(tmp_path: Path) -> None:
    """Extrapolated weights are a compensation already."""
    told = ["study", "--schedules", "1f1b", "paci", "spectrain", "--compensation", "none", "error_feedback"]
    told += ["--stages", "2"]
    told += ["--micro-batches", "2", "--steps", "6", "--seeds", "1", "--model", MODEL, "--optimizers", "sgd"]
    told += ["--out", str(tmp_path), "--processes", "1"]
    assert main(told) == 0
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert [row["variant"] for row in rows] == ["1f1b", "paci", "paci:compensation=error_feedback", "spectrain"]
    assert len({row["loss"] for row in rows}) == 4


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--schedules", "pacy"], "unknown schedule 'pacy'"),
        (["--schedules", "paci:extra=1"], "has no option extra"),
        (["--schedules", "paci:extra"], "NAME:key=value"),
        (["--schedules", "paci:strength=much"], "--schedules paci:strength=much: could not convert"),
        (["--optimizers", "adam"], "unknown adam; there are adamw, muon, sgd"),
        (["--learning-rates", "muon:0.1"], "'muon' is none of --optimizers adamw"),
        (["--learning-rates", "adamw:much"], "OPTIMIZER:RATE,RATE"),
        (["--learning-rates", "adamw:0,-1"], "rates above 0; got 'adamw:0,-1'"),
        (["--learning-rates", "adamw:nan"], "rates above 0; got 'adamw:nan'"),
        (["--steps", "0"], "--steps is at least 1"),
        (["--processes", "0"], "--processes is at least 1, got 0"),
        (["--warm-up", "-1"], "--warm-up is at least 0, got -1"),
        (["--clip", "nan"], "--clip is at least 0, got nan"),
        (["--flush-first", "-1"], "flush_first cannot be -1"),
        (["--schedules"], "--schedules needs one value or more after it"),
        (["--schedules", "--steps", "1"], "--schedules needs one value or more after it"),
        (["--device", "tpu"], "--device tpu cannot be used: "),
        (["--stages", "3", "--schedules", "amdp"], "need an even number of stages, got 3"),
        (["--schedules", "xpipe", "--optimizers", "muon"], "--schedules xpipe with --optimizers muon: no smooth"),
    ],
)
def test_mistakes_are_named(
    wrong: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["study", "--model", MODEL, "--out", str(tmp_path / "out"), *wrong]) != 0
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("where", "said"),
    [("tiny.py", "FILE:FUNCTION"), ("missing.py:squares", "there is no file missing.py"), (f"{MODEL}s", "no function")],
)
def test_models_that_are_not_there(where: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        load(where)
