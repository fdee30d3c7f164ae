"""``amdp doctor``: what is on this machine, which hooks of the plugin apply to it, and what to do about the rest."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

EXIT_NO_HOST = 1


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Write JSON, for machines.")] = False) -> int:
    """Say what is installed, which hosts can be used, and what to install. Exit code 1 where there is none."""
    from .. import __version__
    from .checks import CHECKS, Finding, Mark
    from .hooks import hooks

    found = [check() for check in CHECKS]
    applied = [hook.check({finding.name: finding for finding in found}) for hook in hooks()]
    usable = any(hook.mark is Mark.ok for hook in applied)
    if as_json:
        sections = {"found": [asdict(finding) for finding in found], "hooks": [asdict(hook) for hook in applied]}
        print(json.dumps({"amdp_plugin": __version__, "usable": usable, **sections}, indent=2))
    else:
        width = max(len(finding.name) for finding in found)

        def rows(findings: list[Finding]) -> list[str]:
            return [f"{finding.mark.value:<7}  {finding.name:<{width}}  {finding.detail}" for finding in findings]

        remedies = [f"{finding.name}: {finding.remedy}" for finding in [*found, *applied] if finding.remedy]
        lines = [f"amdp_plugin {__version__}", "", *rows(found), "", "Hooks, and how a job takes them:", *rows(applied)]
        lines += ["", "What to do:", *remedies] if remedies else []
        print("\n".join(lines if usable else [*lines, "", "No host can be used."]))
    return 0 if usable else EXIT_NO_HOST
