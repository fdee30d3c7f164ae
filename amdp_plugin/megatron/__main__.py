"""``python -m amdp_plugin.megatron path/to/pretrain_gpt.py ...`` runs an unmodified Megatron-LM job, patched.

Schedules are chosen with ``--pipeline-schedule``; without it the job is Megatron's own. A script on megatron-core
alone, where there is no Megatron-LM to patch, runs as it is. ``--record DIR`` before the script also writes what every
rank did and waited for, to DIR.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec

from ..compare.launching import EXIT_USAGE, run_script, take_record

USAGE = "usage: python -m amdp_plugin.megatron [--record DIR] SCRIPT [ARGUMENT ...]"


def main(arguments: list[str]) -> None:
    """Run the script as ``python SCRIPT ARGUMENT ...`` would, with its folder first on ``sys.path``."""
    if arguments[:1] in (["-h"], ["--help"]):
        print(USAGE)
        return
    try:
        directory = take_record(arguments)
        if not arguments or not os.path.isfile(arguments[0]):
            raise ValueError(f"there is no file {arguments[0]}" if arguments else "which script?")
    except ValueError as error:
        print(f"python -m amdp_plugin.megatron: {error}\n{USAGE}", file=sys.stderr)
        raise SystemExit(EXIT_USAGE) from None
    sys.path.insert(0, os.path.dirname(os.path.abspath(arguments[0])))
    lines = _patch()
    if directory is not None:
        from .record import record_to

        record_to(directory)
        lines.append(f"recording to {directory}")
    if os.environ.get("RANK", "0") == "0":
        print(*(f"[amdp] {line}" for line in lines), sep="\n", flush=True)
    sys.argv = arguments
    run_script(arguments[0])


def _patch() -> list[str]:
    """Patch Megatron-LM where there is one."""
    from . import patch

    if find_spec("megatron.training") is None:
        return ["no megatron.training here: nothing is patched"]
    return patch()


if __name__ == "__main__":
    main(sys.argv[1:])
