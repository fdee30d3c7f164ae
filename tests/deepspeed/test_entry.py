"""How a job gets the engine: ``initialize``, ``install``, and ``python -m amdp_plugin``."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from base64 import urlsafe_b64encode
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.pipe import PipelineModule

import amdp_plugin
from tests.processes import run_ranks
from tests.runtime.models import loss

from .jobs import Job, build_layers, configuration


def make(initialize: Any, job: Job, **how: Any) -> str:
    """The class of the engine that ``initialize`` makes of ``job``."""
    deepspeed.init_distributed("gloo")
    module = PipelineModule(build_layers(job), num_stages=job.stages, loss_fn=loss, partition_method="uniform")
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    made = initialize(model=module, optimizer=optimizer, **(how or {"config": configuration(job)}))
    assert len(made) == 4 and made[1] is not None
    return type(made[0]).__name__


def without_the_key(rank: int) -> list[str]:
    stock = deepspeed.initialize
    job = Job(None)
    names = [make(amdp_plugin.initialize, job), make(amdp_plugin.initialize, Job(None, config={"pipeline": {}}))]
    assert deepspeed.initialize is stock
    return names


def test_without_the_key_it_is_stock() -> None:
    assert run_ranks(2, without_the_key) == [["PipelineEngine"] * 2] * 2


def by_every_path(rank: int, file: Path) -> list[str]:
    job = Job("paci")
    return [
        make(amdp_plugin.initialize, job),
        make(amdp_plugin.initialize, job, config=str(file)),
        make(amdp_plugin.initialize, job, config_params=configuration(job)),
        make(amdp_plugin.initialize, job, args=SimpleNamespace(deepspeed_config=str(file), local_rank=rank)),
        make(amdp_plugin.initialize, job, config=urlsafe_b64encode(file.read_bytes()).decode()),
    ]


def test_configuration_by_every_path(tmp_path: Path) -> None:
    """A dict, a file with comments as DeepSpeed allows, the old name of the argument, the command line, and base64."""
    file = tmp_path / "config.json"
    file.write_text("# as hjson\n" + json.dumps(configuration(Job("paci"))))
    assert run_ranks(2, by_every_path, file) == [["ScheduledPipelineEngine"] * 5] * 2


def install_and_uninstall(rank: int) -> list[str]:
    stock, job = deepspeed.initialize, Job("paci")
    names = [make(deepspeed.initialize, job.stock)]
    amdp_plugin.install()
    amdp_plugin.install()
    names += [make(deepspeed.initialize, job), make(deepspeed.initialize, job.stock)]
    amdp_plugin.uninstall()
    assert deepspeed.initialize is stock
    amdp_plugin.uninstall()
    assert deepspeed.initialize is stock
    return [*names, make(deepspeed.initialize, job.stock)]


def test_install_is_idempotent_and_reversible() -> None:
    expected = ["PipelineEngine", "ScheduledPipelineEngine", "PipelineEngine", "PipelineEngine"]
    assert run_ranks(2, install_and_uninstall) == [expected] * 2


SCRIPT = """
import sys
import deepspeed, torch
from deepspeed.pipe import PipelineModule

assert __name__ == "__main__" and sys.argv[1:] == ["--steps", "3"], sys.argv
deepspeed.init_distributed("gloo")
module = PipelineModule([torch.nn.Linear(4, 4)], num_stages=1, loss_fn=torch.nn.functional.mse_loss)
config = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 2,
    "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
    "pipeline": {"schedule": "paci"},
}
engine, *_ = deepspeed.initialize(model=module, config=config, model_parameters=module.parameters())
batches = iter([(torch.ones(1, 4), torch.zeros(1, 4))] * 8)
losses = [float(engine.train_batch(batches)) for _ in range(3)]
print("trained by", type(engine).__name__, losses[2] < losses[0])
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_module(*arguments: str) -> subprocess.CompletedProcess[str]:
    """``python -m amdp_plugin`` as the only rank of a job."""
    job = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    root = str(Path(amdp_plugin.__file__).parents[1])
    command = [sys.executable, "-m", "amdp_plugin", *arguments]
    environment = {**os.environ, **job, "PYTHONPATH": root}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_unmodified_script(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    done = run_module(str(script), "--steps", "3")
    assert done.returncode == 0, done.stderr
    assert "trained by ScheduledPipelineEngine True" in done.stdout


def test_a_refused_job_ends_with_one_message(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.replace('"paci"', '"pacy"'))
    done = run_module(str(script), "--steps", "3")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "pacy" in line]
    assert line.startswith("[amdp] error, rank 0: unknown schedule 'pacy'") and line.endswith("did you mean 'paci'?")


def test_torchrun_ends_with_the_first_error_of_a_script(tmp_path: Path) -> None:
    """And not with a pointer to documentation."""
    script = tmp_path / "fail.py"
    script.write_text("raise ValueError('a mistake of the script')\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--master-port", str(free_port()), "-m", "amdp_plugin"]
    root = str(Path(amdp_plugin.__file__).parents[1])
    done = subprocess.run(
        [*command, str(script)], env={**os.environ, "PYTHONPATH": root}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    _, _, cause = done.stderr.partition("Root Cause")
    assert re.search(r"traceback : ValueError: a mistake of the script\n=+\n$", cause), done.stderr


def test_deepspeeds_launcher(tmp_path: Path) -> None:
    """It puts ``--local_rank`` before the script, and means it for the script."""
    script = tmp_path / "show.py"
    # In one piece: several would be written one by one, between those of the other rank.
    shown = "f\"{sys.argv[1:]} {hasattr(deepspeed.initialize, '__wrapped__')}\""
    script.write_text(f"import sys, deepspeed\nprint({shown})\n")
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2"]
    command = [*launcher, "--master_port", str(free_port()), "--module", "amdp_plugin", str(script), "--steps", "3"]
    root = str(Path(amdp_plugin.__file__).parents[1])
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": root}, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        assert f"['--local_rank={rank}', '--steps', '3'] True" in done.stdout


@pytest.mark.parametrize(("arguments", "code"), [((), 2), (("--help",), 0), (("no_such_script.py",), 2)])
def test_usage(arguments: tuple[str, ...], code: int) -> None:
    done = run_module(*arguments)
    assert done.returncode == code
    assert "usage: python -m amdp_plugin" in (done.stderr if code else done.stdout)
