"""Notebook files: run them in a fresh kernel and store them in one normal form.

    python -m nbkit.notebooks run notebooks/01-saliency/01-grad-cam.ipynb    # what `make run NB=...` does
    python -m nbkit.notebooks check                                          # all of the kit's notebooks

The normal form is what a reader's eyes and a reviewer's diff need: pictures instead of widget views (GitHub cannot
show those, JupyterLab not without a kernel), execution counts from 1, no timestamps, no progress bars, no paths of
the machine it ran on.
"""

from __future__ import annotations

import argparse
import base64
import copy
import hashlib
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nbkit import _cells, _paths
from nbkit._png import lighter

if TYPE_CHECKING:
    from nbformat import NotebookNode

__all__ = ["cells", "check", "execute", "normalise", "problems", "run"]

MAX_KB = 400  # a notebook on GitHub beyond this loads slowly, and every run adds as much to the history
MAX_SECONDS = 30
PLACEHOLDER = "[a control: run the cell to use it]"

_WIDGET = "application/vnd.jupyter.widget-view+json"
_METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"file_extension": ".py", "mimetype": "text/x-python", "name": "python"},
}
_KEPT_CELL_METADATA = ("tags", "jupyter", "slideshow")
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "PYTHONHASHSEED": "0",
}
_ABSOLUTE = re.compile(
    r"(?<![\w./:~-])(?:/(?:home|root|Users|tmp|work|opt|usr|var|mnt|private|workspace|content)/[\w.-]+|[A-Z]:\\+Users)"
)
_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


class CellFailed(RuntimeError):
    """A cell raised. The message names the cell and holds its code and traceback."""


def cells(path: str | Path, tag: str | None = None) -> list[str]:
    """The code cells' sources of a notebook file, in order: all, or those that carry ``tag``.

    >>> notebooks.cells("notebooks/02-concepts/01-craft.ipynb", tag="method")
    """
    return [_cells.source(cell) for _, cell in _cells.numbered(path, tag) if cell["cell_type"] == "code"]


def execute(path: str | Path, *, append: str | None = None, timeout: float = 600) -> NotebookNode:
    """Run a notebook in a fresh kernel, in its own folder, on one thread, offline; the file is not touched.

    ``append`` is code for one more cell at the end; ``timeout`` the seconds one cell may take. Returns the executed
    notebook, not normalised. Raises: CellFailed.
    """
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
    from nbformat.v4 import new_code_cell

    path = Path(path)
    notebook = _load(path)
    if append is not None:
        notebook.cells.append(new_code_cell(append))
    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.resolve().parent)}},
        store_widget_state=False,
        record_timing=False,
        shutdown_kernel="immediate",  # an interpreter with torch in it takes seconds to take itself apart
        extra_arguments=["--IPKernelApp.log_level=ERROR"],
    )
    running = {"cell": 0}
    client.on_cell_start = lambda cell, cell_index: running.update(cell=cell_index)
    try:
        client.execute(env={**os.environ, **_ENVIRONMENT})
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        number = running["cell"] + 1
        code = "\n".join(f"    {line}" for line in notebook.cells[number - 1].source.splitlines())
        traceback = _ANSI.sub("", getattr(error, "traceback", None) or str(error))
        traceback = traceback.rsplit(f"{18 * '-'}\n\n\n", 1)[-1].strip()  # nbclient repeats the cell's code first
        raise CellFailed(f"{path.name}, cell {number}:\n{code}\n\n{traceback}") from None
    return notebook


def run(path: str | Path, *, timeout: float = 600) -> NotebookNode:
    """Execute a notebook and store it in normal form, in place.

    The file changes only when every cell ran and nothing forbidden was printed, and then at once.

    Raises: CellFailed; ValueError where :func:`problems` has something to say.
    """
    import nbformat

    path = Path(path)
    executed = execute(path, timeout=timeout)
    _show_dropped(executed)
    notebook = normalise(executed)
    if found := problems(notebook):
        raise ValueError(f"{path.name} is left as it was:\n" + "\n".join(f"  {line}" for line in found))
    text = nbformat.writes(notebook) + "\n"
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        os.chmod(name, path.stat().st_mode & 0o777)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return notebook


def normalise(notebook: NotebookNode) -> NotebookNode:
    """A copy of an executed notebook in normal form; normalising twice changes nothing."""
    from nbformat import from_dict

    notebook = copy.deepcopy(notebook)
    notebook.metadata = from_dict(copy.deepcopy(_METADATA))
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    count = 0
    for cell in notebook.cells:
        cell.metadata = from_dict({k: v for k, v in cell.metadata.items() if k in _KEPT_CELL_METADATA and v})
        cell.source = cell.source.rstrip()
        if cell.cell_type != "code":
            continue
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


def check(path: str | Path) -> list[str]:
    """Why a notebook file is not in normal form, a line each; empty where it is."""
    import nbformat

    path = Path(path)
    notebook = _load(path)
    found = problems(notebook)
    for number, cell in enumerate(notebook.cells, start=1):
        if cell.cell_type == "code" and cell.source.strip() and cell.execution_count is None:
            found.append(f"cell {number}: not executed")
    if not found and nbformat.writes(normalise(notebook)) + "\n" != path.read_text(encoding="utf-8"):
        found.append(f"not in normal form: run `make run NB={path}`")
    return found


def _show_dropped(notebook: NotebookNode) -> None:
    """Warnings are not stored, but whoever runs the notebook should see them once."""
    for number, cell in enumerate(notebook.cells, start=1):
        for output in cell.get("outputs", []):
            if output.get("name") == "stderr" and (text := _without_progress(output.text).strip()):
                print(f"cell {number} wrote to stderr (not stored):\n{text}", file=sys.stderr)


def _load(path: Path) -> NotebookNode:
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


def _outputs(outputs: Iterable[NotebookNode], count: int | None) -> list[NotebookNode]:
    kept: list[NotebookNode] = []
    for output in outputs:
        if output.output_type == "stream":
            output.text = _without_progress(output.text)
            if output.name == "stderr" or not output.text:
                continue
            if kept and kept[-1].output_type == "stream":
                kept[-1].text += output.text
                continue
        elif "data" in output and not _without_widget(output):
            continue
        if "image/png" in output.get("data", {}) and output.output_type == "display_data":
            _lighten(output)
        if output.output_type == "execute_result":
            output.execution_count = count
        if "metadata" in output:
            output.metadata = type(output.metadata)({k: v for k, v in output.metadata.items() if k in output.data})
        kept.append(output)
    return kept


def _lighten(output: NotebookNode) -> None:
    """Store a figure in its lightest form. An explorer's picture stays the PNG it promises."""
    if not output.data.get("text/plain", "").startswith("explore("):
        kind, picture = lighter(base64.b64decode(output.data.pop("image/png")))
        output.data[kind] = base64.b64encode(picture).decode()


def _without_progress(text: str) -> str:
    lines = [line.rsplit("\r", 1)[-1] for line in text.replace("\r\n", "\n").split("\n")]
    return "\n".join(line for line in lines if not re.search(r"\d+%\|.*\|", line))


def _without_widget(output: NotebookNode) -> bool:
    """Take the widget view out of a bundle; whether something worth keeping is left."""
    if output.data.pop(_WIDGET, None) is None or any(kind.startswith("image/") for kind in output.data):
        return True
    if re.search(r"\d+%\|.*\|", output.data.get("text/plain", "")):
        return False  # a tqdm bar
    output.data = type(output.data)({"text/plain": PLACEHOLDER})
    return True


def _texts(output: NotebookNode) -> list[str]:
    if output.output_type == "stream":
        return [output.text]
    if output.output_type == "error":
        return []
    return [str(value) for kind, value in output.data.items() if not kind.startswith(("image/p", "image/j"))]


def _find(names: Sequence[Path]) -> list[Path]:
    roots = names or [_paths.notebooks_dir()]
    found = [path for root in roots for path in (sorted(root.rglob("*.ipynb")) if root.is_dir() else [root])]
    return [path for path in found if ".ipynb_checkpoints" not in path.parts]


def _run_one(path: Path, timeout: float) -> bool:
    start = time.perf_counter()
    try:
        run(path, timeout=timeout)
    except (CellFailed, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return False
    seconds, size = time.perf_counter() - start, path.stat().st_size / 1024
    notes = [f"over {MAX_SECONDS} s"] * (seconds > MAX_SECONDS) + [f"over {MAX_KB} KB"] * (size > MAX_KB)
    print(f"{path}: {seconds:.1f} s, {size:.0f} KB" + (f"  WARNING: {', '.join(notes)}" if notes else ""))
    return True


def _check_one(path: Path) -> bool:
    try:
        found = check(path)
    except ValueError as error:
        print(error, file=sys.stderr)
        return False
    for line in found:
        print(f"{path}: {line}", file=sys.stderr)
    return not found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m nbkit.notebooks", description="Run and normalise notebooks.")
    parser.add_argument("action", choices=["run", "check"])
    parser.add_argument("paths", nargs="*", type=Path, help="notebooks or folders (all of the kit's)")
    parser.add_argument("--timeout", type=float, default=600, help="seconds one cell may take")
    args = parser.parse_args(argv)
    if missing := [str(path) for path in args.paths if not path.exists()]:
        print(f"there is no {', '.join(missing)}", file=sys.stderr)
        return 2
    paths = _find(args.paths)
    done = [_run_one(path, args.timeout) if args.action == "run" else _check_one(path) for path in paths]
    if args.action == "check":
        print(f"{sum(done)} of {len(done)} notebooks in normal form")
    return 0 if all(done) else 1


if __name__ == "__main__":
    raise SystemExit(main())
