"""Looks for modules and for names in their source, and runs none of it.

To import a host is slow and noisy, and fails on machines whose user wants to know why.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path


def find(module: str, first: Path | None = None) -> Path | None:
    """The file of ``module``, as an import would find it.

    Args:
        first: a folder to look in before ``sys.path``.
    """
    prefix, *rest = module.split(".")
    if first is not None and (found := _below(first, [prefix, *rest])):
        return found
    spec = find_spec(prefix)
    while spec is not None and spec.origin is None and rest:  # a namespace package: it has no code that would run
        prefix = f"{prefix}.{rest.pop(0)}"
        spec = find_spec(prefix)
    if spec is None or spec.origin is None:
        return None
    if not rest:
        return Path(spec.origin)
    found_below = (_below(Path(folder), rest) for folder in spec.submodule_search_locations or ())
    return next(filter(None, found_below), None)


def has(module: str, name: str, first: Path | None = None) -> bool:
    """Whether ``module`` binds ``name``, which may be a ``Class.member``, or has a module of that name."""
    path = find(module, first)
    if path is None:
        return False
    body: list[ast.stmt] = _parse(path)
    for part in name.split("."):
        bound = dict(_bound(body))
        if part not in bound:
            return find(f"{module}.{name}", first) is not None
        body = getattr(bound[part], "body", [])
    return True


def imported(folder: Path, package: str) -> set[tuple[str, str]]:
    """(module, name) of all that the modules in ``folder`` import from ``package`` and from what is below it."""
    return {
        (node.module, alias.name)
        for path in folder.glob("*.py")
        for node in ast.walk(ast.parse(path.read_bytes()))
        if isinstance(node, ast.ImportFrom) and node.module and not node.level
        if f"{node.module}.".startswith(f"{package}.")
        for alias in node.names
    }


def _below(folder: Path, parts: list[str]) -> Path | None:
    module = folder.joinpath(*parts)
    return next((path for path in (module / "__init__.py", module.with_suffix(".py")) if path.is_file()), None)


@cache
def _parse(path: Path) -> list[ast.stmt]:
    try:
        return ast.parse(path.read_bytes()).body
    except (SyntaxError, ValueError):  # compiled, or of another Python: it binds nothing that could be read
        return []


def _bound(nodes: Iterable[ast.AST]) -> Iterator[tuple[str, ast.AST]]:
    """Names that a body binds, in whatever branch, and what they are bound to or by."""
    for node in nodes:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.name, node
            case ast.alias():
                yield (node.asname or node.name).partition(".")[0], node
            case ast.Name(ctx=ast.Store()):
                yield node.id, node
            case _:
                yield from _bound(ast.iter_child_nodes(node))
