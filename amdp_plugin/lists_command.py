"""Options of the command line that take several values."""

from __future__ import annotations

from typing import Any, ClassVar

from typer.core import TyperCommand


class ListsCommand(TyperCommand):
    """Takes several values after one of :attr:`lists`, and leaves what stands after ``--`` alone."""

    lists: ClassVar[tuple[str, ...]] = ()

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Rewrite ``--configs A B -- C`` as click knows it: ``--configs A --configs B -- C``."""
        own, rest = (args[: args.index("--")], args[args.index("--") :]) if "--" in args else (args, [])
        rewritten: list[str] = []
        repeated: str | None = None
        for argument in own:
            if argument.startswith("-"):
                repeated = argument if argument in self.lists else None
                rewritten += [] if repeated else [argument]
            else:
                rewritten += [repeated, argument] if repeated else [argument]
        return super().parse_args(ctx, [*rewritten, *rest])
