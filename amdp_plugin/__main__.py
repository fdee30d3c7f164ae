"""``python -m amdp_plugin script.py ...`` runs an unmodified DeepSpeed script with :func:`amdp_plugin.install`.

``python -m amdp_plugin --record DIR script.py ...`` also writes what every rank did and waited for, to DIR.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import amdp_plugin
from amdp_plugin.compare.launching import EXIT_USAGE, run_script, take_record

USAGE = "usage: python -m amdp_plugin [--record DIR] SCRIPT [ARGUMENT ...]"


def main() -> None:
    """Run the script as ``python SCRIPT ARGUMENT ...`` would."""
    passed_on, arguments = _take_local_rank(sys.argv[1:])
    if arguments[:1] in (["-h"], ["--help"]):
        print(USAGE)
        raise SystemExit(0)
    try:
        directory = take_record(arguments)
    except ValueError as error:
        _fail(str(error))
    if not arguments:
        _fail("which script?")
    script = arguments[0]
    if not os.path.isfile(script):
        _fail(f"there is no file {script}")
    amdp_plugin.install()
    if directory is not None:
        from amdp_plugin.deepspeed.record import record_to

        record_to(directory)
    sys.argv = [script, *passed_on, *arguments[1:]]
    sys.path[0] = os.path.dirname(os.path.abspath(script))
    run_script(script)


def _take_local_rank(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Take off the front what DeepSpeed's launcher puts there, and means for the script."""
    count = 1 if arguments and arguments[0].startswith(("--local_rank=", "--local-rank=")) else 0
    return arguments[:count], arguments[count:]


def _fail(message: str) -> NoReturn:
    print(f"python -m amdp_plugin: {message}\n{USAGE}", file=sys.stderr)
    raise SystemExit(EXIT_USAGE)


if __name__ == "__main__":
    main()
