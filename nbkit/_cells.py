"""Reading the cells of a notebook file: plain JSON, no Jupyter needed."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DIFFICULTIES = ("easy", "medium", "hard")
_LABELS = {"Know before": "know_before", "Able to afterwards": "able", "Time": "time", "Difficulty": "difficulty"}
_LABEL = re.compile(rf"^\*\*({'|'.join(_LABELS)})\*\*:", re.M)


def calls(node: ast.AST) -> list[ast.Call]:
    """The calls made when ``node`` runs; those inside a function or a lambda wait until it is called."""
    later = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
    below = [] if later else [c for child in ast.iter_child_nodes(node) for c in calls(child)]
    return [node, *below] if isinstance(node, ast.Call) else below


@dataclass(frozen=True)
class Head:
    """What a notebook's title cell says of it; a text is empty where the cell does not say it."""

    title: str
    know_before: str
    able: str
    time: str
    difficulty: str


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


def head(cells: Sequence[dict[str, Any]]) -> Head:
    """The title of a notebook and the labelled paragraphs its title cell ends with.

    A paragraph starts with its label, ``**Time**: 25 s to run, 45 minutes to work through.``, and ends at an empty
    line or at the next label.
    """
    text = _first(cells)
    title = re.search(r"^# (.+)$", text, re.M)
    found = dict.fromkeys(_LABELS.values(), "")
    starts = list(_LABEL.finditer(text))
    for start, end in zip(starts, [*(label.start() for label in starts[1:]), None], strict=False):
        paragraph = text[start.end() : end].split("\n\n")[0]
        found[_LABELS[start.group(1)]] = " ".join(paragraph.split())
    return Head(title.group(1).strip() if title else "", **found)


def head_problems(cells: Sequence[dict[str, Any]]) -> list[str]:
    """What a title cell leaves out of the four labelled paragraphs, a line each."""
    said = head(cells)
    found = [f"the title cell has no paragraph '**{label}**: ...'" for label, name in _LABELS.items()
             if not getattr(said, name)]  # fmt: skip
    if said.time and not re.search(r"\d+ (s|minutes?) to run, (about )?\d+ minutes to work through", said.time):
        found.append(f"Time reads '25 s to run, 45 minutes to work through', not {said.time!r}")
    if said.difficulty and said.difficulty.rstrip(".") not in DIFFICULTIES:
        found.append(f"Difficulty is {', '.join(DIFFICULTIES[:-1])} or {DIFFICULTIES[-1]}, not {said.difficulty!r}")
    if not found and _LABEL.findall(_first(cells)) != list(_LABELS):
        found.append(f"the labelled paragraphs are, in this order, {', '.join(_LABELS)}")
    return found


def _first(cells: Sequence[dict[str, Any]]) -> str:
    return source(cells[0]) if cells and cells[0]["cell_type"] == "markdown" else ""
