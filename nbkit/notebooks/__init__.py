"""Notebook files: run them in a fresh kernel and store them in one normal form.

    python -m nbkit.notebooks run notebooks/01-saliency/01-grad-cam.ipynb       # what `make run NB=...` does
    python -m nbkit.notebooks format notebooks/01-saliency/01-grad-cam.ipynb    # what `make format NB=...` does
    python -m nbkit.notebooks check                                             # all of the kit's notebooks

The normal form is what a reader's eyes and a reviewer's diff need: pictures instead of widget views (GitHub cannot
show those, JupyterLab not without a kernel), execution counts from 1, no timestamps, no progress bars, no paths of
the machine it ran on. A cell tagged ``hide-input`` is collapsed in JupyterLab, and no other one is.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from nbkit import _cells
from nbkit._files import write_whole
from nbkit.notebooks._execute import CellFailed, execute
from nbkit.notebooks._format import reformat, unformatted
from nbkit.notebooks._normal import PLACEHOLDER, load, normalise, problems, text, without_progress

if TYPE_CHECKING:
    from nbformat import NotebookNode

__all__ = [
    "CellFailed", "MAX_KB", "PLACEHOLDER", "cells", "check", "execute", "normalise", "problems", "reformat", "run",
    "unformatted",
]  # fmt: skip

MAX_KB = 400  # a notebook on GitHub beyond this loads slowly, and every run adds as much to the history


def cells(path: str | Path, tag: str | None = None) -> list[str]:
    """The code cells' sources of a notebook file, in order: all, or those that carry ``tag``.

    >>> notebooks.cells("notebooks/02-concepts/01-craft.ipynb", tag="method")
    """
    return [_cells.source(cell) for _, cell in _cells.numbered(path, tag) if cell["cell_type"] == "code"]


def run(path: str | Path, *, timeout: float = 600) -> NotebookNode:
    """Execute a notebook and store it in normal form, in place.

    The file changes only when every cell ran and nothing forbidden was printed, and then at once.

    Raises: CellFailed; ValueError where :func:`problems` has something to say.
    """
    path = Path(path)
    executed = execute(path, timeout=timeout)
    _show_dropped(executed)
    notebook = normalise(executed)
    if found := problems(notebook):
        raise ValueError(f"{path.name} is left as it was:\n" + "\n".join(f"  {line}" for line in found))
    write_whole(path, text(notebook).encode())
    return notebook


def check(path: str | Path) -> list[str]:
    """Why a notebook file is not in normal form, a line each; empty where it is."""
    path = Path(path)
    notebook = load(path)
    found = problems(notebook)
    for number, cell in enumerate(notebook.cells, start=1):
        if cell.cell_type == "code" and cell.source.strip() and cell.execution_count is None:
            found.append(f"cell {number}: not executed")
    if not found and text(normalise(notebook)) != path.read_text(encoding="utf-8"):
        found.append(f"not in normal form: run `make run NB={path}`")
    return found


def _show_dropped(notebook: NotebookNode) -> None:
    """Warnings are not stored, but whoever runs the notebook should see them once."""
    for number, cell in enumerate(notebook.cells, start=1):
        for output in cell.get("outputs", []):
            if output.get("name") == "stderr" and (told := without_progress(output.text).strip()):
                print(f"cell {number} wrote to stderr (not stored):\n{told}", file=sys.stderr)
