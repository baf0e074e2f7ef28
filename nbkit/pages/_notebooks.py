"""``notebooks/README.md``, a table a chapter, and the chapters' table of ``README.md``."""

from __future__ import annotations

import html
from collections.abc import Collection, Sequence
from pathlib import Path

from nbkit import _catalogue, _cells
from nbkit._catalogue import Paper
from nbkit.claims import Claim
from nbkit.pages._claims import chapter_title, verdicts
from nbkit.pages._markdown import anchor, counted, relinked, table

HEAD = """\
# The notebooks

Start with `00-start`, then go anywhere: every notebook says what to know before, and names the one that shows it.
Papers that are planned are listed below each chapter. What was claimed and what was found: [CLAIMS.md](../CLAIMS.md).
`make index` writes this page."""


def page(notebooks: Path, claims: Sequence[Claim], pictures: Collection[Path] = ()) -> str:
    """The text of ``notebooks/README.md``; ``pictures`` are those about to be written."""
    lines = [HEAD]
    for chapter, about in _catalogue.chapters().items():
        papers = [paper for paper in _catalogue.papers().values() if paper.chapter == chapter]
        runs = [paper for paper in papers if (notebooks / paper.file).is_file()]
        lines += ["", f"## {chapter_title(chapter)}", "", f"{about[0].upper()}{about[1:]}.", ""]
        if not papers:
            lines += _lessons(notebooks / chapter)
        elif runs:
            rows = [_row(notebooks, paper, [c for c in claims if c.slug == paper.slug], pictures) for paper in runs]
            lines += table(["paper", "main picture", "time, difficulty", "claims", "know before"], rows)
        lines += _planned([paper for paper in papers if paper not in runs])
    return "\n".join(lines) + "\n"


def chapters(notebooks: Path) -> list[str]:
    """A row a chapter: what it is about, and how many of its papers run."""
    rows = []
    for chapter, about in _catalogue.chapters().items():
        papers = [paper for paper in _catalogue.papers().values() if paper.chapter == chapter]
        runs = sum((notebooks / paper.file).is_file() for paper in papers)
        there = f"{runs} of {len(papers)}" if papers else counted(len(_files(notebooks / chapter)), "notebook")
        title = chapter_title(chapter)
        rows.append([f"[{title}](notebooks/README.md#{anchor(title)})", about, there])
    return table(["chapter", "what it is about", "papers that run"], rows)


def _files(chapter: Path) -> list[Path]:
    return sorted(chapter.glob("*.ipynb"))


def _lessons(chapter: Path) -> list[str]:
    """The notebooks that teach the kit, which have no paper."""
    rows = []
    for path in _files(chapter):
        head = _cells.head(_cells.read(path)["cells"])
        title = f"[{path.stem[:2]} {head.title or path.stem}]({chapter.name}/{path.name})"
        rows.append([title, _said(head.able, chapter), _time(head), _said(head.know_before, chapter)])
    return table(["notebook", "able to afterwards", "time, difficulty", "know before"], rows)


def _row(notebooks: Path, paper: Paper, claims: Sequence[Claim], pictures: Collection[Path]) -> list[str]:
    path = notebooks / paper.file
    head = _cells.head(_cells.read(path)["cells"])
    name = f"pictures/{paper.slug}.jpg"
    there = (notebooks / name).is_file() or notebooks / name in pictures
    alt = html.escape(f"main picture of {paper.title}")
    picture = f'<a href="{paper.file}"><img src="{name}" width="320" alt="{alt}"></a>' if there else "-"
    found = verdicts(claims)
    linked = found if found == "-" else f"[{found}](../CLAIMS.md#{anchor(paper.title)})"
    title = f"[{paper.title}]({paper.file})<br>{paper.byline}, {paper.year}"
    return [title, picture, _time(head), linked, _said(head.know_before, path.parent)]


def _said(paragraph: str, folder: Path) -> str:
    return relinked(paragraph.rstrip("."), folder.name) or "-"


def _time(head: _cells.Head) -> str:
    return "<br>".join(filter(None, (head.time.rstrip("."), head.difficulty.rstrip(".")))) or "-"


def _planned(papers: Sequence[Paper]) -> list[str]:
    if not papers:
        return []
    lines = ["", "<details>", f"<summary>{counted(len(papers), 'paper')} planned</summary>", ""]
    for paper in papers:
        where = f" ([arXiv {paper.arxiv}]({paper.url}))" if paper.url else ""
        lines.append(f"- {paper.title}, {paper.byline}, {paper.year}{where}")
    return [*lines, "", "</details>"]
