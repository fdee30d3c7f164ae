"""``python -m amdp_plugin.megatron path/to/pretrain_gpt.py ...`` runs an unmodified Megatron-LM job, patched.

Schedules are chosen with ``--pipeline-schedule``; without it the job is Megatron's own.
"""

from __future__ import annotations

import os
import runpy
import sys

USAGE = "usage: python -m amdp_plugin.megatron SCRIPT [ARGUMENT ...]"
EXIT_USAGE = 2


def main(arguments: list[str]) -> None:
    """Run the script as ``python SCRIPT ARGUMENT ...`` would, with its folder first on ``sys.path``."""
    if arguments[:1] in (["-h"], ["--help"]):
        print(USAGE)
        return
    if not arguments or not os.path.isfile(arguments[0]):
        what = f"there is no file {arguments[0]}" if arguments else "which script?"
        print(f"python -m amdp_plugin.megatron: {what}\n{USAGE}", file=sys.stderr)
        raise SystemExit(EXIT_USAGE)
    sys.path.insert(0, os.path.dirname(os.path.abspath(arguments[0])))
    from . import patch

    for line in patch():
        if os.environ.get("RANK", "0") == "0":
            print(f"[amdp] {line}", flush=True)
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
