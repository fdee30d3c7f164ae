"""What the launchers of both hosts understand alike. Imports nothing, so that a wrong command line is told at once."""

from __future__ import annotations

from pathlib import Path


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
