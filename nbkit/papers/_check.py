"""Test one paper alone: its files and their sizes, ruff, the rules for notebooks and claims, its notebook, its tests.

The rules and the tests live in the clone, under ``tests/``; this only picks those of one paper and says what failed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from nbkit import _paths
from nbkit._catalogue import Paper, get
from nbkit.papers._shelf import files, unlisted

MOST_KB = 400
_SETTINGS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
_NBVAL = ["--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout=180"]
_RULES = "tests/notebooks/test_shape.py"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("slug", help="of the catalogue, for example grad-cam")


def run(args: argparse.Namespace) -> int:
    """0 where the paper passes everything; else what failed is printed, and how. Raises UnknownName."""
    root, paper = _paths.repo_root(), get(args.slug)
    if root is None:
        raise FileNotFoundError("a paper is checked in a clone, and this nbkit was installed from a wheel")
    start = time.perf_counter()
    failed = []
    if wrong := shelf_problems(paper, root):
        failed.append("files")
        print("FAILED files\n" + "\n".join(f"  {line}" for line in wrong))
    else:
        print("ok     files", flush=True)
    with ThreadPoolExecutor(2) as pool:  # the notebook, which takes longest, beside all the others
        for name, output, seconds in pool.map(lambda step: _outcome(*step, root), commands(paper, root).items()):
            print(f"{'FAILED' if output else 'ok    '} {name}, {seconds:.0f} s\n{output}".rstrip(), flush=True)
            failed += [name] if output else []
    took = f"in {time.perf_counter() - start:.0f} s"
    print(f"{paper.slug}: {', '.join(failed)} failed, {took}" if failed else f"{paper.slug}: all well, {took}")
    return 1 if failed else 0


def shelf_problems(paper: Paper, root: Path) -> list[str]:
    """What is missing of a paper, not listed in its facts or too large, a line each."""
    needed = [f"notebooks/{paper.file}", _tests(paper)]
    found = [f"there is no {name}" for name in needed if not (root / name).is_file()]
    if not (root / "data" / "papers" / paper.slug).is_dir():
        return found  # a paper whose notebook computes everything keeps no data
    try:
        found += [f"data/papers/{paper.slug}: {name} and facts.toml do not agree" for name in unlisted(paper.slug)]
    except (OSError, ValueError) as error:
        found.append(str(error))
    size = sum(path.stat().st_size for path in files(paper.slug)) / 1024
    return found + ([f"data/papers/{paper.slug}: {size:.0f} KB, over {MOST_KB}"] if size > MOST_KB else [])


def commands(paper: Paper, root: Path) -> dict[str, list[str]]:
    """Name of a step -> what it runs, in the clone; a step whose files are missing is left out."""
    python, notebook = [sys.executable, "-m"], f"notebooks/{paper.file}"
    pytest = [*python, "pytest", "-q", "--no-header", "-p", "no:cacheprovider"]
    code = [name for name in (f"data/papers/{paper.slug}", _tests(paper)) if (root / name).exists()]
    steps = {"notebook and solutions": [*pytest, *_NBVAL, notebook]} | {
        "ruff": [*python, "ruff", "check", "--quiet", *code],
        "rules and claims": [*pytest, _RULES, "-k", paper.file],
        "tests": [*pytest, _tests(paper)],
    }
    without = [name for name in ("notebook and solutions", "rules and claims") if not (root / notebook).is_file()]
    without += [] if code else ["ruff"]
    without += [] if (root / _tests(paper)).is_file() else ["tests"]
    return {name: step for name, step in steps.items() if name not in without}


def _tests(paper: Paper) -> str:
    return f"tests/papers/test_{paper.slug.replace('-', '_')}.py"


def _outcome(name: str, command: list[str], root: Path) -> tuple[str, str, float]:
    """(name, what it said where it failed, seconds)."""
    start = time.perf_counter()
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, env={**os.environ, **_SETTINGS})
    said = f"{done.stdout}{done.stderr}".strip() or f"exit code {done.returncode}"
    return name, said if done.returncode else "", time.perf_counter() - start
