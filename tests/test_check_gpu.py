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
    both = tuple(f"{tmp_path}/test_parts.py::test_{name}" for name in ("good", "bad", "hangs"))
    parts += [check_gpu.Part("ends early", "what was found is kept", 20, both, "cpu", 1)]
    assert check_gpu.run_all(parts, tmp_path / "out", "a machine", gpus=1, at_once=2) == check_gpu.EXIT_FAILED
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    kept = [(item["name"], item["result"]) for item in report["items"] if item["part"] == "ends early"]
    assert sorted(kept) == [("ends early", "failed"), ("test_bad", "failed"), ("test_good", "passed")]
    found = {item["part"]: item for item in report["items"] if item["part"] != "ends early"}
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


COLLECT = """
import json, pytest, sys
class Count:
    def pytest_collection_modifyitems(self, items):
        self.numbers = [item.nodeid for item in items]
    def pytest_deselected(self, items):
        self.numbers = [number for number in self.numbers if number not in {item.nodeid for item in items}]
found = {}
for name, tests in json.loads(sys.argv[1]).items():
    count = Count()
    code = pytest.main(["--collect-only", "-qq", "-p", "no:cacheprovider", *tests], [count])
    found[name] = [int(code), len(count.numbers)]
print("found", json.dumps(found))
"""
SECONDS_OF_A_TEST = 30
"""12 to 40 where four parts run at once: the ranks of all of them start their devices."""


def test_parts_select_tests_that_exist_and_fit_their_limits() -> None:
    """A name that is gone is an error of pytest's; a selection that has grown would not end in time."""
    wanted = {each.name: each.tests for each in check_gpu.PARTS}
    environment = {**os.environ, "PYTHONPATH": str(check_gpu.ROOT)}
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COLLECT, json.dumps(wanted)],
        cwd=check_gpu.ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    line = next((line for line in ended.stdout.splitlines() if line.startswith("found ")), None)
    assert line is not None, ended.stderr[-3000:]
    found = json.loads(line.removeprefix("found "))
    workers = 3  # where there are 16 cores
    for each in check_gpu.PARTS:
        code, count = found[each.name]
        assert code == 0 and count > 0, f"{each.name}: {ended.stdout[-3000:]}"
        assert count / workers * SECONDS_OF_A_TEST <= each.limit, f"{each.name} has {count} tests"


def test_all_parts_fit_half_an_hour() -> None:
    at_once = 4  # likewise
    assert sum(each.limit for each in check_gpu.PARTS) / at_once + max(each.limit for each in check_gpu.PARTS) < 30 * 60


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_done(tmp_path: Path) -> None:
    environment = {**os.environ, "AMDP_PYTHON_AS_IS": sys.executable}
    command = ["bash", str(check_gpu.ROOT / "scripts/check_gpu.sh"), "--out", str(tmp_path / "out")]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == check_gpu.EXIT_NO_GPU and ended.stdout == ""
    assert "no GPU" in ended.stderr and len(ended.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()
