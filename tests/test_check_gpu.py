"""scripts/check_gpu.py: what becomes of parts that pass, fail, hang, or cannot run here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import check_gpu

TESTS = """
import os, time, pytest
def test_good(record_property): record_property("seconds", 1.5)
def test_bad(): assert 1 == 2, "one is not two"
def test_skipped(): pytest.skip("needs a tool")
def test_hangs(): time.sleep(60)
def test_shared(): assert os.environ["AMDP_TEST_DEVICE"] == "nccl-shared"
def test_many(): assert os.environ["AMDP_TEST_DEVICE"] == "nccl"
"""


def part(folder: Path, name: str, limit: float = 60, device: str = "cpu", gpus: int = 1) -> check_gpu.Part:
    return check_gpu.Part(name, "a test", limit, (f"{folder}/test_parts.py::test_{name}",), device, gpus)


def test_reports(tmp_path: Path) -> None:
    (tmp_path / "test_parts.py").write_text(TESTS)
    parts = [part(tmp_path, name) for name in ("good", "bad", "skipped", "missing")]
    parts += [part(tmp_path, "shared", 60, "nccl", 2), part(tmp_path, "many", 60, "nccl")]
    parts += [part(tmp_path, "hangs", limit=4)]
    assert check_gpu.run_all(parts, tmp_path / "out", "a machine", gpus=1, at_once=2) == check_gpu.EXIT_FAILED
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    found = {item["part"]: item for item in report["items"]}
    assert {name: item["result"] for name, item in found.items()} == {
        "good": "passed", "bad": "failed", "skipped": "not possible here", "missing": "failed", "hangs": "failed",
        "shared": "passed", "many": "passed",
    }  # fmt: skip
    assert found["good"]["figures"] == {"seconds": "1.5"}
    assert "one is not two" in found["bad"]["reason"] and "needs a tool" in found["skipped"]["reason"]
    assert "limit of 4 s" in found["hangs"]["reason"] and found["hangs"]["seconds"] < 10
    text = (tmp_path / "out" / "report.md").read_text()
    assert "a machine" in text and "| good | test_good | passed |" in text and "seconds 1.5" in text
    assert check_gpu.run_all(parts[:1], tmp_path / "out", "a machine", gpus=1) == 0


def test_parts_are_chosen_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert [each.name for each in check_gpu.choose(["nccl", "device"])] == ["device", "nccl"]
    with pytest.raises(SystemExit):
        check_gpu.main(["--only", "device", "everything"])
    assert "no part is named everything; there are live-update, device," in capsys.readouterr().err
    assert check_gpu.main(["--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(check_gpu.PARTS)


def test_parts_name_files_that_exist_and_fit_half_an_hour() -> None:
    for each in check_gpu.PARTS:
        assert (check_gpu.ROOT / each.tests[0].split("::")[0]).is_file(), each.name
    at_once = 4  # where there are 16 cores
    assert sum(each.limit for each in check_gpu.PARTS) / at_once + max(each.limit for each in check_gpu.PARTS) < 30 * 60


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_done(tmp_path: Path) -> None:
    environment = {**os.environ, "AMDP_PYTHON_AS_IS": sys.executable}
    command = ["bash", str(check_gpu.ROOT / "scripts/check_gpu.sh"), "--out", str(tmp_path / "out")]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == check_gpu.EXIT_NO_GPU and ended.stdout == ""
    assert "no GPU" in ended.stderr and len(ended.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()
