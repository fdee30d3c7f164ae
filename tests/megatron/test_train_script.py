"""The GPT job on megatron-core alone, its data, and the stand-ins for CUDA beside it."""

from __future__ import annotations

import re
import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from tests.processes import run_ranks

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import megatron_data
import megatron_on_cpu
import train_gpt_megatron

JOB = Path(train_gpt_megatron.__file__)
LENGTH, STEPS = 16, 4
MODEL = ["--layers", "2", "--hidden", "16", "--heads", "2", "--sequence-length", str(LENGTH), "--dropout", "0.1"]
RUN = ["--steps", str(STEPS), "--learning-rate", "0.01", "--warmup-steps", "0", "--micro-batch-size", "2"]
RUN += ["--log-every", "1", "--validate-every", str(STEPS), "--validation-batches", "2"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A text in which no two sequences are alike, and digits are all there is to learn."""
    path = tmp_path / "text"
    path.write_text(" ".join(map(str, range(1000))))
    return path


# The job

FEEDBACK = "feedback.json"
MIXED = ["--bf16", "--distributed-optimizer"]


def train(folder: Path, text: Path, *arguments: str) -> tuple[list[tuple[int, str, float]], str]:
    """Train on two processes; returns what was told of each step (its number, which loss, nats), and all the output."""
    launcher = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    places = ["--data", text, "--data-cache", folder / "cache", "--checkpoint-dir", folder / "checkpoints"]
    command = [*launcher, JOB, *MODEL, *RUN, *places, *arguments]
    done = subprocess.run([*map(str, command)], text=True, capture_output=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"finished {STEPS} steps" in done.stdout
    told = re.findall(r"^step (\d+): (loss|validation loss) ([\d.]+)", done.stdout, re.MULTILINE)
    return [(int(step), what, float(loss)) for step, what, loss in told], done.stdout


@pytest.mark.parametrize(
    ("options", "announced"),
    [
        ([], ""),
        (
            ["--pipeline-schedule", "paci", "--pipeline-schedule-options", FEEDBACK, *MIXED],
            "error feedback, x = z + 0.",
        ),
    ],
    ids=["stock", "paci"],
)
def test_a_job_learns_and_its_checkpoint_goes_on_as_it_did(
    tmp_path: Path, text: Path, options: list[str], announced: str
) -> None:
    (tmp_path / FEEDBACK).write_text('{"compensation": "error_feedback"}')
    options = [str(tmp_path / option) if option == FEEDBACK else option for option in options]
    through, printed = train(tmp_path, text, *options, *(["--save-every", "2"] if options else []))
    assert announced in printed and ("deadlock-free" in printed) == bool(announced)
    assert [told[:2] for told in through] == [*((step, "loss") for step in range(1, 5)), (4, "validation loss")]
    losses = [loss for _, what, loss in through if what == "loss"]
    assert abs(losses[0] - numpy.log(256)) < 0.2
    assert losses[-1] < losses[0] - 0.5 and through[-1][2] < losses[0] - 0.5

    if not options:
        return  # a checkpoint of stock has nothing that one of ours has not
    (tmp_path / "checkpoints" / "latest").write_text("step_0000002\n")
    assert train(tmp_path, text, *options, "--resume")[0] == through[2:]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"pipeline_parallel": 3}, "4 processes cannot be divided into replicas of 3 stages x 1 tensor"),
        ({"tensor_parallel": 8}, "4 processes cannot be divided into replicas of 1 stages x 8 tensor"),
        ({"layers": 6}, "--layers must be a multiple of the 4 stages, got 6"),
        ({"tensor_parallel": 4, "heads": 6}, "--tensor-parallel must divide 256 and --heads, got 4"),
    ],
)
def test_a_grid_that_does_not_fit_is_refused(changed: dict[str, int], said: str) -> None:
    given = {"pipeline_parallel": None, "tensor_parallel": 1, "layers": 8, "heads": 4}
    with pytest.raises(ValueError, match=said):
        train_gpt_megatron.stages(Namespace(**{**given, **changed}), processes=4)
    assert train_gpt_megatron.stages(Namespace(**{**given, "tensor_parallel": 2}), processes=4) == 2


# Its data


def read(rank: int, text: Path, cache: Path) -> list[Any]:
    """The first two micro-batches of training on this rank, one of two replicas, and one of validation."""
    training, validation = megatron_data.build_datasets([text], cache, LENGTH, seed=1)
    batches = megatron_data.training_micro_batches(training, 2, rank, 2, 0)
    before = torch.get_rng_state()
    found = [next(batches), next(batches), *megatron_data.validation_micro_batches(validation, 2, rank, 2, 1)]
    assert torch.equal(before, torch.get_rng_state()), "the layers' random numbers depend on the data"
    return [(batch["tokens"].tolist(), batch["labels"].tolist()) for batch in found]


def test_every_sample_is_a_piece_of_the_text_and_all_differ(tmp_path: Path, text: Path) -> None:
    content = text.read_bytes()
    boundary = len(content) - len(content) // 10
    per_rank = run_ranks(2, read, text, tmp_path / "cache")
    seen = []
    for batches in per_rank:
        for number, (tokens, labels) in enumerate(batches):
            part = content[:boundary] if number < 2 else content[boundary:]
            for row, wanted in zip(tokens, labels, strict=True):
                assert bytes([*row, wanted[-1]]) in part and row[1:] == wanted[:-1]
                seen.append(bytes(row))
    assert len(set(seen)) == len(seen) == 2 * 3 * 2


def test_the_text_is_written_once_as_megatron_reads_it(tmp_path: Path, text: Path) -> None:
    cache = tmp_path / "cache"
    folder = megatron_data.write_indexed([text], cache, LENGTH)
    parts = [IndexedDataset(str(folder / name)) for name in (megatron_data.TRAINING, megatron_data.VALIDATION)]
    assert [len(part) for part in parts] == [1, 1]
    assert b"".join(part[0].tobytes() for part in parts) == text.read_bytes()

    written = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert megatron_data.write_indexed([text], cache, LENGTH) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == written
    assert list(cache.iterdir()) == [folder], "something unfinished was left behind"

    text.write_text("another text of the same kind, which must not be taken for the first. " * 10)
    assert megatron_data.write_indexed([text], cache, LENGTH) != folder


@pytest.mark.parametrize(("micro_batches", "batch_size", "replicas"), [(4, 1, 3), (2, 2, 3), (1, 12, 1), (1, 4, 3)])
def test_a_step_has_the_same_samples_however_it_is_cut(micro_batches: int, batch_size: int, replicas: int) -> None:
    """Step 1 of steps of 12 samples, in a set of 20: the last 8 of them and then the first 4."""
    found: list[int] = []
    for replica in range(replicas):
        numbers = megatron_data.sample_numbers(20, batch_size, replica, replicas, first=micro_batches)
        found.extend(chain.from_iterable(islice(numbers, micro_batches)))
    assert sorted(found) == [0, 1, 2, 3, *range(12, 20)]


# The stand-ins for CUDA

WATCHED = (torch, torch.cuda, torch.Tensor, torch.nn.Module)


def snapshot() -> list[dict[str, Any]]:
    return [dict(vars(place)) for place in WATCHED]


def changes(before: Sequence[dict[str, Any]]) -> list[str]:
    """Names in :data:`WATCHED` that are something else than before."""
    pairs = zip(before, snapshot(), strict=True)
    return sorted({name for old, new in pairs for name in old.keys() | new if old.get(name) is not new.get(name)})


def with_cuda_and_without(rank: int) -> dict[str, Any]:
    before, is_available = snapshot(), torch.cuda.is_available
    torch.cuda.is_available = lambda: True
    with_cuda = [megatron_on_cpu.install(), megatron_on_cpu.install_for_megatron_lm()]
    torch.cuda.is_available = is_available
    untouched = changes(before)
    without = [megatron_on_cpu.install()]
    replaced, once = changes(before), snapshot()
    without.append(megatron_on_cpu.install())
    return {"with": (with_cuda, untouched), "without": without, "replaced": replaced, "twice": changes(once)}


def test_nothing_is_replaced_where_there_is_cuda_and_nothing_twice() -> None:
    (found,) = run_ranks(1, with_cuda_and_without)
    assert found["with"] == ([False, False], [])
    assert found["without"] == [True, True]
    assert {"zeros", "current_device", "set_rng_state", "cuda", "type"} <= set(found["replaced"])
    assert found["twice"] == []


def draw(rank: int) -> dict[str, Any]:
    megatron_on_cpu.install()
    tracker = get_cuda_rng_tracker()
    tracker.add("region", 7)
    torch.cuda.manual_seed(5)
    drawn = [torch.rand(1, device="cuda").item()]
    for _ in range(2):
        with tracker.fork("region"):
            drawn.append(torch.rand(1, device="cuda").item())
    drawn.append(torch.rand(1, device="cuda:0").item())
    parameter = torch.nn.Linear(1, 1).cuda().weight
    return {
        "drawn": drawn,
        "devices": [torch.cuda.current_device().type, torch.tensor([1.0], device="cuda", pin_memory=True).device.type],
        "types": [parameter.type(), parameter.bfloat16().type(), parameter.type(torch.float64).dtype],
        "kept": parameter.cuda() is parameter,
    }


def test_tensors_and_random_numbers_of_the_device_are_those_of_the_cpu() -> None:
    (found,) = run_ranks(1, draw)
    outside, region = (torch.rand(2, generator=torch.Generator().manual_seed(seed)).tolist() for seed in (5, 7))
    assert found["drawn"] == [outside[0], *region, outside[1]]
    assert found["devices"] == ["cpu", "cpu"] and found["kept"]
    assert found["types"] == ["torch.cuda.FloatTensor", "torch.cuda.BFloat16Tensor", torch.float64]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "which script?"),
        (["-m", "json.tool"], "which script?"),
        (["-m", "json.tool", "/no"], "no file /no"),
        (["-m", "amdp_plugin.megatron", "--record", "records", "/no.py", __file__], "no file /no.py"),
    ],
)
def test_a_script_that_is_not_there_is_named(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        megatron_on_cpu.main(arguments)
    printed = capsys.readouterr().err
    assert ended.value.code == megatron_on_cpu.EXIT_USAGE and said in printed and megatron_on_cpu.USAGE in printed
