"""Markdown as GitHub shows it: tables, links, and the part of a page between its markers."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table. A cell may hold Markdown and ``<br>``; its bars are escaped, its line ends removed."""
    rows = [[re.sub(r"[ \t\r\n]+", " ", cell).replace("|", "\\|") for cell in row] for row in (columns, *rows)]
    rows.insert(1, ["---"] * len(columns))
    return [f"| {' | '.join(row)} |" for row in rows]


def text(given: str) -> str:
    """Words that are no Markdown, so that nothing in them is taken for a tag."""
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", given)


def anchor(heading: str) -> str:
    """The fragment by which GitHub links to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def counted(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


def relinked(markdown: str, folder: str) -> str:
    """Links that are relative to ``folder``, made relative to the folder above it."""

    def moved(match: re.Match) -> str:
        target = match.group(1)
        if re.match(r"[a-z]+:|#|/", target):
            return match.group()
        return f"]({posixpath.normpath(posixpath.join(folder, target))})"

    return re.sub(r"\]\(([^)\s]+)\)", moved, markdown)


def between(path: Path, parts: Mapping[str, Sequence[str]]) -> str:
    """The text of a page with the lines between each pair of markers replaced.

    Raises: ValueError where a marker is missing, FileNotFoundError.
    """
    page = path.read_text(encoding="utf-8")
    for name, lines in parts.items():
        begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
        if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
            raise ValueError(
                f"{path.parent.name}/{path.name} needs the line {begin.strip()} and below it the line {end}, once "
                "each; the generated table goes between them"
            )
        head, rest = page.split(begin)
        page = head + begin + "".join(line + "\n" for line in lines) + end + rest.split(end)[1]
    return page
