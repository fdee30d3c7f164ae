"""How fast schedules are where every rank has a GPU, beside stock, with a GPT that fills it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import devices

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(devices.chosen() != "nccl", reason="needs a GPU for every rank")
MODEL = ["--layers", "16", "--hidden", "1024", "--heads", "16", "--sequence-length", "1024", "--dropout", "0"]


def test_throughput(tmp_path: Path, record_property: pytest.RecordProperty) -> None:
    ranks = min(4, torch.cuda.device_count()) // 2 * 2
    configs = []
    for name in ("1f1b_bf16", "paci_bf16", "amdp_bf16"):
        config = json.loads((ROOT / "ds_configs" / f"{name}.json").read_text())
        config.update(train_micro_batch_size_per_gpu=4, gradient_accumulation_steps=2 * ranks)
        configs.append(tmp_path / f"{name}.json")
        configs[-1].write_text(json.dumps(config))
    command = [sys.executable, "-m", "amdp_plugin.cli", "compare", "--configs", *map(str, configs)]
    command += ["--nproc", str(ranks), "--steps", "30", "--output", str(tmp_path / "out")]
    command += ["--", *MODEL, "--validate-every", "0"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    print(done.stdout)
    for row in json.loads((tmp_path / "out" / "result.json").read_text())["runs"]:
        ratio = f"ratio {row['ratio']:.3f}, predicted {row['predicted_ratio']:.3f}"
        record_property(row["name"], f"{row['tokens_per_second']:,.0f} tokens/s, {ratio}")
