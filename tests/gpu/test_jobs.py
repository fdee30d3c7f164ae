"""Jobs as people submit them, on GPUs: both hosts' scripts under torchrun."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests import devices

pytestmark = pytest.mark.skipif(not devices.over_nccl(), reason="needs --device nccl or nccl-shared")
ROOT = Path(__file__).parents[2]
STEPS = 12
PATIENCE_SECONDS = 240
"""For a job to end, whatever becomes of it."""
MODEL = ["--layers", "4", "--hidden", "128", "--heads", "4", "--sequence-length", "128"]
RUN = ["--steps", str(STEPS), "--log-every", "1", "--validate-every", "6", "--validation-batches", "2"]


def command(ranks: int, script: Sequence[str | Path]) -> list[str]:
    launcher = ["-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks]
    return [sys.executable, *map(str, [*launcher, *shared(), *script])]


def shared() -> list[Path]:
    """What runs a script on a GPU that others use too."""
    return [] if devices.chosen() == "nccl" else [ROOT / "tests" / "gpu" / "shared_gpu.py"]


def deepspeed_job(schedule: str | None, configuration: str) -> list[str | Path]:
    config = ROOT / "ds_configs" / f"{configuration}.json"
    ours = ["-m", "amdp_plugin"] if schedule else []
    return [*ours, ROOT / "scripts" / "train_gpt.py", "--deepspeed_config", config, *MODEL, *RUN]


def megatron_job(schedule: str | None, *more: str) -> list[str | Path]:
    chosen = ["--pipeline-schedule", schedule] if schedule else []
    return [ROOT / "scripts" / "train_gpt_megatron.py", *MODEL, *RUN, *chosen, *more]


def alone(rank: int, ranks: int, port: int, script: Sequence[str | Path]) -> subprocess.Popen[str]:
    """One rank, without a launcher."""
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    environs = {**environment(), "MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in told.items()}}
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", *map(str, [*shared(), *script])],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=environs,
    )  # fmt: skip


def free_port() -> int:
    """Other tests start jobs at the same time."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}


def train(ranks: int, script: Sequence[str | Path], text: Path) -> list[tuple[str, str]]:
    """What was told of each step."""
    given = [*command(ranks, script), "--data", str(text)]
    done = subprocess.run(
        given, text=True, capture_output=True, timeout=PATIENCE_SECONDS, env=environment(), cwd=text.parent
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return re.findall(r"^step \d+: (loss|validation loss) ([\d.]+)", done.stdout, re.MULTILINE)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text"
    path.write_text(" ".join(map(str, range(20000))))
    return path


JOBS = {
    "deepspeed": (deepspeed_job(None, "1f1b"), deepspeed_job("1f1b", "1f1b")),
    "deepspeed bf16": (deepspeed_job(None, "1f1b_bf16"), deepspeed_job("1f1b", "1f1b_bf16")),
    "megatron": (megatron_job(None), megatron_job("1f1b")),
    "megatron bf16": (megatron_job(None, "--bf16"), megatron_job("1f1b", "--bf16")),
}


@pytest.mark.parametrize("job", JOBS)
def test_1f1b_prints_what_stock_prints(job: str, text: Path) -> None:
    stock, ours = (train(2, script, text) for script in JOBS[job])
    assert len(stock) == STEPS + 2 and ours == stock


LEARNING = {
    "deepspeed paci": (2, deepspeed_job("paci", "paci")),
    "deepspeed paci bf16 4": (4, deepspeed_job("paci", "paci_bf16")),
    "deepspeed amdp 4": (4, deepspeed_job("amdp", "amdp")),
    "megatron paci": (2, megatron_job("paci")),
    "megatron amdp 4": (4, megatron_job("amdp")),
    "megatron amdp bf16 4": (4, megatron_job("amdp", "--bf16")),
}


@pytest.mark.parametrize("job", LEARNING)
def test_a_job_learns(job: str, text: Path, record_property: pytest.RecordProperty) -> None:
    ranks, script = LEARNING[job]
    losses = [float(loss) for what, loss in train(ranks, script, text) if what == "loss"]
    record_property("loss", f"{losses[0]} to {losses[-1]}")
    assert len(losses) == STEPS and losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize("host", ["deepspeed", "megatron"])
def test_when_a_rank_is_killed_the_others_say_so_and_end(
    host: str, text: Path, record_property: pytest.RecordProperty
) -> None:
    script = [*(deepspeed_job("paci", "paci") if host == "deepspeed" else megatron_job("paci"))]
    script[script.index("--steps") + 1] = "100000"
    # Not under torchrun, which would end the survivor before it has said anything.
    port = free_port()
    ranks = [alone(rank, 2, port, [*script, "--data", text]) for rank in range(2)]
    tells = 0 if host == "deepspeed" else 1
    survivor, victim = ranks[tells], ranks[1 - tells]
    assert survivor.stdout is not None
    end_anyway = threading.Timer(PATIENCE_SECONDS, lambda: [rank.kill() for rank in ranks])  # a read has no limit
    end_anyway.start()
    for line in survivor.stdout:
        if line.startswith("step 5:"):
            break
    began = time.monotonic()
    victim.send_signal(signal.SIGKILL)
    rest = survivor.stdout.read()
    code, seconds = survivor.wait(60), time.monotonic() - began
    end_anyway.cancel()
    record_property("ended after, s", f"{seconds:.1f}")
    assert code != 0 and f"PipelineStallError: pipeline rank {tells}" in rest, rest[-3000:]
    assert seconds < 60
