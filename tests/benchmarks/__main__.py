"""``python -m tests.benchmarks [--only TEXT] [--skip-notebooks]``: figures, printed and kept in results.md.

Nothing here passes or fails. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Iterator
from pathlib import Path

from tests.benchmarks import comparisons  # noqa: F401  (registers its rows)
from tests.benchmarks.kit import import_time, run_notebook
from tests.benchmarks.rows import REGISTRY, measure

RESULTS = Path(__file__).with_name("results.md")


def report(only: str, with_notebooks: bool) -> Iterator[str]:
    """The lines of results.md, as they become known."""
    import torch

    from nbkit import _paths
    from nbkit.notebooks import CellFailed

    yield "# Benchmarks"
    yield ""
    yield (
        f"Made by `make bench` on {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"torch {torch.__version__} on {torch.get_num_threads()} thread(s), {platform.system()} {platform.machine()}."
    )
    seconds, heavy = import_time()
    brought = ", ".join(heavy) or "neither torch nor pyplot"
    yield from ["", f"`import nbkit`: {1000 * seconds:.0f} ms, imports {brought}."]
    root = _paths.notebooks_dir()
    paths = [p for p in sorted(root.rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts and only in str(p)]
    if with_notebooks and paths:
        yield from ["", "| notebook | run time, s | explorer frames | p95, ms |", "| --- | ---: | ---: | ---: |"]
        for path in paths:
            try:
                run = run_notebook(path, root)
            except CellFailed as error:
                yield f"| {path.relative_to(root).as_posix()} | failed: {str(error).splitlines()[0]} | | |"
                continue
            p95 = "-" if run.p95 is None else f"{run.p95:.0f}"
            yield f"| {run.name} | {run.seconds:.1f} | {len(run.frames)} | {p95} |"
    rows = [entry for entry in REGISTRY if only in f"{entry[0]} {entry[1]}"]
    if rows:
        yield from ["", "Beside another library, called in turns; a ratio above 1 means the kit is the faster.", ""]
        yield "| what | beside | ours, ms | theirs, ms | ratio (quartiles) | memory, MB | largest difference |"
        yield "| --- | --- | ---: | ---: | ---: | ---: | ---: |"
        for entry in rows:
            m = measure(*entry)
            yield (
                f"| {m.name} | {m.library} | {1000 * m.ours:.1f} | {1000 * m.theirs:.1f} | {m.ratio:.2f} "
                f"({m.quartiles[0]:.2f} to {m.quartiles[1]:.2f}) | {m.ours_mb:.0f} / {m.theirs_mb:.0f} | "
                f"{m.difference:.1e} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks")
    parser.add_argument("--only", default="", help="the notebooks and rows whose name holds this text")
    parser.add_argument("--skip-notebooks", action="store_true")
    args = parser.parse_args()
    lines = []
    for line in report(args.only, not args.skip_notebooks):
        print(line, flush=True)
        lines.append(line)
    if not args.only and not args.skip_notebooks:  # a part is looked at, not kept
        RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
