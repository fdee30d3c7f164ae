"""Packaging of amdp_plugin. The planner installs alone; the host framework comes with an extra."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def read_version() -> str:
    """The version as written in the package, read as text: importing it here would need its dependencies."""
    source = (ROOT / "amdp_plugin" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', source, re.MULTILINE)
    if match is None:
        raise RuntimeError('amdp_plugin/__init__.py must hold a line like: __version__ = "0.1.0"')
    return match.group(1)


# Third parties add schedules under the entry-point group "amdp_plugin.schedules"; this package only reads it.
setup(
    name="amdp_plugin",
    version=read_version(),
    description="Asynchronous pipeline-parallel schedules for DeepSpeed and Megatron",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    packages=find_packages(include=["amdp_plugin", "amdp_plugin.*"]),
    package_data={"amdp_plugin": ["DESIGN.md", "docs/*.md"]},
    python_requires=">=3.10,<3.14",
    install_requires=["pydantic>=2", "typer", "matplotlib"],
    extras_require={
        "deepspeed": ["torch>=2.11", "deepspeed>=0.19.8"],
        "megatron": ["torch>=2.11", "megatron-core>=0.16.1"],
        "test": ["pytest", "pytest-xdist", "hypothesis", "ruff", "mypy"],
    },
    entry_points={"console_scripts": ["amdp = amdp_plugin.cli:main"]},
)
