"""What users of DeepSpeed's engine know, under a schedule."""

from __future__ import annotations

import itertools
import multiprocessing
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.utils import logger
from torch import Tensor

import amdp_plugin
from amdp_plugin.runtime import pipeline as pipeline_module
from tests.processes import outcomes, run_ranks
from tests.runtime.models import OPTIMIZERS, data, loss
from tests.synchronizations import Reads

from .jobs import (
    Job,
    assert_equals_oracle,
    assert_same,
    assert_same_weights,
    build_layers,
    configuration,
    finish,
    make_engine,
    make_oracle,
    oracle,
    run,
    stream,
    weights,
)
from .test_oracle import FEEDBACK


def train(engine: Any, batches: Any, windows: int) -> list[float]:
    return [float(engine.train_batch(batches)) for _ in range(windows)]


# The monitor and the timers


def read_events(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every series that DeepSpeed's CSV monitor wrote."""
    series = {}
    for path in directory.rglob("*.csv"):
        rows = [line.split(",") for line in path.read_text().splitlines()[1:] if line]
        series[path.stem] = [(int(float(step)), float(value)) for step, value in rows]
    return series


def test_monitor_gets_what_stock_writes_and_the_pipeline_s_own(tmp_path: Path) -> None:
    def monitored(name: str) -> dict[str, Any]:
        return {"csv_monitor": {"enabled": True, "output_path": str(tmp_path / name), "job_name": "job"}}

    job = Job("1f1b", 2, 2, config=monitored("ours"))
    found, expected = run(job), run(replace(job.stock, config=monitored("stock")))
    assert_same(found, expected)
    ours, stock = read_events(tmp_path / "ours"), read_events(tmp_path / "stock")
    assert "Train_Samples_train_loss" in stock
    own = {"Train_Pipeline_largest_gap", "Train_Pipeline_waiting_share"}
    assert ours.keys() == stock.keys() | own
    assert {key: ours[key] for key in stock} == stock
    assert [value for _, value in ours["Train_Samples_train_loss"]] == pytest.approx(found[0]["losses"])
    assert [value for _, value in ours["Train_Pipeline_largest_gap"]] == [0.0] * job.windows
    assert all(0.0 <= value <= 1.0 for _, value in ours["Train_Pipeline_waiting_share"])


@pytest.mark.parametrize("job", [Job("paci"), Job("1f1b"), Job("amdp", 4, 4)], ids=lambda job: job.schedule)
def test_wall_clock_breakdown(job: Job) -> None:
    timed = replace(job, config={"wall_clock_breakdown": True, "steps_per_print": 1})
    assert_same(run(timed), run(job))


@pytest.mark.parametrize("job", [Job("paci", 4, 2), Job("amdp", 4, 4)], ids=lambda job: job.schedule)
def test_loss_is_the_same_on_every_rank(job: Job) -> None:
    found = run(job)
    assert all(result["losses"] == found[0]["losses"] for result in found)
    assert len(set(found[0]["losses"])) > 1


# Where the data comes from


class Samples(torch.utils.data.Dataset):
    """The rows of the first micro-batches, one by one."""

    def __init__(self, micro_batches: int) -> None:
        self._rows = [row for x, y in data(count=micro_batches) for row in zip(x, y, strict=True)]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self._rows[index]


def train_on_a_dataset(rank: int, job: Job, micro_batches: int) -> dict[str, Any]:
    multiprocessing.current_process()._config["daemon"] = False  # DeepSpeed's loader has processes of its own
    engine = make_engine(rank, job, training_data=Samples(micro_batches))
    return finish(engine, train(engine, None, job.windows))


@pytest.mark.parametrize(("name", "stages", "size"), [("paci", 3, 2), ("amdp", 8, 4)])
def test_training_data_given_to_initialize(name: str, stages: int, size: int) -> None:
    """It repeats for ever, as in DeepSpeed. Eight stages of amdp are read on the ranks 0, 3, 4 and 7."""
    # No dropout: the loader draws from the same random numbers.
    job = Job(name, stages, size, kind="exact", windows=6)
    found = run_ranks(stages, train_on_a_dataset, job, 8)
    pipeline = make_oracle(job)
    losses = pipeline.train(itertools.cycle(list(data(count=8))), job.windows)
    for stage, result in enumerate(found):
        assert result["losses"] == losses
        assert_same_weights(result["weights"][stage], pipeline.stages[stage].state_dict(), f"stage {stage}")


def test_training_data_is_read_as_in_stock() -> None:
    job = Job("1f1b", 3, 2, kind="exact", windows=6)
    assert_same(run_ranks(3, train_on_a_dataset, job, 8), run_ranks(3, train_on_a_dataset, job.stock, 8))


def train_without_data(rank: int, job: Job) -> None:
    make_engine(rank, job).train_batch()


def train_by_batch_fn(rank: int, job: Job) -> dict[str, Any]:
    """No iterator: ``batch_fn`` brings the micro-batches, as where one tensor-parallel rank reads for all."""
    engine = make_engine(rank, job)
    batches = stream(engine, job)
    engine.set_batch_fn(lambda batch: next(batches) if batch is None else batch)
    return finish(engine, train(engine, None, job.windows))


def test_data_by_batch_fn_alone() -> None:
    job = Job("amdp", 4, 4)
    assert_same(run_ranks(4, train_by_batch_fn, job), run(job))


def exit_after(rank: int, job: Job, at_rest: bool) -> list[str]:
    """Which engines are seen out when the process ends between two windows, or within one."""
    engine = make_engine(rank, job)
    train(engine, stream(engine, job), 2)
    engine.pipeline._at_rest = at_rest
    seen: list[str] = []
    quiesce = engine.executor.quiesce
    engine.executor.quiesce = lambda updates: seen.append(f"quiesced, updates: {updates}")
    pipeline_module._close(weakref.ref(engine.pipeline))
    quiesce()
    return seen


def test_a_process_that_fails_within_a_window_ends_at_once() -> None:
    """Its peers wait for it: it must not wait for them. One that ends between two makes no update: the script may have
    destroyed the groups that an optimizer wants."""
    job = Job("paci", 2, 2)
    assert run_ranks(2, exit_after, job, True) == [["quiesced, updates: False"]] * 2
    assert run_ranks(2, exit_after, job, False) == [[]] * 2


def test_no_data_at_all_is_an_error() -> None:
    job = Job({"name": "paci", "timeout_seconds": 2.0}, 2, 2)
    for good, text in outcomes(2, train_without_data, job):
        assert not good
        assert "there is no data: pass train_batch(data_iter=...)" in text or "PipelineStallError" in text


def train_with_other_window(rank: int, job: Job, size: int) -> dict[str, Any]:
    """Three windows of ``job.size``, then three of ``size``, from one iterator."""
    engine = make_engine(rank, job)
    batches = stream(engine, job)
    losses = train(engine, batches, 3)
    engine.set_train_batch_size(engine.train_batch_size() // job.size * size)
    return finish(engine, losses + train(engine, batches, 3))


@pytest.mark.parametrize(
    ("name", "stages", "size", "other"),
    [
        ("paci", 3, 2, 4),
        ("paci", 3, 4, 1),
        ("amdp", 4, 4, 8),
        ("amdp", 4, 8, 2),
        ({"name": "paci", **FEEDBACK}, 3, 2, 4),
        ({"name": "amdp", **FEEDBACK}, 4, 8, 4),
    ],
)
def test_window_that_changes_its_size(name: Any, stages: int, size: int, other: int) -> None:
    """No micro-batch is lost or used twice; error feedback goes on with the staleness of the new window."""
    job = Job(name, stages, size)
    found = run_ranks(stages, train_with_other_window, job, other)
    pipeline, batches = make_oracle(job), data()
    losses = pipeline.train(batches, 3)
    pipeline.schedule = make_oracle(replace(job, size=other)).schedule
    losses += pipeline.train(batches, 3)
    for result in found:  # the engine's measured gap begins anew with the new program
        assert result["losses"] == losses
        for stage, held in result["weights"].items():
            assert_same_weights(held, pipeline.stages[stage].state_dict(), f"stage {stage}")


def train_with_a_window_that_does_not_divide(rank: int, job: Job) -> dict[str, Any]:
    """As :func:`jobs.train`, with an attempt in between."""
    engine = make_engine(rank, job)
    batches = stream(engine, job)
    losses = train(engine, batches, 3)
    with pytest.raises(ValueError, match="5 micro-batches do not divide over 2 directions; use 4 or 6"):
        engine.set_train_batch_size(engine.train_batch_size() // job.size * 5)
    return finish(engine, losses + train(engine, batches, job.windows - 3))


def test_window_that_does_not_divide_changes_nothing() -> None:
    job = Job("amdp", 4, 4)
    assert_same(run_ranks(4, train_with_a_window_that_does_not_divide, job), run(job))


def test_window_that_changes_its_size_as_in_stock() -> None:
    job = Job("1f1b", 3, 2)
    assert_same(run_ranks(3, train_with_other_window, job, 4), run_ranks(3, train_with_other_window, job.stock, 4))


# Shapes


def ragged() -> Iterator[tuple[Tensor, Tensor]]:
    """Micro-batches of one to four rows."""
    for number, (x, y) in enumerate(data()):
        rows = 1 + number * 7 % 4
        yield x.repeat(2, 1)[:rows], y.repeat(2, 1)[:rows]


def train_on_ragged(rank: int, job: Job) -> dict[str, Any]:
    engine = make_engine(rank, job)
    return finish(engine, train(engine, ragged(), job.windows))


@pytest.mark.parametrize("kind", ["plain", "masked"])
@pytest.mark.parametrize(("name", "stages", "size"), [("paci", 3, 2), ("amdp", 4, 4)])
def test_dynamic_shapes(name: str, stages: int, size: int, kind: str) -> None:
    job = Job(name, stages, size, kind=kind, module={"dynamic_shape": True})
    found = run_ranks(stages, train_on_ragged, job)
    pipeline = make_oracle(job)
    losses = pipeline.train(ragged(), job.windows)
    assert_equals_oracle(found, pipeline, losses)


def taller(count: int) -> Iterator[tuple[Tensor, Tensor]]:
    return ((x.repeat(2, 1), y.repeat(2, 1)) for x, y in data(count=count))


def train_on_taller(rank: int, job: Job) -> dict[str, Any]:
    """Windows of one shape to the end of their data, and then of another."""
    engine = make_engine(rank, job)
    losses = train(engine, data(count=3 * job.size), 3)
    if job.schedule is not None:
        with pytest.raises(StopIteration):
            engine.train_batch()
    engine.reset_activation_shape()
    losses += train(engine, taller(3 * job.size), 3)
    return finish(engine, losses)


@pytest.mark.parametrize("name", ["paci", "1f1b"])
def test_reset_of_the_activation_shape(name: str) -> None:
    job = Job(name, 3, 2)
    found = run_ranks(3, train_on_taller, job)
    pipeline = make_oracle(job)
    losses = pipeline.train(data(), 3)
    losses += pipeline.train(taller(6), 3)
    assert_equals_oracle(found, pipeline, losses)
    if name == "1f1b":
        assert_same(found, run_ranks(3, train_on_taller, job.stock))


# Modules of the user


class Reporting(PipelineModule):
    """Has losses beside the one that is trained on."""

    def get_additional_losses(self) -> dict[str, Tensor] | None:
        number = torch.tensor(float(self.micro_offset))
        return {"offset": number, "square": number**2}


def train_reporting(rank: int, job: Job) -> list[dict[str, float]]:
    deepspeed.init_distributed("gloo")
    module = Reporting(build_layers(job), num_stages=job.stages, loss_fn=loss, partition_method="uniform")
    optimizer = OPTIMIZERS["sgd"](list(module.parameters()))
    engine, *_ = amdp_plugin.initialize(model=module, config=configuration(job), optimizer=optimizer)
    batches, reports = stream(engine, job), []
    for _ in range(3):
        engine.train_batch(batches)
        reports.append({name: float(value) for name, value in engine.get_additional_losses().items()})
    return reports


def test_additional_losses() -> None:
    """The mean over the micro-batches of the window, on every rank, as in stock."""
    job = Job("1f1b", 3, 2)
    expected = run_ranks(3, train_reporting, job.stock)
    assert expected[0][1] == {"offset": 3.5, "square": 12.5}
    assert run_ranks(3, train_reporting, job) == expected
    assert run_ranks(3, train_reporting, replace(job, schedule="paci")) == expected
    job = Job("amdp", 4, 4)
    found, expected = run_ranks(4, train_reporting, job), run_ranks(4, train_reporting, job.stock)
    assert found == expected


def guests_at_the_start(rank: int, job: Job) -> dict[int, dict[str, Tensor]]:
    deepspeed.init_distributed("gloo")
    torch.manual_seed(rank)
    layers = [LayerSpec(torch.nn.Linear, 8, 8), LayerSpec(torch.nn.BatchNorm1d, 8)] * 4
    module = PipelineModule(layers, num_stages=4, loss_fn=loss, partition_method="uniform")
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    before = torch.get_rng_state()
    optimizer = OPTIMIZERS["sgd"](list(module.parameters()))
    engine, *_ = amdp_plugin.initialize(model=module, config=configuration(job), optimizer=optimizer)
    assert torch.equal(torch.get_rng_state(), before), "building guests draws no random numbers"
    return weights(engine)


def test_guests_begin_with_the_weights_of_their_homes() -> None:
    """Whatever each rank's own generator made of the layer specs."""
    found = run_ranks(4, guests_at_the_start, Job("amdp", 4, 4))
    assert not torch.equal(found[0][0]["0.weight"], found[1][1]["2.weight"])
    for rank, held in enumerate(found):
        assert list(held) == [rank, 3 - rank]
        assert_same_weights(held[3 - rank], found[3 - rank][3 - rank], f"rank {rank}")


def train_wide(rank: int, job: Job) -> None:
    deepspeed.init_distributed("gloo")
    layers = [LayerSpec(torch.nn.Linear, 1024, 1024, bias=False) for _ in range(4)]
    module = PipelineModule(layers, num_stages=4, loss_fn=loss, partition_method="uniform")
    optimizer = OPTIMIZERS["sgd"](list(module.parameters()))
    amdp_plugin.initialize(model=module, config=configuration(job), optimizer=optimizer)


def test_memory_in_numbers(capfd: pytest.CaptureFixture[str]) -> None:
    """4 MiB a stage: two weights, two sums of gradients, a buffer to receive into and one to send from."""
    run_ranks(4, train_wide, Job("amdp", 4, 4))
    told = capfd.readouterr().out
    assert "weights        8.0 (4.0)  8.0 (4.0)  8.0 (4.0)  8.0 (4.0)" in told
    assert "gradients      8.0 (4.0)  8.0 (4.0)  8.0 (4.0)  8.0 (4.0)" in told
    assert "exchange       8.0  8.0  8.0  8.0" in told


def test_one_stage() -> None:
    """A pipeline of one rank needs no messages, and no schedule differs."""
    job = Job("paci", 1, 3, layers_per_stage=2)
    found = run(job)
    assert_equals_oracle(found, *oracle(job))
    assert_same(found, run(job.stock))


# A loss that is no number


def train_with_a_broken_label(rank: int, job: Job, broken: int) -> list[str]:
    """What the engine warns of, when the label of micro-batch ``broken`` is not a number. No loss is looked for on the
    device then, which has been given more since."""
    warned: list[str] = []
    logger.warning = warned.append  # in this process only
    with Reads() as reads:
        engine = make_engine(rank, job)
        batches = ((x, y * float("nan") if index == broken else y) for index, (x, y) in enumerate(data()))
        train(engine, batches, 3)
        finish(engine, [])
    assert not [place for place in reads.counts if place.startswith("losses.py")], reads.counts
    return [message for message in warned if "the loss of micro-batch" in message]


@pytest.mark.parametrize(("job", "stage"), [(Job("paci"), 1), (Job("amdp", 4, 4), 3)], ids=["paci", "amdp"])
def test_a_broken_loss_names_its_micro_batch_and_stage(job: Job, stage: int) -> None:
    """Number 4 is of the first direction, whose last stage is on the last rank."""
    *others, last = run_ranks(job.stages, train_with_a_broken_label, job, 4)
    assert last[0] == f"the loss of micro-batch 4 is nan (stage {stage})"
    assert all("micro-batch 4 " not in message for messages in others for message in messages)
