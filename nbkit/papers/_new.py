"""Begin a paper: a notebook that runs, its recipe, its facts and its test, all to be rewritten.

The notebook has every section in order and a small method in each place; "To write" marks what the author says instead.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from nbkit import _paths
from nbkit._catalogue import Paper, get
from nbkit._files import write_whole

_SKELETON = Path(__file__).with_name("skeleton")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("slug", help="of the catalogue, for example grad-cam")


def run(args: argparse.Namespace) -> int:
    """Write the skeleton into the clone and print its files. Raises: UnknownName; FileExistsError, nothing written."""
    root = _paths.repo_root()
    if root is None:
        raise FileNotFoundError("a paper is begun in a clone, and this nbkit was installed from a wheel")
    paper = get(args.slug)
    for path in begin(paper, root):
        print(f"wrote {path.relative_to(root).as_posix()}")
    print(f"next: make run NB=notebooks/{paper.file}, then make check P={paper.slug}")
    return 0


def begin(paper: Paper, root: Path) -> list[Path]:
    """Write the four files of a paper below ``root``. Raises FileExistsError where one is there: nothing is changed."""
    folder = root / "data" / "papers" / paper.slug
    texts = {
        root / "notebooks" / paper.file: _notebook(paper),
        folder / "recipe.py": _filled("recipe", paper),
        folder / "facts.toml": _filled("facts", paper),
        root / "tests" / "papers" / f"test_{paper.slug.replace('-', '_')}.py": _filled("test", paper),
    }
    if there := [path.relative_to(root).as_posix() for path in texts if path.exists()]:
        raise FileExistsError(f"{paper.slug} is begun already, nothing was written: there is {', '.join(there)}")
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text.encode())
    return list(texts)


def _filled(name: str, paper: Paper) -> str:
    venue = paper.venue or str(paper.year)
    venue += "" if str(paper.year) in venue else f", {paper.year}"
    arxiv = f", arXiv [{paper.arxiv}]({paper.url})" if paper.arxiv else ""
    values = {
        "slug": paper.slug,
        "title": paper.title,
        "notebook": paper.file.removesuffix(".ipynb"),
        "source": f"{paper.byline}, {venue}{arxiv}",
        "reference": f"{paper.byline}, *{paper.title}*, {venue}{f'; arXiv {paper.arxiv}' if paper.arxiv else ''}.",
    }
    text = (_SKELETON / f"{name}.txt").read_text(encoding="utf-8")
    for key, value in values.items():
        text = text.replace(f"<<{key}>>", value)
    return text


def _notebook(paper: Paper) -> str:
    """The notebook file: a cell after each line ``%% markdown`` or ``%% code tag``."""
    import nbformat
    from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

    cells = []
    for number, part in enumerate(re.split(r"^%% ", _filled("notebook", paper), flags=re.M)[1:]):
        head, source = part.split("\n", 1)
        kind, *tags = head.split()
        make = {"markdown": new_markdown_cell, "code": new_code_cell}[kind]
        metadata = {"tags": tags} if tags else {}
        cells.append(make(source.strip(), id=f"cell-{number:02d}", metadata=metadata))
    return nbformat.writes(new_notebook(cells=cells)) + "\n"
