"""What the kit promises of itself: a quick import, notebooks within half a minute, explorers that answer at once."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.rows import seconds

LIMIT_MS = {False: 150, True: 500}
"""p95 of an explorer's frame, where no model runs in it and where one does."""

_IMPORT = """
import sys, time
start = time.perf_counter()
import nbkit
print(time.perf_counter() - start, *[m for m in ("torch", "matplotlib.pyplot", "shap", "pandas") if m in sys.modules])
"""
_PROBE = f"""
import json, sys, time
_ended = time.time()
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from tests.benchmarks.probe import probe
_found = probe()
print("PROBED", json.dumps([_found, _ended]))
"""


@dataclass(frozen=True)
class Explored:
    """One explorer: seconds of every frame, and whether a model ran for any of them."""

    name: str
    frames: list[float]
    model: bool

    @property
    def p95(self) -> float | None:
        """The 95th percentile of the frames, in milliseconds."""
        if len(self.frames) < 2:
            return None
        return 1000 * statistics.quantiles(self.frames, n=20, method="inclusive")[-1]

    @property
    def median(self) -> float | None:
        return 1000 * statistics.median(self.frames) if self.frames else None

    @property
    def short(self) -> bool:
        return self.p95 is not None and self.p95 > LIMIT_MS[self.model]


@dataclass(frozen=True)
class NotebookRun:
    """Seconds from the start of its kernel to the end of its last cell, and what its explorers took."""

    name: str
    seconds: float
    explorers: list[Explored]


def import_time(repeats: int = 7) -> tuple[float, list[str]]:
    """Median seconds of ``import nbkit`` in a fresh interpreter, and the heavy modules it brought along."""
    times, heavy = [], []
    for _ in range(repeats):
        out = subprocess.run([sys.executable, "-c", _IMPORT], capture_output=True, text=True, check=True).stdout.split()
        times.append(float(out[0]))
        heavy = out[1:]
    return statistics.median(times), heavy


def yardstick(repeats: int = 25) -> tuple[float, float]:
    """Median milliseconds, to compare machines and hours: a product of two 1024 x 1024 matrices in torch, and a bare
    matplotlib figure of two axes with one line each, drawn to pixels."""
    import torch
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    matrix = torch.ones(1024, 1024)

    def draw() -> None:
        figure = Figure(figsize=(8, 4))
        for ax in figure.subplots(1, 2):
            ax.plot([0, 1])
        FigureCanvasAgg(figure).draw()

    def median(call) -> float:
        return 1000 * statistics.median(seconds(call) for _ in range(repeats))

    return median(lambda: matrix @ matrix), median(draw)


def run_notebook(path: Path, root: Path) -> NotebookRun:
    """Run a notebook as it stands, then turn its explorers in its kernel; the turning is not part of the run time."""
    from nbkit import notebooks

    start = time.time()  # the kernel's clock, too
    executed: Any = notebooks.execute(path, append=_PROBE)
    line = "".join(output.get("text", "") for output in executed.cells[-1].outputs if output.get("name") == "stdout")
    found, ended = json.loads(line.split("PROBED", 1)[1])
    name = path.relative_to(root).as_posix()
    return NotebookRun(name, ended - start, [Explored(**explorer) for explorer in found])
