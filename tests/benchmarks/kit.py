"""What the kit promises of itself: a quick import, notebooks within half a minute, explorers that answer at once."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

_IMPORT = """
import sys, time
start = time.perf_counter()
import nbkit
print(time.perf_counter() - start, *[m for m in ("torch", "matplotlib.pyplot", "shap", "pandas") if m in sys.modules])
"""
_TIMINGS = """
import json, sys
_explorers = sys.modules.get("nbkit.widgets")
print("TIMINGS", json.dumps(list(_explorers.timings()) if _explorers else []))
"""


@dataclass(frozen=True)
class NotebookRun:
    """Seconds of a whole run with its kernel's start, and of every frame its explorers drew."""

    name: str
    seconds: float
    frames: list[float]

    @property
    def p95(self) -> float | None:
        """The 95th percentile of the frames, in milliseconds."""
        if len(self.frames) < 2:
            return None
        return 1000 * statistics.quantiles(self.frames, n=20, method="inclusive")[-1]


def import_time(repeats: int = 7) -> tuple[float, list[str]]:
    """Median seconds of ``import nbkit`` in a fresh interpreter, and the heavy modules it brought along."""
    seconds, heavy = [], []
    for _ in range(repeats):
        out = subprocess.run([sys.executable, "-c", _IMPORT], capture_output=True, text=True, check=True).stdout.split()
        seconds.append(float(out[0]))
        heavy = out[1:]
    return statistics.median(seconds), heavy


def run_notebook(path: Path, root: Path) -> NotebookRun:
    """Run a notebook as it stands and ask its kernel how long the explorers took."""
    from nbkit import notebooks

    start = time.perf_counter()
    executed = notebooks.execute(path, append=_TIMINGS)
    seconds = time.perf_counter() - start
    line = "".join(output.get("text", "") for output in executed.cells[-1].outputs)
    return NotebookRun(path.relative_to(root).as_posix(), seconds, json.loads(line.split("TIMINGS", 1)[1]))
