"""``python -m nbkit.notebooks``: run, format or check notebooks from the command line."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from nbkit import _paths
from nbkit.notebooks import MAX_KB, CellFailed, check, reformat, run

MAX_SECONDS = 30


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


def _format_one(path: Path) -> bool:
    try:
        print(f"{path}: {'formatted' if reformat(path) else 'formatted already'}")
    except (ValueError, OSError) as error:
        print(f"{path}: {error}", file=sys.stderr)
        return False
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
    parser = argparse.ArgumentParser(prog="python -m nbkit.notebooks", description="Run, format and check notebooks.")
    parser.add_argument("action", choices=["run", "format", "check"])
    parser.add_argument("paths", nargs="*", type=Path, help="notebooks or folders (all of the kit's)")
    parser.add_argument("--timeout", type=float, default=600, help="seconds one cell may take")
    args = parser.parse_args(argv)
    if missing := [str(path) for path in args.paths if not path.exists()]:
        print(f"there is no {', '.join(missing)}", file=sys.stderr)
        return 2
    paths = _find(args.paths)
    act = {"run": lambda path: _run_one(path, args.timeout), "format": _format_one, "check": _check_one}[args.action]
    done = [act(path) for path in paths]
    if args.action == "check":
        print(f"{sum(done)} of {len(done)} notebooks in normal form")
    return 0 if all(done) else 1


if __name__ == "__main__":
    raise SystemExit(main())
