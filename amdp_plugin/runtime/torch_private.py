"""Every private function of torch that the runtime uses, each with what to do when it is gone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.torch_version import TorchVersion

OLDEST, TESTED = "2.11", "2.13.0"
if TorchVersion(torch.__version__) < OLDEST:
    raise ImportError(
        f"torch {torch.__version__} is too old for amdp_plugin, which needs {OLDEST} or newer and is tested with "
        f"{TESTED}"
    )


def _find(path: str) -> Any:
    """``torch.<path>``; raises an ImportError that names the versions where this torch has no such thing."""
    found: Any = torch
    for name in path.split("."):
        found = getattr(found, name, None)
    if found is None:
        raise ImportError(
            f"torch {torch.__version__} has no torch.{path}, which amdp_plugin needs: it is tested with torch {TESTED} "
            f"and meant for torch from {OLDEST} on; install one of these"
        )
    return found


_keep_versions = _find("autograd._unsafe_preserve_version_counter")
_use_count = _find("_C._storage_Use_Count")
_default_store = _find("distributed.distributed_c10d._get_default_store")
_set_timeout = _find("distributed.distributed_c10d._set_pg_timeout")


def keep_versions(tensors: Iterable[Tensor]) -> AbstractContextManager[None]:
    """Let tensors change in place while graphs hold them; publicly, autograd only refuses such a backward.

    When it is gone: save weights in the graph by ``torch.autograd.graph.saved_tensors_hooks`` that look them up.
    """
    return _keep_versions(tuple(tensors))


def storage_uses(tensor: Tensor) -> int:
    """How many tensors and graphs hold the tensor's storage; the public reference counts see Python objects alone.

    When it is gone: take a new buffer for every message.
    """
    return _use_count(tensor.untyped_storage()._cdata)


def compiler_options(module: nn.Module) -> Mapping[str, Any]:
    """What ``torch.compile`` was told, in place or around ``module``; nothing where it was not compiled.

    When it is gone: documentation has to say that CUDA graphs do not work.
    """
    config = getattr(getattr(module, "dynamo_ctx", None), "compiler_config", None)
    told = getattr(getattr(module, "_compiled_call_impl", None), "get_compiler_config", None)
    return config or (told() if told else None) or {}


def default_store() -> dist.Store:
    """The store that the job's ranks met at; torch shows it nowhere publicly.

    When it is gone: make a ``TCPStore`` whose address travels by a collective of the host's group.
    """
    return _default_store()


def set_timeout(group: dist.ProcessGroup, seconds: float) -> None:
    """Bound the collectives of a group that somebody else made; publicly, only who makes a group can.

    When it is gone: ask the host for groups with a timeout (``init_process_group(timeout=...)``).
    """
    _set_timeout(timedelta(seconds=seconds), group)
