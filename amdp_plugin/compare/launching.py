"""What the launchers of both hosts do alike. Imports nothing heavy, so that a wrong command line is told at once."""

from __future__ import annotations

import json
import os
import runpy
import sys
import time
from pathlib import Path

EXIT_USAGE = 2


def take_record(arguments: list[str]) -> Path | None:
    """Take ``--record DIR`` off the front of ``arguments``.

    Raises:
        ValueError: for another option that begins so, and where no directory follows.
    """
    if not arguments or not arguments[0].startswith("--record"):
        return None
    option, equals, directory = arguments.pop(0).partition("=")
    if option != "--record":
        raise ValueError(f"unknown option {option}")
    if not equals:
        if not arguments:
            raise ValueError("--record needs a directory")
        directory = arguments.pop(0)
    return Path(directory)


def run_script(script: str) -> None:
    """Run ``script`` as ``python SCRIPT`` would. What ends it is told to ``torchrun``, too, whose last lines then hold
    the first error of all ranks. A job that is refused ends with that message alone."""
    from ..settings import ScheduleRefused

    try:
        runpy.run_path(script, run_name="__main__")
    except ScheduleRefused as error:
        _tell_torchrun(str(error))
        print(f"[amdp] error, rank {os.environ.get('RANK', '0')}: {error}", file=sys.stderr, flush=True)
        raise SystemExit(EXIT_USAGE) from None
    except Exception as error:
        _tell_torchrun(f"{type(error).__name__}: {error}")
        raise


def _tell_torchrun(message: str) -> None:
    """In the file that it reads when a rank has failed. Its own decorator, ``record``, would write tracebacks as well,
    which the ranks have printed: those of peers that failed for it would come after the first error."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        told = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
        Path(path).write_text(json.dumps({"message": told}), encoding="utf-8")
