"""Write what is generated: CLAIMS.md, notebooks/README.md, pictures, tables of README.md and data/README.md."""

from __future__ import annotations

import argparse
import sys

from nbkit import pages


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--check", action="store_true", help="write nothing; say what is out of date, and fail then")


def run(args: argparse.Namespace) -> int:
    if not args.check:
        for path in pages.write():
            print(f"wrote {path.as_posix()}")
        return 0
    found = pages.stale()
    for path in found:
        print(f"{path.as_posix()} is out of date: run `make index`", file=sys.stderr)
    return 1 if found else 0
