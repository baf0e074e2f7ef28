"""The pages that nobody edits: made of the catalogue, the notebooks, their stored claims and the facts beside data.

``CLAIMS.md``, ``notebooks/README.md`` and ``notebooks/pictures/<slug>.jpg`` are written whole; in ``README.md`` and
``data/README.md`` only the tables between ``<!-- begin ... -->`` and ``<!-- end ... -->``. ``make index`` writes them,
``python -m nbkit.papers index --check`` says which are stale. So a new paper edits no shared file.
"""

from __future__ import annotations

from pathlib import Path

from nbkit import _paths, claims
from nbkit._files import write_whole
from nbkit.pages import _claims, _data, _notebooks, _pictures
from nbkit.pages._markdown import between

__all__ = ["stale", "write"]


def stale() -> list[Path]:
    """The pages that are missing or out of date, relative to the clone, in no need of the network or of torch.

    Raises: ValueError where a notebook's claims, a paper's facts or a page's markers cannot be read;
    FileNotFoundError where this nbkit is no clone.
    """
    root = _root()
    return [path.relative_to(root) for path in _changed(root)]


def write() -> list[Path]:
    """Bring every page up to date; returns those that changed. Nothing is written where :func:`stale` raises."""
    root = _root()
    changed = _changed(root)
    for path, data in changed.items():
        path.parent.mkdir(exist_ok=True)
        write_whole(path, data)
    return [path.relative_to(root) for path in changed]


def _changed(root: Path) -> dict[Path, bytes]:
    wanted = _pictures.changed(root / "notebooks")
    found = claims.collect(root / "notebooks")
    texts = {
        root / "CLAIMS.md": _claims.page(found),
        root / "notebooks" / "README.md": _notebooks.page(root / "notebooks", found, wanted),
        root / "README.md": between(root / "README.md", {"chapters": _notebooks.chapters(root / "notebooks")}),
        root / "data" / "README.md": between(root / "data" / "README.md", _data.tables(root / "data")),
    }
    for path, text in texts.items():
        data = text.encode("utf-8")
        if not path.is_file() or path.read_bytes() != data:
            wanted[path] = data
    return wanted


def _root() -> Path:
    root = _paths.repo_root()
    if root is None:
        raise FileNotFoundError("the pages are written in a clone, and this nbkit was installed from a wheel")
    return root
