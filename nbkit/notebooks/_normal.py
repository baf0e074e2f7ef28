"""The one form a notebook is stored in: what stays of an executed notebook, and what may not be stored at all."""

from __future__ import annotations

import base64
import copy
import hashlib
import html
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbkit import _cells
from nbkit._png import lighter

if TYPE_CHECKING:
    from nbformat import NotebookNode

PLACEHOLDER = "[a control: run the cell to use it]"
_CHECKS_CONTROLS = re.compile(r"^\s*(widgets\.)?selfcheck\(", re.MULTILINE)

WIDGET = "application/vnd.jupyter.widget-view+json"
METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"file_extension": ".py", "mimetype": "text/x-python", "name": "python"},
}
_KEPT_CELL_METADATA = ("tags", "slideshow")
_ABSOLUTE = re.compile(
    r"(?<![\w./:~-])(?:/(?:home|root|Users|tmp|work|opt|usr|var|mnt|private|workspace|content)/[\w.-]+|[A-Z]:\\+Users)"
)


def normalise(notebook: NotebookNode) -> NotebookNode:
    """A copy of an executed notebook in normal form; normalising twice changes nothing."""
    from nbformat import from_dict

    notebook = copy.deepcopy(notebook)
    notebook.metadata = from_dict(copy.deepcopy(METADATA))
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    count = 0
    for cell in notebook.cells:
        cell.metadata = from_dict({k: v for k, v in cell.metadata.items() if k in _KEPT_CELL_METADATA and v})
        cell.source = cell.source.rstrip()
        if cell.cell_type != "code":
            continue
        # how a figure is drawn, and the check that every control answers, are for whoever writes the notebook
        if "hide-input" in cell.metadata.get("tags", []) or _CHECKS_CONTROLS.search(cell.source):
            cell.metadata.jupyter = from_dict({"source_hidden": True})
        count += bool(cell.source.strip())
        cell.execution_count = count if cell.source.strip() else None
        cell.outputs = _outputs(cell.outputs, cell.execution_count)
    return notebook


def problems(notebook: NotebookNode) -> list[str]:
    """What may not be stored, a line each: errors, absolute paths, and cells that show a machine's memory addresses."""
    found = []
    for number, cell in enumerate(notebook.cells, start=1):
        texts = [("source", cell.source)] + [
            ("output", text) for output in cell.get("outputs", []) for text in _texts(output)
        ]
        for where, text in texts:
            for match in _ABSOLUTE.finditer(text):
                found.append(f"cell {number}: an absolute path in its {where}: {match.group()}")
            if where == "output" and (match := re.search(r"<[^<>]* at 0x[0-9a-f]{6,}>", text)):
                found.append(f"cell {number}: an object's address in its output, new at every run: {match.group()}")
        if any(output.output_type == "error" for output in cell.get("outputs", [])):
            found.append(f"cell {number}: a stored error")
    return found


def load(path: Path) -> NotebookNode:
    """The notebook, every cell with an id of its own (nbformat would make random ones)."""
    import nbformat

    raw = _cells.read(path)
    taken: set[str] = set()
    for place, cell in enumerate(raw["cells"]):
        name = cell.get("id", "")
        if not name or name in taken:
            name = hashlib.sha256(f"{place}\n{_cells.source(cell)}".encode()).hexdigest()[:8]
        cell["id"] = name
        taken.add(name)
    return nbformat.reads(json.dumps({**raw, "nbformat_minor": 5}), as_version=4)


def text(notebook: NotebookNode) -> str:
    import nbformat

    return nbformat.writes(notebook) + "\n"


def _outputs(outputs: Iterable[NotebookNode], count: int | None) -> list[NotebookNode]:
    from nbformat import from_dict

    kept: list[NotebookNode] = []
    for output in outputs:
        below = None
        if output.output_type == "stream":
            output.text = without_progress(output.text)
            if output.name == "stderr" or not output.text:
                continue
            if kept and kept[-1].output_type == "stream":
                kept[-1].text += output.text
                continue
        elif "data" in output:
            below = caption(output)
            if not _without_widget(output):
                continue
        if "image/png" in output.get("data", {}) and output.output_type == "display_data":
            _lighten(output)
        if output.output_type == "execute_result":
            output.execution_count = count
        if "metadata" in output:
            output.metadata = type(output.metadata)({k: v for k, v in output.metadata.items() if k in output.data})
        kept.extend([output] if below is None else [output, from_dict(below)])
    return kept


def caption(output: dict[str, Any]) -> dict[str, Any] | None:
    """The output that goes below an explorer's picture once its widget view is gone: what the reader can turn.

    None for any other output. ``output`` is one of a notebook's, as it came from the kernel.
    """
    about = output.get("metadata", {}).get("image/png", {})
    controls = about.get("controls")
    if WIDGET not in output.get("data", {}) or not controls:
        return None
    count = f"{len(controls)} control{'s' * (len(controls) != 1)}"
    names = ", ".join(controls)
    return {
        "output_type": "display_data",
        "data": {
            "text/html": f"<em>A stored picture. Run this cell for {count}: {html.escape(names)}.</em>",
            "text/plain": f"[a stored picture; run this cell for {count}: {names}]",
        },
        "metadata": {},
    }


def _lighten(output: NotebookNode) -> None:
    """Store a figure in its lightest form. An explorer's picture stays the PNG it promises."""
    if not output.data.get("text/plain", "").startswith("explore("):
        kind, picture = lighter(base64.b64decode(output.data.pop("image/png")))
        output.data[kind] = base64.b64encode(picture).decode()
        if "image/png" in output.metadata:
            output.metadata[kind] = output.metadata.pop("image/png")


def without_progress(text: str) -> str:
    lines = [line.rsplit("\r", 1)[-1] for line in text.replace("\r\n", "\n").split("\n")]
    return "\n".join(line for line in lines if not is_progress(line))


def is_progress(text: str) -> bool:
    """Whether this is a bar of tqdm."""
    return bool(re.search(r"\d+%\|.*\|", text))


def _without_widget(output: NotebookNode) -> bool:
    """Take the widget view out of a bundle; whether something worth keeping is left."""
    if output.data.pop(WIDGET, None) is None or any(kind.startswith("image/") for kind in output.data):
        return True
    if is_progress(output.data.get("text/plain", "")):
        return False
    output.data = type(output.data)({"text/plain": PLACEHOLDER})
    return True


def _texts(output: NotebookNode) -> list[str]:
    if output.output_type == "stream":
        return [output.text]
    if output.output_type == "error":
        return []
    return [str(value) for kind, value in output.data.items() if not kind.startswith(("image/p", "image/j"))]
