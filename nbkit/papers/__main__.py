"""``python -m nbkit.papers``: what is done to the shelf from a clone. ``--help`` lists the sub-commands.

A sub-command is a module, named in ``COMMANDS``, of which three things are read: the first line of its docstring (the
help), ``arguments(parser)``, which adds what it takes, and ``run(args) -> int``, which does it and returns the exit
code, 0 where all is well. ValueError, OSError and UnknownName that ``run`` raises are printed as one sentence.

A ``__main__`` is nobody's import, so it stands on the roof and may call on every floor.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from nbkit.errors import UnknownName

COMMANDS = {
    "index": "nbkit.pages.command",
    "check": "nbkit.papers._check",
    "new": "nbkit.papers._new",
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m nbkit.papers", description="The shelf, from a clone.")
    commands = parser.add_subparsers(dest="command", required=True)
    modules = {}
    for name, path in COMMANDS.items():
        modules[name] = module = importlib.import_module(path)
        about = (module.__doc__ or "").strip().split("\n")[0]
        module.arguments(commands.add_parser(name, help=about, description=about))
    args = parser.parse_args(argv)
    try:
        return modules[args.command].run(args)
    except (ValueError, OSError, UnknownName) as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
