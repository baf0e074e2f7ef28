"""Reading the cells of a notebook file: plain JSON, no Jupyter needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read(path: str | Path) -> dict[str, Any]:
    """The notebook as a dict. Raises FileNotFoundError, ValueError (not a notebook of format 4)."""
    text = Path(path).read_text(encoding="utf-8")
    try:
        notebook = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not a notebook: {error}") from None
    if not isinstance(notebook, dict) or notebook.get("nbformat") != 4 or "cells" not in notebook:
        raise ValueError(f"{path} is not a notebook of format 4")
    return notebook


def source(cell: dict[str, Any]) -> str:
    """A cell's text, which the file may hold as one string or as a list of lines."""
    text = cell["source"]
    return text if isinstance(text, str) else "".join(text)


def numbered(path: str | Path, tag: str | None = None) -> list[tuple[int, dict[str, Any]]]:
    """(place counted from 1, cell) for every cell, or for those that carry ``tag``."""
    cells = enumerate(read(path)["cells"], start=1)
    return [(n, cell) for n, cell in cells if tag is None or tag in cell.get("metadata", {}).get("tags", [])]
