"""Running a notebook in a kernel of its own."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from nbkit.notebooks._normal import load

if TYPE_CHECKING:
    from nbformat import NotebookNode

_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "PYTHONHASHSEED": "0",
}
_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


class CellFailed(RuntimeError):
    """A cell raised. The message names the cell and holds its code and traceback."""


def execute(path: str | Path, *, append: str | None = None, timeout: float = 600) -> NotebookNode:
    """Run a notebook in a fresh kernel, in its own folder, on one thread, offline; the file is not touched.

    ``append`` is code for one more cell at the end; ``timeout`` the seconds one cell may take. Returns the executed
    notebook, not normalised. Raises: CellFailed.
    """
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
    from nbformat.v4 import new_code_cell

    path = Path(path)
    notebook = load(path)
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
