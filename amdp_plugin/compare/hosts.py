"""What is compared under each host, and how a script is told: here alone their command lines differ."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..settings import read_schedule
from .recording import STOCK


@dataclass(frozen=True)
class Candidate:
    """One of the things that are compared.

    Args:
        name: of its run, in the table and as a folder.
        arguments: what tells the script to run it.
    """

    name: str
    arguments: Sequence[str]


@dataclass(frozen=True)
class Host:
    """A framework whose jobs can be compared.

    Args:
        launcher: the module that runs a script and takes ``--record``.
        script: what is run where nothing else is named.
        option: of ``amdp compare``, which names what is compared.
        candidate: reads one of its values; raises ``ValueError`` where that is none.
    """

    launcher: str
    script: Path
    option: str
    candidate: Callable[[str], Candidate]


def configuration(path: str) -> Candidate:
    """A DeepSpeed configuration: the name of a JSON file."""
    _read_json(Path(path))
    return Candidate(Path(path).stem, ("--deepspeed_config", path))


def pipeline_schedule(text: str) -> Candidate:
    """A schedule for a Megatron job: its name, or ``NAME:FILE.json`` with its options; :data:`.STOCK` is Megatron's."""
    name, colon, path = text.partition(":")
    told = ["--pipeline-schedule", name]
    if text == STOCK:
        return Candidate(STOCK, told)
    options = _read_json(Path(path)) if colon else {}
    if not isinstance(options, dict):
        raise ValueError(f"{path} must hold an object, the options of {name}")
    read_schedule({**options, "name": name}, f"{text!r}")
    if colon:
        return Candidate(f"{name}-{Path(path).stem}", [*told, "--pipeline-schedule-options", path])
    return Candidate(name, told)


def _read_json(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


HOSTS = {
    "deepspeed": Host("amdp_plugin", Path("scripts/train_gpt.py"), "--configs", configuration),
    "megatron": Host("amdp_plugin.megatron", Path("scripts/train_gpt_megatron.py"), "--schedules", pipeline_schedule),
}
