"""The house keeps its shape: rooms import from those above them, and files and functions can be read in one sitting."""

import ast
from pathlib import Path

from tests.conftest import ROOT

PACKAGE = ROOT / "massdpo"
ROOMS = [  # as CONTRIBUTING.md draws them, from the top
    *("errors", "console", "store", "tensors", "config", "data", "model", "selection", "evaluation", "training"),
    *("runs", "report", "tasks", "benchmark"),
]
OUTSIDE = ("__init__", "__main__")  # the public interface and the command look into every room
FILES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(tree: ast.Module) -> set[str]:
    """The rooms that a file imports from, also within a function."""
    found = set()
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            whole = node.module == "massdpo"
            names = [f"massdpo.{alias.name}" for alias in node.names] if whole else [node.module]
        found |= {name.split(".")[1] for name in names if name.startswith("massdpo.")}
    return found


def test_the_rooms_are_those_that_are_drawn() -> None:
    assert {room(path) for path in FILES} == {*ROOMS, *OUTSIDE}


def test_rooms_import_from_those_above_them() -> None:
    for path, tree in FILES.items():
        if (here := room(path)) not in OUTSIDE:
            below = ROOMS[ROOMS.index(here) + 1 :]
            assert not imported(tree) & {*below, *OUTSIDE}, path


def test_files_and_functions_are_read_in_one_sitting() -> None:
    for path, tree in FILES.items():
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 250, path
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 60, f"{path}: {node.name}"
