"""``amdp doctor`` as users run it: on what is installed here, and on folders that hide, fake or damage some of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from amdp_plugin.doctor.hooks import Hook, hooks
from amdp_plugin.doctor.source import find, has
from amdp_plugin.megatron.targets import TARGETS

pytest.importorskip("deepspeed")
pytest.importorskip("megatron.core")

ROOT = Path(__file__).parents[1]
HOOKS = {hook.name: hook for hook in hooks()}
FAKE_TORCH = """
from types import SimpleNamespace as Namespace
__version__, version = "9.9", Namespace(cuda={cuda!r})
distributed = Namespace(is_nccl_available=lambda: True)
devices = [Namespace(name="NVIDIA H100", major=9, minor=0)] * {devices}
cuda = Namespace(
    is_available=lambda: bool(devices), device_count=lambda: len(devices), get_device_properties=devices.__getitem__,
    nccl=Namespace(version=lambda: (2, 27, 5)),
)
"""
CPU_TORCH = {"torch/__init__.py": FAKE_TORCH.format(cuda=None, devices=0)}  # starts sooner than the real one


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def run(*arguments: str, python: Iterable[str] = (), paths: Iterable[Path] = (), **environment: str) -> Any:
    """The command, in a process of its own that imports from ``paths`` first."""
    kept = {name: value for name, value in os.environ.items() if name not in ("MEGATRON_LM_PATH", "CXX")}
    kept["PYTHONPATH"] = os.pathsep.join(map(str, [*paths, ROOT]))
    command = [sys.executable, *python, "-m", "amdp_plugin.cli", "doctor", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**kept, **environment}, check=False)


def diagnose(**how: Any) -> tuple[int, dict[str, dict], dict[str, dict]]:
    """Its exit code, findings and hooks, by name."""
    done = run("--json", **how)
    report = json.loads(done.stdout)
    assert report["usable"] is (done.returncode == 0), done.stderr
    found, applied = ({each["name"]: each for each in report[section]} for section in ("found", "hooks"))
    return done.returncode, found, applied


def installed_without(folder: Path, *hidden: str) -> dict[str, Any]:
    """How to run with what is installed here, but for what starts with a name of ``hidden``."""
    folder.mkdir()
    for site in (Path(path) for path in sys.path if path.endswith("-packages")):
        for entry in site.iterdir():
            if not entry.name.startswith(hidden) and not (folder / entry.name).exists():
                (folder / entry.name).symlink_to(entry)
    return {"python": ["-S"], "paths": [folder]}


def megatron_lm(folder: Path, without: str = "") -> Path:
    """A checkout that has what the hook uses, but for one name."""
    modules = {"megatron/training/__init__.py": ""}
    for module, name in HOOKS["Megatron-LM"].uses():
        if module.startswith("megatron.training"):
            path = f"{module.replace('.', '/')}{'/__init__' if module == 'megatron.training' else ''}.py"
            definition = f"try:\n    from elsewhere import {name}\nexcept ImportError:\n    def {name}(): ...\n"
            modules[path] = modules.get(path, "") + ("" if name == without else definition)
    return write(folder, modules)


def test_what_is_here_is_found_with_its_version() -> None:
    code, found, applied = diagnose()
    assert code == 0
    for name in ("torch", "deepspeed", "megatron-core"):
        assert (found[name]["mark"], found[name]["detail"].split(",")[0]) == ("ok", version(name))
    assert found["Python"]["detail"].startswith(sys.version.split()[0])
    assert (applied["DeepSpeed"]["mark"], applied["Megatron-Core"]["mark"]) == ("ok", "ok")


def test_the_table() -> None:
    done = run()
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert f"ok       torch              {version('torch')}" in lines
    assert [line for line in lines if line.startswith("Megatron-LM: git clone ")]
    if not import_module("torch").cuda.is_available():
        assert "ok       CUDA               no CUDA device: CPU and gloo" in lines


def test_hosts_are_not_imported(tmp_path: Path) -> None:
    """They would not survive it here."""
    explode = "raise SystemExit('imported')"
    files = {"deepspeed/__init__.py": explode, "apex/__init__.py": explode, "transformer_engine/__init__.py": explode}
    files["megatron/training/__init__.py"] = explode
    code, found, _ = diagnose(paths=[write(tmp_path, {**files, **CPU_TORCH})], MEGATRON_LM_PATH=str(tmp_path))
    assert code == 0  # by the Megatron-Core that is installed
    assert found["deepspeed"]["detail"].endswith(str(tmp_path / "deepspeed"))
    assert found["Megatron-LM"]["detail"] == str(tmp_path)


def test_without_a_host(tmp_path: Path) -> None:
    done = run(**installed_without(tmp_path / "site", "deepspeed", "megatron", "torch"))
    assert done.returncode == 1
    assert done.stdout.endswith("\nNo host can be used.\n")
    assert 'deepspeed: in the folder of amdp_plugin: pip install -c constraints.txt ".[deepspeed]"\n' in done.stdout
    assert 'megatron-core: in the folder of amdp_plugin: pip install -c constraints.txt ".[megatron]"\n' in done.stdout
    assert "missing  DeepSpeed          needs torch, deepspeed\n" in done.stdout


def test_one_host_is_enough(tmp_path: Path) -> None:
    how = installed_without(tmp_path / "site", "deepspeed", "ninja", "torch")
    how["paths"].append(write(tmp_path / "fake", CPU_TORCH))
    code, found, applied = diagnose(**how, PATH="")
    assert (code, found["deepspeed"]["mark"], applied["Megatron-Core"]["mark"]) == (0, "missing", "ok")
    assert found["ninja"]["detail"].startswith("not needed")


def test_what_deepspeed_needs_on_a_cpu(tmp_path: Path) -> None:
    _, found, applied = diagnose(paths=[write(tmp_path, CPU_TORCH)], PATH="")
    assert applied["DeepSpeed"]["detail"] == "needs C++ compiler, ninja"
    assert found["ninja"]["remedy"].startswith(f"export PATH={Path(sys.executable).parent}:$PATH")
    assert "install g++" in found["C++ compiler"]["remedy"]
    _, found, _ = diagnose(paths=[tmp_path], PATH="", CXX=sys.executable)
    assert (found["C++ compiler"]["mark"], found["C++ compiler"]["detail"]) == ("ok", sys.executable)


def test_gpus(tmp_path: Path) -> None:
    """No GPU was at hand: a torch that says it has two."""
    write(tmp_path, {"torch/__init__.py": FAKE_TORCH.format(cuda="13.0", devices=2)})
    _, found, applied = diagnose(paths=[tmp_path], PATH="", MEGATRON_LM_PATH=str(megatron_lm(tmp_path / "lm")))
    assert found["CUDA"]["detail"] == "13.0, 2 x NVIDIA H100 (capability 9.0)"
    assert (found["NCCL"]["mark"], found["NCCL"]["detail"]) == ("ok", "2.27.5")
    assert [hook["mark"] for hook in applied.values()] == ["ok", "ok", "ok"]
    assert applied["Megatron-LM"]["detail"].endswith(" python -m amdp_plugin.megatron SCRIPT")


def test_a_torch_without_cuda_beside_a_gpu(tmp_path: Path) -> None:
    write(tmp_path, {**CPU_TORCH, "bin/nvidia-smi": ""})
    (tmp_path / "bin/nvidia-smi").chmod(0o755)
    _, found, _ = diagnose(paths=[tmp_path], PATH=str(tmp_path / "bin"))
    assert (found["CUDA"]["mark"], found["CUDA"]["remedy"]) == (
        "wrong",
        "if this machine has a GPU, install a torch built for CUDA",
    )


NVIDIA_APEX = {"apex/__init__.py": "", "apex/optimizers/__init__.py": "from .fused_adam import FusedAdam"}


@pytest.mark.parametrize(
    "files,mark,detail,remedy",
    [
        ({"apex/__init__.py": "", "apex/models.py": ""}, "wrong", "is not NVIDIA's: PyPI's apex is", "pip uninstall"),
        (NVIDIA_APEX, "wrong", "FusedAdam needs amp_C", "APEX_CUDA_EXT=1"),
        ({**NVIDIA_APEX, "amp_C.py": ""}, "ok", "apex", ""),
    ],
)
def test_apex(files: dict[str, str], mark: str, detail: str, remedy: str, tmp_path: Path) -> None:
    how = installed_without(tmp_path / "site", "apex", "amp_C", "torch")
    how["paths"].append(write(tmp_path / "fake", {**files, **CPU_TORCH}))
    code, found, _ = diagnose(**how)
    assert (code, found["apex"]["mark"]) == (0, mark)
    assert detail in found["apex"]["detail"]
    assert remedy in (found["apex"]["remedy"] or "")


@pytest.mark.parametrize(
    "hook,package,file,name,target",
    [
        ("DeepSpeed", "deepspeed", "runtime/pipe/engine.py", "_train_schedule", "PipelineEngine._train_schedule"),
        ("DeepSpeed", "deepspeed", "__init__.py", "def initialize", "deepspeed.initialize"),
        (
            "Megatron-Core",
            "megatron.core",
            "pipeline_parallel/schedules.py",
            "def backward_step(",
            "schedules.backward_step",
        ),
    ],
)
def test_a_host_that_lacks_a_name(hook: str, package: str, file: str, name: str, target: str, tmp_path: Path) -> None:
    """The installed one, with one definition renamed."""
    installed = find(package)
    assert installed is not None
    copy = tmp_path.joinpath(*package.split("."))
    sources = shutil.ignore_patterns("*.so", "*.cu", "*.cpp", "*.h", "*.pyc")
    shutil.copytree(installed.parent, copy, ignore=sources, symlinks=True)
    text = (copy / file).read_text()
    assert name in text
    (copy / file).write_text(text.replace(name, name.replace("_", "_other_", 1) if "_" in name else "def other"))
    code, _, applied = diagnose(paths=[write(tmp_path, CPU_TORCH)])
    assert (code, applied[hook]["mark"]) == (0, "wrong")
    assert applied[hook]["detail"].startswith("does not have ") and applied[hook]["detail"].endswith(target)
    assert applied[hook]["detail"].count(",") == 0
    assert "pip install -c constraints.txt" in applied[hook]["remedy"]


@pytest.mark.parametrize("missing", [("megatron.training.training", "save_checkpoint"), TARGETS[1]])
def test_a_checkout_that_lacks_a_function(missing: tuple[str, str], tmp_path: Path) -> None:
    folder = megatron_lm(tmp_path / "lm", missing[1])
    paths = [write(tmp_path, CPU_TORCH)]
    _, found, applied = diagnose(paths=paths, MEGATRON_LM_PATH=str(folder))
    assert (found["Megatron-LM"]["mark"], applied["Megatron-LM"]["mark"]) == ("ok", "wrong")
    assert applied["Megatron-LM"]["detail"] == f"does not have {'.'.join(missing)}"
    assert applied["Megatron-LM"]["remedy"].startswith("git clone --branch core_v0.16.1 ")


def test_where_megatron_lm_is(tmp_path: Path) -> None:
    torch, folder = write(tmp_path / "torch", CPU_TORCH), megatron_lm(tmp_path / "lm")
    for how in ({"paths": [torch], "MEGATRON_LM_PATH": str(folder)}, {"paths": [torch, folder]}):
        _, found, applied = diagnose(**how)
        assert (found["Megatron-LM"]["detail"], applied["Megatron-LM"]["mark"]) == (str(folder), "ok")
        assert applied["Megatron-LM"]["detail"].endswith(
            " python scripts/megatron_on_cpu.py -m amdp_plugin.megatron SCRIPT"
        )
    _, found, _ = diagnose(paths=[torch, folder], MEGATRON_LM_PATH=str(tmp_path))
    wrong = {"mark": "wrong", "detail": f"no megatron/training in MEGATRON_LM_PATH={tmp_path}"}
    assert wrong.items() <= found["Megatron-LM"].items()


def test_the_core_of_a_checkout(tmp_path: Path) -> None:
    """Megatron-LM comes with one, which is enough."""
    installed = find("megatron.core")
    assert installed is not None
    folder = megatron_lm(tmp_path / "lm")
    (folder / "megatron/core").symlink_to(installed.parent)
    how = installed_without(tmp_path / "site", "megatron", "torch")
    how["paths"].append(write(tmp_path, CPU_TORCH))
    _, found, applied = diagnose(**how, MEGATRON_LM_PATH=str(folder))
    assert found["megatron-core"]["detail"] == f"that of Megatron-LM, {folder / 'megatron/core'}"
    assert (applied["Megatron-Core"]["mark"], applied["Megatron-LM"]["mark"]) == ("ok", "ok")


@pytest.mark.parametrize("hook", [HOOKS["DeepSpeed"], HOOKS["Megatron-Core"]], ids=lambda hook: hook.name)
def test_the_names_of_a_hook_are_there_when_it_is_imported(hook: Hook) -> None:
    """What is read from the source is what Python finds."""
    assert len(hook.uses()) > 4
    for module, name in hook.uses():
        held = import_module(module)
        for part in name.split("."):
            held = getattr(held, part)


def test_names_in_source() -> None:
    assert all(has("importlib.metadata", name) for name in import_module("importlib.metadata").__all__)
    assert has("importlib", "metadata") and has("json.decoder", "JSONDecoder.decode")
    assert not has("json.decoder", "JSONDecoder.encode")
    assert not has("json.decoder", "decode")
    assert not has("json.nothing", "decode")
