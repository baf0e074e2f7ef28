"""The floors of the package: a module imports from the floors below its own, never from above or beside."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import nbkit

ROOT = Path(nbkit.__file__).parent
FLOORS = [
    {"errors", "runtime", "weights", "datasets", "models", "recipes", "forward", "_files", "_paths", "_rows",
     "_cells", "_catalogue", "_png"},
    {"hooks", "training"},
    {"attribution", "neurons", "shapley", "importance", "sparsity", "concepts", "faithfulness",
     "language", "representations"},
    {"papers", "claims", "notebooks", "exercises"},
    {"widgets", "plots"},
    {"pages"},  # the roof, with every __main__: what tends the shelf from a clone; nobody below imports it
]
FLOOR = {name: n for n, names in enumerate(FLOORS) for name in names}
FILES = [path for path in sorted(ROOT.rglob("*.py")) if path != ROOT / "__init__.py"]


def module(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imported(path: Path) -> set[str]:
    """The modules of nbkit a file imports anywhere in it, by their first name below ``nbkit``."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "nbkit":
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nbkit."):
            names.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("nbkit.")}
    return {name for name in names if name in FLOOR}


def test_every_module_has_a_floor():
    assert {module(path) for path in FILES} == set(FLOOR)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_go_down(path):
    own = module(path)
    if path.name == "__main__.py":  # nobody's import: it may call on every floor
        return
    # the ground may stand on itself: errors and paths are below everything
    wrong = {n for n in imported(path) - {own} if FLOOR[n] > FLOOR[own] or FLOOR[n] == FLOOR[own] > 0}
    assert wrong == set()


def test_floor_0_has_no_circle():
    below = {own: set() for own in FLOORS[0]}
    for path in FILES:
        if module(path) in below:
            below[module(path)] |= imported(path) - {module(path)}
    while below:
        free = {own for own, needs in below.items() if not needs & set(below)}
        assert free, f"imported in a circle: {below}"
        below = {own: needs for own, needs in below.items() if own not in free}
