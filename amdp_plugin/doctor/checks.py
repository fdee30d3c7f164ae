"""What is on this machine: each check looks for one thing and says what it found. Only torch is imported."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .source import find, has

CHECKOUT = "MEGATRON_LM_PATH"
INSTALL = "in the folder of amdp_plugin: pip install -c constraints.txt"
INSTALL_CHECKOUT = (
    "git clone --branch core_v0.16.1 https://github.com/NVIDIA/Megatron-LM, and let the environment variable "
    f"{CHECKOUT} name that folder"
)
INSTALL_APEX = (
    "NVIDIA's is built from source, with CUDA: git clone https://github.com/NVIDIA/apex && cd apex && "
    "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-build-isolation ."
)
INSTALL_ENGINE = 'with CUDA: pip install --no-build-isolation "transformer_engine[pytorch]"'


class Mark(str, Enum):
    """What became of a thing that was looked for."""

    ok = "ok"
    missing = "missing"
    wrong = "wrong"


@dataclass(frozen=True)
class Finding:
    """What was found of one thing.

    Args:
        detail: its version and place, or why it cannot be used.
        remedy: what to do about it, if anything.
    """

    name: str
    mark: Mark
    detail: str
    remedy: str | None = None


def checkout() -> Path | None:
    """The folder of Megatron-LM that the environment names."""
    return Path(folder) if (folder := os.environ.get(CHECKOUT)) else None


def has_cuda() -> bool:
    """Whether torch can use a CUDA device."""
    torch = _import_torch()
    return torch is not None and torch.cuda.is_available()


def _python() -> Finding:
    return Finding("Python", Mark.ok, f"{platform.python_version()}, {sys.executable}")


def _platform() -> Finding:
    return Finding("platform", Mark.ok, platform.platform())


def _torch() -> Finding:
    if find("torch") is None:
        return Finding("torch", Mark.missing, "not installed", f'{INSTALL} ".[deepspeed]" or ".[megatron]"')
    if (torch := _import_torch()) is None:
        return Finding("torch", Mark.wrong, "cannot be imported", 'python -c "import torch" says why; install it anew')
    return Finding("torch", Mark.ok, torch.__version__)


def _cuda() -> Finding:
    if (torch := _import_torch()) is None:
        return Finding("CUDA", Mark.missing, "only torch can tell")
    if torch.cuda.is_available():
        devices = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        alike = Counter(f"{device.name} (capability {device.major}.{device.minor})" for device in devices)
        listed = ", ".join(f"{count} x {device}" for device, count in alike.items())
        return Finding("CUDA", Mark.ok, f"{torch.version.cuda}, {listed}")
    if torch.version.cuda is None and shutil.which("nvidia-smi"):
        remedy = "if this machine has a GPU, install a torch built for CUDA"
        return Finding("CUDA", Mark.wrong, "nvidia-smi is here, but this torch is built without CUDA", remedy)
    return Finding("CUDA", Mark.ok, "no CUDA device: CPU and gloo")


def _nccl() -> Finding:
    if not has_cuda():
        return Finding("NCCL", Mark.ok, "not needed without a CUDA device")
    torch = _import_torch()
    if not torch.distributed.is_nccl_available():
        return Finding("NCCL", Mark.wrong, "this torch is built without it", "install a torch built with NCCL")
    return Finding("NCCL", Mark.ok, ".".join(map(str, torch.cuda.nccl.version())))


def _deepspeed() -> Finding:
    return _package("deepspeed", find("deepspeed"), f'{INSTALL} ".[deepspeed]"')


def _compiler() -> Finding:
    command = os.environ.get("CXX", "c++")  # as torch chooses it
    return _build_tool("C++ compiler", command, "install g++, or name a compiler in the environment variable CXX")


def _ninja() -> Finding:
    install = f"{INSTALL} ninja"
    folder = Path(sys.executable).parent
    activate = f"export PATH={folder}:$PATH, or activate the environment: torch finds ninja through PATH only"
    return _build_tool("ninja", "ninja", install if find("ninja") is None else activate)


def _megatron_core() -> Finding:
    installed, own = find("megatron.core"), find("megatron.core", checkout())
    if installed is None and own is not None:
        return Finding("megatron-core", Mark.ok, f"that of Megatron-LM, {own.parent}")
    return _package("megatron-core", installed, f'{INSTALL} ".[megatron]"')


def _megatron_lm() -> Finding:
    folder, found = checkout(), find("megatron.training", checkout())
    if folder is not None and (found is None or found.parents[2] != folder):
        return Finding("Megatron-LM", Mark.wrong, f"no megatron/training in {CHECKOUT}={folder}", INSTALL_CHECKOUT)
    if found is None:
        detail = f"no megatron.training to import, and {CHECKOUT} is not set"
        return Finding("Megatron-LM", Mark.missing, detail, INSTALL_CHECKOUT)
    return Finding("Megatron-LM", Mark.ok, str(found.parents[2]))


def _apex() -> Finding:
    found = find("apex")
    if found is not None and not has("apex.optimizers", "FusedAdam"):
        detail = f"{found.parent} is not NVIDIA's: PyPI's apex is another project (authentication for Pyramid)"
        return Finding("apex", Mark.wrong, detail, f"pip uninstall apex. {INSTALL_APEX}")
    if found is not None and find("amp_C") is None:
        detail = "built without its CUDA extensions: FusedAdam needs amp_C"
        return Finding("apex", Mark.wrong, detail, INSTALL_APEX)
    return _package("apex", found, INSTALL_APEX, "optional")


def _transformer_engine() -> Finding:
    found = find("transformer_engine")
    if found is not None and find("transformer_engine.pytorch") is None:
        return Finding("TransformerEngine", Mark.wrong, "installed without its part for torch", INSTALL_ENGINE)
    return _package("TransformerEngine", found, INSTALL_ENGINE, "optional", distribution="transformer-engine")


CHECKS: tuple[Callable[[], Finding], ...] = (
    _python, _platform, _torch, _cuda, _nccl, _deepspeed, _compiler, _ninja, _megatron_core, _megatron_lm, _apex,
    _transformer_engine,
)  # fmt: skip


def _package(
    name: str, found: Path | None, remedy: str, missing: str = "not installed", distribution: str | None = None
) -> Finding:
    if found is None:
        return Finding(name, Mark.missing, missing, remedy)
    try:
        known = f"{version(distribution or name)}, "
    except PackageNotFoundError:  # a folder on sys.path
        known = ""
    return Finding(name, Mark.ok, f"{known}{found.parent}")


def _build_tool(name: str, command: str, remedy: str) -> Finding:
    if find("deepspeed") is None or has_cuda():
        return Finding(name, Mark.ok, "not needed: only DeepSpeed on a CPU compiles before it runs")
    if (path := shutil.which(command)) is None:
        detail = f"no {command} on PATH, and DeepSpeed on a CPU compiles before it runs"
        return Finding(name, Mark.missing, detail, remedy)
    return Finding(name, Mark.ok, path)


@cache
def _import_torch() -> Any:
    try:
        return import_module("torch")
    except Exception:  # whatever a broken installation raises
        return None
