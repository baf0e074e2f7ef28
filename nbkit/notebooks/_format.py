"""How a notebook's code looks when `ruff format` has laid it out, by ``notebooks/ruff.toml``."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nbkit import _cells, _paths
from nbkit._files import write_whole
from nbkit.notebooks._normal import load, text

if TYPE_CHECKING:
    from nbformat import NotebookNode


def reformat(path: str | Path) -> bool:
    """Lay the code of a notebook file out by ``ruff format``, in place; outputs stay. Whether anything changed.

    Raises: ValueError where a cell is no Python, ModuleNotFoundError without ruff.
    """
    notebook = load(Path(path))
    changed = _laid_out_otherwise(notebook)
    for number, source in changed.items():
        notebook.cells[number - 1].source = source
    if changed:
        write_whole(path, text(notebook).encode())
    return bool(changed)


def unformatted(path: str | Path) -> list[str]:
    """Which cells of a notebook file ``ruff format`` would lay out otherwise, a line each."""
    found = [f"cell {number}: not as ruff formats it" for number in _laid_out_otherwise(load(Path(path)))]
    return [*found, f"run `make format NB={path}`"] if found else []


def _laid_out_otherwise(notebook: NotebookNode) -> dict[int, str]:
    """Place of a cell, counted from 1 -> its code as ruff lays it out, where that is not how it stands."""
    places = [n for n, cell in enumerate(notebook.cells, start=1) if cell.cell_type == "code"]
    sources = [notebook.cells[n - 1].source for n in places]
    new = _formatted(sources) if sources else []
    cells = zip(places, sources, new, strict=True)
    return {number: after for number, before, after in cells if before.rstrip() != after.rstrip()}


def _formatted(sources: Sequence[str]) -> list[str]:
    """The code cells of one notebook, laid out anew; what is laid out already comes back as it is."""
    empty = {"cell_type": "code", "metadata": {}, "outputs": [], "execution_count": None}
    cells = [{**empty, "source": source} for source in sources]
    notebook = {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 4}
    config = str(_paths.notebooks_dir() / "ruff.toml")
    command = [sys.executable, "-m", "ruff", "format", "--config", config, "--stdin-filename", "a.ipynb", "-"]
    done = subprocess.run(command, input=json.dumps(notebook), capture_output=True, text=True, encoding="utf-8")
    if "No module named ruff" in done.stderr:
        raise ModuleNotFoundError("formatting needs ruff: pip install 'nbkit[test]'", name="ruff")
    if done.returncode:
        raise ValueError(f"ruff cannot format it: {done.stderr.strip()}")
    return [_cells.source(cell) for cell in json.loads(done.stdout)["cells"]]
