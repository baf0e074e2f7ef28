"""``python -m tests.benchmarks [--only TEXT] [--part notebooks rows growth links]``: figures, kept in results.md.

Nothing here passes or fails. Run it on a machine that does nothing else. A part alone is measured again in its place
in results.md; the sentences at the end of that file come from notes.md.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import os
import platform
from collections.abc import Iterable, Iterator
from pathlib import Path

from nbkit import runtime
from tests.benchmarks import alike, comparisons, search  # noqa: F401  (register their rows)
from tests.benchmarks.growth import PICTURE, SWEEPS, draw, grow
from tests.benchmarks.kit import import_time, run_notebook, yardstick
from tests.benchmarks.links import BATCH, EPSILON, HIDDEN, WIDTHS, cost, summary
from tests.benchmarks.rows import REGISTRY, measure

RESULTS = Path(__file__).with_name("results.md")
NOTES = Path(__file__).with_name("notes.md")
TITLES = {
    "notebooks": "Notebooks",
    "rows": "Beside other libraries",
    "growth": "How the cost grows",
    "links": "Training links beside training under a mask",
}
SLOW = ("lm-head-decoding", "coreinfer")
"""Notebooks that run the language model: within 60 s where the others have 30."""


def head() -> Iterator[str]:
    import torch

    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("captum", "shap", "scikit-learn", "numpy"))
    yield "# Benchmarks"
    yield ""
    yield (
        f"Made by `make bench` on {os.cpu_count()} cores ({runtime.processor()}), {platform.system()}, Python "
        f"{platform.python_version()}, torch {torch.__version__} on {torch.get_num_threads()} thread, {versions}."
    )
    product, figure = yardstick()
    yield ""
    yield f"Yardstick: a 1024 x 1024 matrix product {product:.0f} ms, a bare figure of two axes {figure:.0f} ms."
    time, heavy = import_time()
    brought = ", ".join(heavy) or "neither torch nor pyplot"
    yield from ["", f"`import nbkit`: {1000 * time:.0f} ms (at most 150), imports {brought}."]


def notebooks(only: str) -> Iterator[str]:
    from nbkit import _paths
    from nbkit.notebooks import CellFailed

    root, total = _paths.notebooks_dir(), 0.0
    yield (
        "Run time from the kernel's start to the end of the last cell (at most 30 s, 60 s with the language model). "
        "Explorers: the 95th percentile of the time from a move to the picture, each frame drawn anew (at most 150 ms, "
        "500 ms where a model runs)."
    )
    columns = "notebook", "run time, s:", "explorer", "model runs", "frames:", "median, ms:", "p95, ms:"
    yield from ["", *_header(*columns)]
    for path in sorted(root.rglob("*.ipynb")):
        if ".ipynb_checkpoints" in path.parts or only not in str(path):
            continue
        try:
            run = run_notebook(path, root)
        except CellFailed as error:
            said = f"**failed**: {str(error).splitlines()[0]}"
            yield _cells(path.relative_to(root).as_posix(), said, *[""] * 5)
            continue
        total += run.seconds
        slow = run.seconds > (60 if any(name in run.name for name in SLOW) else 30)
        first = run.name, _marked(f"{run.seconds:.1f}", slow)
        for e in run.explorers:
            median, p95 = ("-" if value is None else f"{value:.0f}" for value in (e.median, e.p95))
            yield _cells(*first, e.name, "yes" if e.model else "no", len(e.frames), median, _marked(p95, e.short))
            first = "", ""
    yield from ["", f"All notebooks one after another: {total:.0f} s."]


def rows(only: str) -> Iterator[str]:
    entries = [entry for entry in REGISTRY if only in f"{entry.name} {entry.beside}"]
    if not entries:
        return
    yield (
        "One process, in `runtime.deterministic()` as every notebook, the same model and inputs, called in turns; the "
        "ratio is the kit's time over the other's (median and quartiles over the pairs). Memory is the peak above the "
        "start, in MB. The difference is relative to the largest element."
    )
    columns = "what", "beside", "kit, ms:", "other, ms:", "ratio:", "at most:", "kit, MB:", "other, MB:", "difference:"
    yield from ["", *_header(*columns, "")]
    for entry in entries:
        m = measure(entry)
        ratio = f"{m.ratio:.2f} ({m.quartiles[0]:.2f} to {m.quartiles[1]:.2f})"
        verdict = f"**{m.verdict}**" if m.verdict in ("short", "differs") else m.verdict
        yield _cells(
            entry.name, entry.beside, f"{1000 * m.ours:.1f}", f"{1000 * m.theirs:.1f}", ratio,
            "" if entry.target is None else f"{entry.target:.2f}", f"{m.ours_mb:.0f}", f"{m.theirs_mb:.0f}",
            f"{m.difference:.0e}", verdict,
        )  # fmt: skip


def growth(only: str) -> Iterator[str]:
    sweeps = [s for s in SWEEPS if only in f"{s.name} {s.varied}"]
    if not sweeps:
        return
    yield "Time: the exponent of a power law fitted through all sizes. Memory: peak above the start, and what is kept."
    columns = "method", "varied", "sizes", "ms at the ends:", "exponent:", "expected", "peak, MB:", "kept, MB:"
    yield from ["", *_header(*columns)]
    grown = []
    for sweep in sweeps:
        g = grow(sweep)
        grown.append(g)
        ends = lambda values, form: f"{values[0]:{form}} to {values[-1]:{form}}"  # noqa: E731
        sizes, ms = ", ".join(f"{s:,}" for s in sweep.sizes), ends([1000 * s for s in g.seconds], ".1f")
        memory = ends(g.peak_mb, ".1f"), ends(g.kept_mb, ".2f")
        yield _cells(sweep.name, sweep.varied, sizes, ms, f"{g.exponent:.2f}", sweep.expected, *memory)
    if not only:
        draw(grown)
        yield from ["", f"![How time and memory grow]({PICTURE.name})"]


def links(only: str) -> Iterator[str]:
    if only:
        return
    yield (
        f"QuickSelection's autoencoder, {HIDDEN:,} hidden units, epsilon {EPSILON:g}, steps of {BATCH} rows: the same "
        "links, stored alone or as a dense matrix with a mask. Memory is the exact peak of allocated tensors."
    )
    columns = "inputs:", "links, ms a step:", "mask, ms:", "ratio:", "links, MB:", "mask, MB:", "ratio:"
    yield from ["", *_header(*columns)]
    costs = []
    for width in WIDTHS:
        c = cost(width)
        costs.append(c)
        ms, mb = ([f"{value:.2f}" for value in pair] for pair in (c.ms, c.mb))
        yield _cells(f"{width:,}", *ms, f"{c.ratios[0]:.2f}", *mb, f"{c.ratios[1]:.2f}")
    yield from ["", summary(costs)]


def _header(*names: str) -> list[str]:
    """Two lines of a table; a name that ends in a colon is a column of numbers."""
    return [_cells(*(n.rstrip(":") for n in names)), _cells(*("---:" if n.endswith(":") else "---" for n in names))]


def _cells(*values) -> str:
    return f"| {' | '.join(map(str, values))} |"


def _marked(text: str, short: bool) -> str:
    return f"{text} **short**" if short else text


def merged(old: str, head: list[str], new: dict[str, list[str]], notes: str) -> str:
    """results.md with the parts in ``new`` in place of the old ones; a part is what follows its level-2 heading."""
    parts: dict[str, list[str]] = {name: [] for name in TITLES}
    found = None
    for line in old.splitlines():
        if line.startswith("## "):
            found = next((name for name, title in TITLES.items() if line == f"## {title}"), None)
        if found:
            parts[found].append(line)
    parts |= new
    body = [line for lines in parts.values() if lines for line in ["", *"\n".join(lines).strip().splitlines()]]
    return "\n".join([*head, *body, "", notes.strip()]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks")
    parser.add_argument("--only", default="", help="the notebooks, rows and sweeps whose name holds this text")
    parser.add_argument("--part", nargs="+", choices=TITLES, default=list(TITLES), help="the others stay as they stand")
    args = parser.parse_args()
    runtime.deterministic()  # as every notebook, for every part: memory that was freed stays with the process
    measures = {"notebooks": notebooks, "rows": rows, "growth": growth, "links": links}
    said, measured = list(_shown(head())), {}
    for name in TITLES:
        if name in args.part:
            lines = itertools.chain(["", f"## {TITLES[name]}", ""], measures[name](args.only))
            measured[name] = list(_shown(lines))
    if not args.only:  # some rows alone are looked at, not kept
        old = RESULTS.read_text(encoding="utf-8") if RESULTS.is_file() else ""
        RESULTS.write_text(merged(old, said, measured, NOTES.read_text(encoding="utf-8")), encoding="utf-8")


def _shown(lines: Iterable[str]) -> Iterator[str]:
    for line in lines:
        print(line, flush=True)
        yield line


if __name__ == "__main__":
    main()
