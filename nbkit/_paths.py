"""Where the kit's files lie: in a clone beside the package, in an installed wheel inside it.

A wheel carries ``data/`` as ``nbkit/_data`` and ``notebooks/`` as ``nbkit/_notebooks`` (force-included by
pyproject.toml), so the same code finds them either way.
"""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def repo_root() -> Path | None:
    """The folder of the clone this package runs from, or None when it was installed from a wheel."""
    root = _PACKAGE.parent
    return root if (root / "data" / "sets").is_dir() else None


def _folder(name: str) -> Path:
    root = repo_root()
    path = root / name if root else _PACKAGE / f"_{name}"
    if not path.is_dir():
        raise FileNotFoundError(
            f"the kit's {name} folder is missing ({path}); reinstall nbkit or clone it again"
        )
    return path


def data_dir() -> Path:
    """The folder of the shipped data sets and checkpoints. Raises FileNotFoundError where it is missing."""
    return _folder("data")


def notebooks_dir() -> Path:
    """The folder of the notebooks. Raises FileNotFoundError where it is missing."""
    return _folder("notebooks")
