"""The shelf: the catalogue of the 88 papers, each paper's stored data, and its method imported from its notebook.

>>> papers.search("pruning attention heads")          # a DataFrame, best match first
>>> craft = papers.method("craft")                    # the cells tagged `method`, as a module
>>> papers.results("grad-cam", "mosaics")            # a table its recipe measured once
>>> print(papers.bibtex(["craft", "neuron-path"]))
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import re
import unicodedata
from collections.abc import Iterable
from types import ModuleType

from nbkit import _catalogue
from nbkit._catalogue import Paper, get
from nbkit.papers._shelf import Facts, facts, folder, results, tensors, unlisted
from nbkit.papers.methods import module_name, unsafe_statements

__all__ = [
    "Facts", "Paper", "bibtex", "catalogue", "facts", "folder", "get", "method", "results", "search", "tensors",
    "unlisted", "unsafe_statements",
]  # fmt: skip

_COLUMNS = ["slug", "title", "authors", "year", "venue", "arxiv", "chapter", "order", "notebook"]


def catalogue():
    """All papers in reading order, a row each.

    Columns: slug, title, authors (one string), year, venue and arxiv (None where not known), chapter (the folder),
    order (place in the chapter, from 1), notebook (path relative to the notebooks folder, or "planned"; looked up
    on disk at every call).

    >>> papers.catalogue().query("notebook != 'planned'")
    """
    return _frame(_catalogue.papers().values())


def search(text: str):
    """The papers that match every word of ``text``, best first; columns as in :func:`catalogue`.

    Words are looked for in slug, title, authors, chapter, venue, year and arXiv id, without regard to case, accents
    or hyphens; a word found nowhere is replaced by the nearest spelling that is. An empty text matches everything.
    Raises: TypeError for anything but text.

    >>> papers.search("gradcam")["slug"][0]
    'grad-cam'
    """
    if not isinstance(text, str):
        raise TypeError(f"search takes words as one text, not {type(text).__name__}")
    papers = list(_catalogue.papers().values())
    words = [_nearest_spelling(word, papers) for word in _plain(text).split()]
    scores = {paper.slug: [_score(word, paper) for word in words] for paper in papers}
    found = [paper for paper in papers if all(scores[paper.slug])]
    return _frame(sorted(found, key=lambda paper: -sum(scores[paper.slug])))


def bibtex(slugs: str | Iterable[str]) -> str:
    """BibTeX entries for one slug or several, keyed by slug. Raises UnknownName.

    Every entry is a ``@misc``: the catalogue does not know which venues are journals.
    """
    return "\n\n".join(_bibtex_entry(get(slug)) for slug in ([slugs] if isinstance(slugs, str) else slugs))


def method(slug: str) -> ModuleType:
    """The cells tagged ``method`` of a paper's notebook, as the module ``nbkit.papers.methods.<slug>``.

    The module is an ordinary one: imported once, named in tracebacks (with the notebook's cells as its source),
    importable by worker processes. ``importlib.reload`` reads an edited notebook again.

    Raises: UnknownName (no such paper), FileNotFoundError (its notebook is still planned), ValueError (no cell is
    tagged, or a tagged cell holds more than imports, functions, classes and constants).

    >>> papers.method("neuron-path").joint_score
    """
    paper = get(slug)
    if paper.path is None:
        raise FileNotFoundError(
            f"{slug!r} is planned: its notebook {paper.file} is not written yet; "
            "papers.catalogue() shows which notebooks there are"
        )
    return importlib.import_module(module_name(slug))


def _frame(papers: Iterable[Paper]):
    import pandas as pd

    rows = [
        {**dataclasses.asdict(paper), "authors": paper.byline, "notebook": paper.notebook} for paper in papers
    ]
    # pandas reads a None among texts as NaN, which is true
    plain = {name: pd.Series([row[name] for row in rows], dtype=object) for name in ("venue", "arxiv")}
    return pd.DataFrame(rows, columns=_COLUMNS).assign(**plain)


def _plain(text: str) -> str:
    bare = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return re.sub(r"[^a-z0-9.]+", " ", bare.lower()).strip()


@functools.cache
def _fields(paper: Paper) -> tuple[tuple[float, str], ...]:
    """(weight of a match in it, text) for every field that is searched."""
    numbers = f"{paper.year} {paper.arxiv or ''}"
    fields = [(8, paper.slug), (6, paper.title), (4, paper.byline), (3, paper.chapter), (2, paper.venue or "")]
    return tuple((weight, _plain(text)) for weight, text in [*fields, (2, numbers)])


def _score(word: str, paper: Paper) -> float:
    """How well one word matches: the weight of the best field, more for a whole word than for a part of one."""
    best = 0.0
    for weight, field in _fields(paper):
        joined = field.replace(" ", "")
        if word == joined:
            best = max(best, 3 * weight)
        elif word in field.split():
            best = max(best, 2 * weight)
        elif f" {word}" in f" {field}":
            best = max(best, 1.5 * weight)
        elif len(word) > 2 and word in joined:
            best = max(best, weight)
    return best


def _nearest_spelling(word: str, papers: list[Paper]) -> str:
    """``word``, or what is nearest to it in the catalogue where no paper has it."""
    if any(_score(word, paper) for paper in papers):
        return word
    vocabulary = sorted({known for paper in papers for _, field in _fields(paper) for known in field.split()})
    return next(iter(difflib.get_close_matches(word, vocabulary, n=1, cutoff=0.8)), word)


def _bibtex_entry(paper: Paper) -> str:
    authors = " and ".join(name if name != "et al." else "others" for name in paper.authors)
    fields = {"title": f"{{{_escape(paper.title)}}}", "author": _escape(authors), "year": str(paper.year)}
    if paper.arxiv:
        fields |= {"eprint": paper.arxiv, "archiveprefix": "arXiv", "url": paper.url}
    if paper.venue:
        fields["note"] = _escape(paper.venue)
    body = ",\n".join(f"  {key:<13} = {{{value}}}" for key, value in fields.items())
    return f"@misc{{{paper.slug},\n{body}\n}}"


def _escape(text: str) -> str:
    return re.sub(r"([&%$#_])", r"\\\1", text)
