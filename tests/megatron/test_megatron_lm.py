"""Megatron-LM's own pretrain_gpt.py, unmodified, on the CPU. Runs where MEGATRON_LM_PATH names a checkout.

    MEGATRON_LM_PATH=~/Megatron-LM pytest tests/megatron/test_megatron_lm.py

It needs ``six``, ``regex`` and ``pyyaml``, which Megatron-LM imports and no package of ours does.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest

from amdp_plugin.compare.recording import OURS, STOCK, read_records

ROOT = Path(__file__).parents[2]
CHECKOUT = os.environ.get("MEGATRON_LM_PATH")
MISSING = [name for name in ("six", "regex", "yaml") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.skipif(CHECKOUT is None, reason="MEGATRON_LM_PATH names no checkout of Megatron-LM"),
    pytest.mark.skipif(bool(MISSING), reason=f"Megatron-LM imports {', '.join(MISSING)}"),
]
ITERATIONS = 20
ARGUMENTS = shlex.split("""
    --num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 64 --max-position-embeddings 64
    --micro-batch-size 1 --global-batch-size 8 --lr 1e-3 --min-lr 1e-4 --lr-decay-style constant --clip-grad 1.0
    --train-iters 20 --mock-data --tokenizer-type NullTokenizer --vocab-size 1023 --split 90,5,5 --num-workers 0
    --transformer-impl local --distributed-backend gloo --use-cpu-initialization
    --no-masked-softmax-fusion --no-bias-gelu-fusion --no-bias-dropout-fusion --no-persist-layer-norm
    --no-gradient-accumulation-fusion --no-async-tensor-model-parallel-allreduce --no-rope-fusion
    --attention-dropout 0.1 --hidden-dropout 0.1 --untie-embeddings-and-output-weights
    --log-interval 1 --eval-interval 10 --eval-iters 2 --save-interval 10 --seed 1234
""")
GRIDS = {"PP2": (2, 2, 1), "PP4": (4, 4, 1), "PP2 TP2": (4, 2, 2), "PP2 DP2": (4, 2, 1)}
"""Processes, pipeline and tensor parallel sizes."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkout without its core: the installed one is compiled."""
    assert CHECKOUT is not None
    made, checkout = tmp_path_factory.mktemp("megatron_lm"), Path(CHECKOUT).resolve()
    (made / "megatron").mkdir()
    for source in [*checkout.glob("*.py"), *checkout.glob("megatron/*")]:
        if source.name != "core":
            (made / source.relative_to(checkout)).symlink_to(source)
    return made


def run(
    folder: Path, grid: str, schedule: str, *more: str, options: Sequence[str | Path] = (), without: Sequence[str] = ()
) -> str:
    """The output of a job that ended well; ``options`` are the launcher's, ``without`` are arguments to leave out."""
    processes, pipeline, tensor = GRIDS[grid]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    stand_ins = ROOT / "scripts" / "megatron_on_cpu.py"
    script = [stand_ins, "-m", "amdp_plugin.megatron", *options, folder / "pretrain_gpt.py"]
    sizes = ["--pipeline-model-parallel-size", str(pipeline), "--tensor-model-parallel-size", str(tensor)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")])
    arguments = [argument for argument in ARGUMENTS if argument not in without]
    command = [*launcher, *script, *arguments, *sizes, "--pipeline-schedule", schedule, *more]
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def losses(output: str) -> dict[int, str]:
    """What the job printed of every iteration: the loss alone, which every stage's norm but the last one's is not."""
    found = re.findall(r"iteration +(\d+)/ +\d+ .*?lm loss: ([^ ]+) ", output)
    return {int(number): loss for number, loss in found}


def evaluations(output: str) -> list[str]:
    return re.findall(r"validation loss at iteration \d+ .*?lm loss value: ([^ ]+) ", output)


@cache
def stock(folder: Path, grid: str) -> str:
    return run(folder, grid, "stock")


@pytest.mark.parametrize("grid", GRIDS)
def test_1f1b_is_stock(folder: Path, grid: str) -> None:
    expected, found = stock(folder, grid), run(folder, grid, "1f1b")
    assert sorted(losses(found)) == list(range(1, ITERATIONS + 1))
    assert losses(found) == losses(expected)
    assert evaluations(found) == evaluations(expected) and len(evaluations(found)) == 4


@pytest.mark.parametrize("schedule", ["paci", "amdp"])
@pytest.mark.parametrize("grid", GRIDS)
def test_twenty_iterations_with_evaluation_and_save(folder: Path, grid: str, schedule: str, tmp_path: Path) -> None:
    output = run(folder, grid, schedule, "--save", str(tmp_path))
    found, expected = losses(output), losses(stock(folder, grid))
    assert sorted(found) == list(range(1, ITERATIONS + 1)) and len(evaluations(output)) == 4
    # The first window is forwarded and backwarded before any update. With tensor parallelism its dropout is that of
    # other streams under amdp, else nothing differs.
    if schedule == "paci":
        assert found[1] == expected[1]
    assert all(math.isfinite(float(loss)) for loss in found.values())
    assert float(found[ITERATIONS]) < float(found[1]) - 0.5
    assert f"{schedule}: {GRIDS[grid][1]} stages" in output
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == str(ITERATIONS)


@pytest.mark.parametrize(("schedule", "grid"), [("paci", "PP2"), ("amdp", "PP4")])
@pytest.mark.parametrize("form", ["torch", "torch_dist"])
def test_a_resumed_job_goes_on_as_if_it_had_not_ended(
    folder: Path, schedule: str, grid: str, form: str, tmp_path: Path
) -> None:
    went_on = losses(run(folder, grid, schedule, "--ckpt-format", form, "--save", str(tmp_path / "whole")))
    shutil.copytree(tmp_path / "whole" / "iter_0000010", tmp_path / "half" / "iter_0000010")
    (tmp_path / "half" / "latest_checkpointed_iteration.txt").write_text("10")
    resumed = losses(run(folder, grid, schedule, "--ckpt-format", form, "--load", str(tmp_path / "half")))
    # What Megatron prints for the second iteration after a load is the mean with the first.
    later = [11, *range(13, ITERATIONS + 1)]
    assert [resumed[number] for number in later] == [went_on[number] for number in later]


UNTIED = "--untie-embeddings-and-output-weights"


def test_a_tied_embedding_with_the_distributed_optimizer(folder: Path) -> None:
    """Whose parts are exchanged between two replicas of each stage, and reduced within a backward where nothing is
    tied."""
    more = ("--bf16", "--use-distributed-optimizer", "--overlap-grad-reduce")
    found, expected = (losses(run(folder, "PP2 DP2", name, *more, without=[UNTIED])) for name in ("paci", "stock"))
    assert found[1] == expected[1] and float(found[ITERATIONS]) < float(found[1]) - 0.3


@pytest.mark.parametrize(("grid", "more"), [("PP4", ()), ("PP2 TP2", ("--bf16",))])
def test_a_tied_embedding_under_paci(folder: Path, grid: str, more: Sequence[str], tmp_path: Path) -> None:
    """It learns, is evaluated, saved and resumed as if it had not ended; stock goes on from what it saved."""
    quiet = ("--attention-dropout", "0", "--hidden-dropout", "0", "--ckpt-format", "torch_dist", *more)
    output = run(folder, grid, "paci", *quiet, "--save", str(tmp_path / "whole"), without=[UNTIED])
    went_on, expected = losses(output), losses(run(folder, grid, "stock", *quiet, without=[UNTIED]))
    assert went_on[1] == expected[1] and float(went_on[ITERATIONS]) < float(went_on[1]) - 0.5
    assert "tied weight" in output
    shutil.copytree(tmp_path / "whole" / "iter_0000010", tmp_path / "half" / "iter_0000010")
    (tmp_path / "half" / "latest_checkpointed_iteration.txt").write_text("10")
    resumed = losses(run(folder, grid, "paci", *quiet, "--load", str(tmp_path / "half"), without=[UNTIED]))
    later = [11, *range(13, ITERATIONS + 1)]
    assert [resumed[number] for number in later] == [went_on[number] for number in later]
    loaded = run(folder, grid, "stock", *quiet, "--load", str(tmp_path / "whole"), without=[UNTIED])
    assert evaluations(loaded)[-2:] == evaluations(output)[-2:]


@pytest.mark.parametrize(("more", "form"), [((), "torch"), (("--bf16",), "torch_dist")])
def test_error_feedback(folder: Path, more: Sequence[str], form: str, tmp_path: Path) -> None:
    """A resumed job goes on as if it had not ended; stock loads, and evaluates, what it evaluated."""
    options, quiet = tmp_path / "options.json", ("--attention-dropout", "0", "--hidden-dropout", "0")
    options.write_text('{"compensation": "error_feedback"}')
    common = (*more, *quiet, "--ckpt-format", form)
    ahead = ("--pipeline-schedule-options", str(options))
    output = run(folder, "PP2 DP2", "paci", *common, *ahead, "--save", str(tmp_path / "whole"))
    went_on = losses(output)
    assert "error feedback, x = z + 0.25 (z - z_before)" in output
    assert went_on != losses(run(folder, "PP2 DP2", "paci", *common))
    shutil.copytree(tmp_path / "whole" / "iter_0000010", tmp_path / "half" / "iter_0000010")
    (tmp_path / "half" / "latest_checkpointed_iteration.txt").write_text("10")
    resumed = losses(run(folder, "PP2 DP2", "paci", *common, *ahead, "--load", str(tmp_path / "half")))
    later = [11, *range(13, ITERATIONS + 1)]
    assert [resumed[number] for number in later] == [went_on[number] for number in later]
    loaded = run(folder, "PP2 DP2", "stock", *common, "--load", str(tmp_path / "whole"))
    assert evaluations(loaded)[-2:] == evaluations(output)[-2:]


def test_relayed_decisions(folder: Path, tmp_path: Path) -> None:
    """One norm, later; the first iteration updates nothing on the stage that prints. A resumed job goes on as if it had
    not ended, and stock evaluates what was saved."""
    options, quiet = tmp_path / "options.json", ("--attention-dropout", "0", "--hidden-dropout", "0")
    options.write_text('{"decisions": "relayed"}')
    common = (*quiet, "--ckpt-format", "torch_dist")
    relayed = (*common, "--pipeline-schedule-options", str(options))
    output = run(folder, "PP4", "paci", *relayed, "--save", str(tmp_path / "whole"))
    went_on = losses(output)
    assert sorted(went_on) == list(range(2, ITERATIONS + 1)), "a mean over updates"
    assert float(went_on[ITERATIONS]) < float(went_on[2]) - 0.5
    shutil.copytree(tmp_path / "whole" / "iter_0000010", tmp_path / "half" / "iter_0000010")
    (tmp_path / "half" / "latest_checkpointed_iteration.txt").write_text("10")
    resumed = losses(run(folder, "PP4", "paci", *relayed, "--load", str(tmp_path / "half")))
    later = range(14, ITERATIONS + 1)
    assert [resumed[number] for number in later] == [went_on[number] for number in later]
    loaded = run(folder, "PP4", "stock", *common, "--load", str(tmp_path / "whole"))
    assert evaluations(loaded)[-2:] == evaluations(output)[-2:]


def test_checkpoints_pass_between_stock_and_paci(folder: Path, tmp_path: Path) -> None:
    """One evaluation before any further iteration tells that the weights are those that were saved."""
    quiet = ("--attention-dropout", "0", "--hidden-dropout", "0")
    for first, second in (("paci", "stock"), ("stock", "paci")):
        saved = run(folder, "PP2", first, *quiet, "--save", str(tmp_path / first))
        loaded = run(folder, "PP2", second, *quiet, "--load", str(tmp_path / first))
        assert evaluations(loaded)[-2:] == evaluations(saved)[-2:]


@pytest.mark.parametrize(("schedule", "engine"), [("stock", STOCK), ("amdp", OURS)])
def test_a_recorded_job_is_the_same_job(folder: Path, schedule: str, engine: str, tmp_path: Path) -> None:
    """Every rank writes all its iterations; the last stage's losses are those that Megatron prints."""
    output = run(folder, "PP2", schedule, options=["--record", tmp_path])
    assert losses(output) == losses(stock(folder, "PP2") if schedule == "stock" else run(folder, "PP2", schedule))
    records = read_records(tmp_path)
    assert [(record.rank, record.engine) for record in records] == [(0, engine), (1, engine)]
    for record in records:
        assert [step.step for step in record.steps] == list(range(1, ITERATIONS + 1))
    told = [step.loss for step in records[-1].steps]
    told[1] = (told[0] + told[1]) / 2  # as Megatron prints the second
    assert told == pytest.approx([float(loss) for loss in losses(output).values()], rel=1e-5)
