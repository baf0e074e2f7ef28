"""The 88 papers as data: read once from ``_catalogue.toml``, asked by ``papers`` and ``claims``."""

from __future__ import annotations

import functools
import html
import tomllib
from dataclasses import dataclass
from pathlib import Path

from nbkit import _paths
from nbkit.errors import UnknownName, did_you_mean

PLANNED = "planned"


@dataclass(frozen=True)
class Paper:
    """One paper of the kit.

    ``chapter`` is a folder of ``notebooks/``, ``order`` the paper's place in it. ``year`` is the venue's where
    ``venue`` is known, else the first preprint's; ``venue`` and ``arxiv`` are ``None`` where they are not known.
    ``authors`` ends with ``"et al."`` where only the first ones are recorded.
    """

    slug: str
    title: str
    authors: tuple[str, ...]
    year: int
    chapter: str
    order: int
    arxiv: str | None = None
    venue: str | None = None

    @property
    def byline(self) -> str:
        """``"Frankle, Carbin"`` or ``"Yifan Wang et al."``."""
        return ", ".join(self.authors).replace(", et al.", " et al.")

    @property
    def file(self) -> str:
        """Where its notebook lies or will lie, relative to the notebooks folder."""
        return f"{self.chapter}/{self.order:02d}-{self.slug}.ipynb"

    @property
    def path(self) -> Path | None:
        """Its notebook on disk, or ``None`` while it is planned."""
        try:
            path = _paths.notebooks_dir() / self.file
        except FileNotFoundError:
            return None
        return path if path.is_file() else None

    @property
    def notebook(self) -> str:
        """``file`` once the notebook exists, else ``"planned"``."""
        return self.file if self.path else PLANNED

    @property
    def url(self) -> str | None:
        """Its page on arXiv."""
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else None

    def _repr_html_(self) -> str:
        where = f' <a href="{self.url}">arXiv {self.arxiv}</a>' if self.url else ""
        venue = f", {html.escape(self.venue)}" if self.venue else f", {self.year}"
        return (
            f"<b>{html.escape(self.title)}</b><br>{html.escape(self.byline)}{venue}.{where}<br>"
            f"<code>{self.slug}</code>, notebook: {self.notebook}"
        )


@functools.cache
def papers() -> dict[str, Paper]:
    """Slug -> paper, in reading order."""
    rows = _file()["paper"]
    return {row["slug"]: Paper(**{**row, "authors": tuple(row["authors"])}) for row in rows}


def chapters() -> dict[str, str]:
    """Folder of ``notebooks/`` -> what the chapter is about, in reading order, ``00-start`` first."""
    return _file()["chapters"]


@functools.cache
def _file() -> dict:
    return tomllib.loads(Path(__file__).with_name("_catalogue.toml").read_text(encoding="utf-8"))


def get(slug: str) -> Paper:
    """The paper with this slug. Raises UnknownName (a KeyError) naming the nearest."""
    known = papers()
    if slug not in known:
        raise UnknownName(f"no paper has the slug {slug!r}{did_you_mean(str(slug), known)}")
    return known[slug]
