"""``python -m amdp_plugin script.py ...`` runs an unmodified DeepSpeed script with :func:`amdp_plugin.install`."""

from __future__ import annotations

import os
import runpy
import sys

import amdp_plugin

USAGE = "usage: python -m amdp_plugin SCRIPT [ARGUMENT ...]"


def main() -> None:
    """Run the script as ``python SCRIPT ARGUMENT ...`` would."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(USAGE, file=sys.stderr)
        raise SystemExit(0 if len(sys.argv) == 2 else 2)
    script = sys.argv[1]
    if not os.path.isfile(script):
        print(f"python -m amdp_plugin: there is no file {script}\n{USAGE}", file=sys.stderr)
        raise SystemExit(2)
    amdp_plugin.install()
    sys.argv = sys.argv[1:]
    sys.path[0] = os.path.dirname(os.path.abspath(script))
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
