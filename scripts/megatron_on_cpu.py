"""Stand-ins for CUDA, so that Megatron runs on a machine without GPU, with gloo between its processes.

    torchrun --nproc-per-node 2 scripts/megatron_on_cpu.py path/to/pretrain_gpt.py ...
    torchrun --nproc-per-node 2 scripts/megatron_on_cpu.py -m amdp_plugin.megatron path/to/pretrain_gpt.py ...

runs a script of Megatron-LM as ``python`` would, or through a launcher that takes it, with options of its own before
it (``-m amdp_plugin.megatron --record DIR path/to/pretrain_gpt.py``). Scripts on megatron-core alone call
:func:`install` first. Where there is CUDA nothing is replaced.

Megatron has no CPU backend: it asks ``torch.cuda`` for its device, its generator and its streams, and writes
``device="cuda"``. What is replaced below is what training needs, and no more. The job's configuration has to do its
part: ``use_cpu_initialization``, and no fused kernels.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import importlib
import importlib.util
import logging
import multiprocessing.spawn
import os
import runpy
import sys
import types
from collections.abc import Callable
from typing import Any

import torch

USAGE = "usage: megatron_on_cpu.py [-m LAUNCHER [OPTION ...]] SCRIPT [ARGUMENT ...]"
EXIT_USAGE = 2
FACTORIES = ("arange", "empty", "empty_like", "full", "ones", "rand", "randn", "tensor", "zeros", "zeros_like")
"""Functions of torch that Megatron calls with ``device="cuda"``, or with pinned memory."""
BATCH_INVARIANT = "megatron.core.transformer.custom_layers.batch_invariant_kernels"
BERT_SPEC = "bert_layer_with_transformer_engine_spec"


def install() -> bool:
    """Let megatron-core run on the CPU, before or after it is imported; calling it again does nothing.

    Returns:
        Whether the stand-ins are in place: ``False`` where there is CUDA.
    """
    if torch.cuda.is_available():
        return False
    if not hasattr(torch.cuda, "stands_for_cpu"):
        # First: its decorators import torch's compiler, which looks up torch's own functions by identity.
        importlib.import_module("megatron.core")
        torch._dynamo.config.disable = True  # what they compile would need a C++ toolchain, and seconds a process
        _replace_devices()
        _replace_generators()
        _replace_tensors()
        torch.cuda.stands_for_cpu = True
    return True


def install_for_megatron_lm() -> bool:
    """:func:`install`, and what ``megatron.training`` needs beyond it; its checkout must be importable.

    Returns:
        As :func:`install`.
    """
    if not install():
        return False
    _replace_streams()
    _replace_properties()
    _replace_kernels()

    import megatron.training.initialize as initialize
    import megatron.training.training as training

    # It would build fused kernels with nvcc, and the helpers of the data sets, which pip's megatron-core has.
    initialize._compile_dependencies = _returns(None)
    if not isinstance(training.initialize_megatron, functools.partial):
        training.initialize_megatron = functools.partial(training.initialize_megatron, allow_no_cuda=True)
    return True


def _returns(value: Any) -> Callable[..., Any]:
    return lambda *arguments, **options: value


def _replace_devices() -> None:
    """The current device is the CPU, which is always in step and counts no memory."""
    torch.cuda.current_device = _returns(torch.device("cpu"))
    for name in ("synchronize", "set_device", "empty_cache", "reset_peak_memory_stats"):
        setattr(torch.cuda, name, _returns(None))
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(torch.cuda, name, _returns(0))


def _replace_generators() -> None:
    """The device's generator is the CPU's; Megatron's tracker reaches for it by two functions of its own."""
    from megatron.core.tensor_parallel import random

    def get_state(*arguments: Any, **options: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, *arguments: Any, **options: Any) -> None:
        torch.set_rng_state(state)

    def seed(value: int) -> None:
        torch.default_generator.manual_seed(value)

    torch.cuda.manual_seed = seed
    torch.cuda.get_rng_state = random._get_cuda_rng_state = get_state
    torch.cuda.set_rng_state = random._set_cuda_rng_state = set_state
    # The tracker warns where the CPU's generator was drawn from within a region of the device's. Here they are one.
    logging.getLogger(random.__name__).addFilter(lambda record: "CPU RNG state changed" not in str(record.msg))


def _replace_tensors() -> None:
    """New tensors are on the CPU, moves to the device stay there, and a tensor's type reads as on a GPU.

    Megatron's mixed-precision and distributed optimizers sort parameters by that type's name.
    """
    for name in FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    type_of = torch.Tensor.type

    def type_as_on_gpu(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        found = type_of(tensor, *arguments, **options)  # within a mode of torch's, it asks this function again
        replaces = isinstance(found, str) and not found.startswith("torch.cuda.")
        return found.replace("torch.", "torch.cuda.", 1) if replaces else found

    torch.Tensor.type = type_as_on_gpu
    torch.Tensor.cuda = torch.nn.Module.cuda = lambda self, *arguments, **options: self


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def wrapped(*arguments: Any, **options: Any) -> torch.Tensor:
        if str(options.get("device")).startswith("cuda"):
            options["device"] = "cpu"
        options.pop("pin_memory", None)  # pinned for copies to a device that is not there
        return factory(*arguments, **options)

    return wrapped


class _Stream:
    """A queue of kernels that has always been worked off."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        pass

    def wait_stream(self, stream: _Stream) -> None:
        pass

    def synchronize(self) -> None:
        pass


def _replace_streams() -> None:
    """Megatron-LM wraps its model on a stream beside the current one."""
    torch.cuda.Stream = _Stream
    torch.cuda.current_stream = _returns(_Stream())
    torch.cuda.stream = _returns(contextlib.nullcontext())


def _replace_properties() -> None:
    """What Megatron-LM asks of a device before it starts; it makes its process groups only if there is one."""
    major, minor = 8, 0  # the oldest architecture that it asks nothing special of
    torch.cuda.device_count = _returns(1)
    torch.cuda.get_device_capability = _returns((major, minor))
    torch.cuda.get_device_properties = _returns(types.SimpleNamespace(major=major, minor=minor, name="cpu"))
    torch.cuda.memory_stats = lambda *arguments, **options: collections.defaultdict(int)
    torch.cuda.device_memory_used = _returns(0)


def _replace_kernels() -> None:
    """Two modules that Megatron-LM imports from whether it uses them or not."""
    if importlib.util.find_spec("triton") is None:
        kernels: Any = types.ModuleType(BATCH_INVARIANT)
        kernels.enable_batch_invariant_mode = _needs("batch-invariant mode", "triton")
        kernels.is_batch_invariant_mode_enabled = _returns(False)
        sys.modules.setdefault(BATCH_INVARIANT, kernels)
    from megatron.core.models.bert import bert_layer_specs

    if not bert_layer_specs.HAVE_TE:  # pretrain_bert.py imports the layers also for a job with --spec local
        setattr(bert_layer_specs, BERT_SPEC, None)


def _needs(what: str, package: str) -> Callable[..., Any]:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise ValueError(f"{what} needs {package}, which is not installed")

    return refuse


def _keep_main_to_this_process() -> None:
    """Spawned processes do not import the script that runs here.

    Writing a checkpoint spawns one, which needs nothing of the script; importing it would need the stand-ins again.
    """
    prepare = multiprocessing.spawn.get_preparation_data

    def prepare_without_main(name: str) -> dict[str, Any]:
        return {key: value for key, value in prepare(name).items() if not key.startswith("init_main_from_")}

    multiprocessing.spawn.get_preparation_data = prepare_without_main


def main(arguments: list[str]) -> None:
    """Run ``SCRIPT ARGUMENT ...``, or ``-m LAUNCHER OPTION ... SCRIPT ARGUMENT ...``, on stand-ins where there is no
    CUDA."""
    launcher = None
    if arguments[:1] == ["-m"]:
        launcher, arguments = "".join(arguments[1:2]), arguments[2:]
    script = "".join(arguments[:1])
    if launcher is not None:  # whose options may have values: the script is known by its name
        script = next((word for word in arguments if word.endswith(".py")), script)
    if not os.path.isfile(script):
        what = f"there is no file {script}" if script else "which script?"
        print(f"megatron_on_cpu.py: {what}\n{USAGE}", file=sys.stderr)
        raise SystemExit(EXIT_USAGE)
    install()  # while sys.path leads to pip's megatron-core: that of a checkout is not compiled
    sys.path[0] = os.path.dirname(os.path.abspath(script))
    if install_for_megatron_lm():
        _keep_main_to_this_process()
    if launcher is None:
        sys.argv = arguments
        runpy.run_path(script, run_name="__main__")
    else:
        sys.argv = [launcher, *arguments]
        runpy.run_module(launcher, run_name="__main__", alter_sys=True)
    if torch.distributed.is_initialized():
        # Megatron-LM leaves its process groups as they are, and gloo's threads may then abort the process at its exit.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
