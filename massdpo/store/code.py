"""The code that decides numbers, as a key: without its comments and layout."""

import ast
import importlib
import importlib.util
import inspect
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from massdpo.store.content import digest

PACKAGE = Path(__file__).parents[1]
# Rooms and files that only name, report or check: everything else may change a number, and is in the keys.
REPORTING = {
    *("__init__", "__main__", "config", "console", "report", "tasks", "benchmark", "data/download"),
    *("runs/card", "runs/folder", "runs/machine", "runs/plan", "runs/provenance", "runs/shown", "runs/timing"),
    "runs/trackers",
}
INSTALLED = tuple(Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib"))


@cache
def package_code(*rooms: str) -> str:
    """A key of the package's modules that can change a number, or of those in some rooms (`data`, `store`).

    They count as they were when this process first asked.
    """
    files = {file.relative_to(PACKAGE).with_suffix("").as_posix(): file for file in sorted(PACKAGE.rglob("*.py"))}
    counted = {
        name: file
        for name, file in files.items()
        if not REPORTING.intersection((name, name.split("/")[0])) and (not rooms or name.split("/")[0] in rooms)
    }
    return digest({name: meaning(file.read_bytes()) for name, file in counted.items()})


def target_code(node: Any) -> list[str]:
    """The code that defines each `_target_` outside the package in a config node, and what it imports.

    Installed packages are not followed.
    """
    found: dict[str, str] = {}  # by file
    for target in sorted(set(_targets(node))):
        module, _, name = target.rpartition(".")
        if module.split(".")[0] == PACKAGE.name:
            continue
        defining = importlib.import_module(module)
        try:
            _follow(Path(inspect.getsourcefile(defining) or ""), defining.__package__ or "", found)
        except (OSError, TypeError):  # a notebook's, or a compiled one
            found[target] = _typed(getattr(defining, name))
    return sorted(found.values())


def meaning(source: bytes | str) -> str:
    """Python code without comments, docstrings and layout."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def _targets(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("_target_"), str):
            yield node["_target_"]
        for inside in node.values():
            yield from _targets(inside)
    elif isinstance(node, list):
        for inside in node:
            yield from _targets(inside)


def _typed(part: Any) -> str:
    try:
        return meaning(inspect.getsource(part))
    except (OSError, TypeError):
        return repr(getattr(part, "__qualname__", part))


def _follow(file: Path, package: str, found: dict[str, str]) -> None:
    """Add a file's code, and that of every module it imports that is not installed."""
    source = file.read_bytes()
    found[str(file)] = meaning(source)
    for imported in _imports(ast.parse(source), package):
        try:
            spec = importlib.util.find_spec(imported)
        except (ImportError, ValueError, AttributeError):  # not a module, but a name in one
            continue
        if not spec or not spec.has_location or not (origin := spec.origin or "").endswith(".py"):
            continue
        followed = not any(Path(origin).is_relative_to(place) for place in (*INSTALLED, PACKAGE))
        if followed and origin not in found:
            _follow(Path(origin), imported if spec.submodule_search_locations else spec.parent or "", found)


def _imports(tree: ast.Module, package: str) -> Iterator[str]:
    """Every imported name that may be a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package or ".")
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
