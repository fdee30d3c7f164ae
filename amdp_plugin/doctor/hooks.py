"""Which hooks of the plugin apply: those whose host has every name that they use, whatever its version.

The names are what the adapters import, read from their source, and what they reach in another way, listed here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..megatron.targets import TARGETS
from .checks import INSTALL, INSTALL_CHECKOUT, Finding, Mark, checkout, has_cuda
from .source import find, has, imported

ADAPTERS = Path(__file__).parents[1]
ENGINE = "deepspeed.runtime.pipe.engine"
SCHEDULES = "megatron.core.pipeline_parallel.schedules"


@dataclass(frozen=True)
class Hook:
    """A way into a host.

    Args:
        entry: how a job takes it.
        needs: names of the findings that have to be well.
        packages: of the host; what ``adapter``, a folder of ours, imports from them is used.
        names: (module, name) of what is used besides.
        remedy: what brings a host that has all of them.
        first: a folder that such jobs import from before all others.
    """

    name: str
    entry: str
    needs: tuple[str, ...]
    adapter: str
    packages: tuple[str, ...]
    names: tuple[tuple[str, str], ...]
    remedy: str
    first: Path | None = None

    def check(self, found: Mapping[str, Finding]) -> Finding:
        """Whether it applies, given what was found, by name."""
        if unmet := [name for name in self.needs if found[name].mark is not Mark.ok]:
            return Finding(self.name, Mark.missing, f"needs {', '.join(unmet)}")
        used = sorted(self.uses())
        if lacking := [f"{module}.{name}" for module, name in used if not has(module, name, self.first)]:
            return Finding(self.name, Mark.wrong, f"does not have {', '.join(lacking)}", self.remedy)
        return Finding(self.name, Mark.ok, self.entry)

    def uses(self) -> set[tuple[str, str]]:
        """(module, name) of all that it uses of its host."""
        return set(self.names).union(*(imported(ADAPTERS / self.adapter, package) for package in self.packages))


def hooks() -> Iterator[Hook]:
    """All that there are."""
    yield Hook(
        "DeepSpeed",
        "amdp_plugin.initialize(), amdp_plugin.install(), python -m amdp_plugin SCRIPT",
        ("torch", "deepspeed", "C++ compiler", "ninja"),
        "deepspeed",
        ("deepspeed",),
        (
            ("deepspeed", "initialize"),
            ("deepspeed", "PipelineEngine"),
            (ENGINE, "PipelineEngine._INSTRUCTION_MAP"),
            (ENGINE, "PipelineEngine._train_schedule"),
        ),
        f'{INSTALL} ".[deepspeed]"',
    )
    yield Hook(
        "Megatron-Core",
        "amdp_plugin.megatron.forward_backward_func(), in a loop of your own",
        ("torch", "megatron-core"),
        "megatron",
        ("megatron.core",),
        tuple((SCHEDULES, name) for name in ("get_forward_backward_func", "forward_step", "backward_step")),
        f'{INSTALL} ".[megatron]"',
        None if find("megatron.core") else checkout(),
    )
    python = "python" if has_cuda() else "python scripts/megatron_on_cpu.py"
    yield Hook(
        "Megatron-LM",
        f"amdp_plugin.megatron.patch(), {python} -m amdp_plugin.megatron SCRIPT",
        ("torch", "megatron-core", "Megatron-LM"),
        "megatron",
        ("megatron.core", "megatron.training"),
        TARGETS,
        INSTALL_CHECKOUT,
        checkout(),
    )
