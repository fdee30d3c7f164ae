"""Options of the command line that take several values."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any, ClassVar

from typer.core import TyperCommand

NUMBER = re.compile(r"-[\d.]")
"""How a value below zero begins, which no option does."""


class ListsCommand(TyperCommand):
    """Takes several values after one of :attr:`lists`, and leaves what stands after ``--`` alone."""

    lists: ClassVar[tuple[str, ...]] = ()

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Rewrite ``--configs A B -- C`` as click knows it: ``--configs A --configs B -- C``.

        Raises:
            ValueError: where no value follows one of :attr:`lists`.
        """
        own, rest = (args[: args.index("--")], args[args.index("--") :]) if "--" in args else (args, [])
        rewritten: list[str] = []
        repeated: str | None = None
        for argument, following in pairwise([*own, "--"]):
            if argument.startswith("-") and not NUMBER.match(argument):
                repeated = argument if argument in self.lists else None
                if repeated and following.startswith("-") and not NUMBER.match(following):
                    raise ValueError(f"{repeated} needs one value or more after it")
                rewritten += [] if repeated else [argument]
            else:
                rewritten += [repeated, argument] if repeated else [argument]
        return super().parse_args(ctx, [*rewritten, *rest])
