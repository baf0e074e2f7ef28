"""Collections of text that know what answers what: documents with graded relevance, and a dictionary."""

from __future__ import annotations

import html
from dataclasses import dataclass, field

from nbkit.datasets._types import Dataset


@dataclass(frozen=True, repr=False, eq=False)
class Retrieval(Dataset):
    """Documents, queries, and which documents answer a query how well; ``len`` counts documents.

    ``documents`` id -> text; ``queries`` id -> text; ``relevance`` query id -> {document id: grade}, where a higher
    grade is better and a document that is not listed has grade 0. ``licences`` document id -> what its authors ask for.

    >>> from nbkit import datasets
    >>> d = datasets.load("manpages")
    >>> d.queries["qsort.3"], d.relevance["qsort.3"]
    ('sort an array', {'qsort.3': 2, 'scandir.3': 1, 'strcmp.3': 1})
    """

    documents: dict[str, str] = field(default_factory=dict)
    queries: dict[str, str] = field(default_factory=dict)
    relevance: dict[str, dict[str, int]] = field(default_factory=dict)
    licences: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.documents)

    def _repr_html_(self) -> str:
        rows = []
        for query in list(self.queries)[:: max(1, len(self.queries) // 3)][:3]:
            grades = sorted(self.relevance[query].items(), key=lambda item: -item[1])
            found = ", ".join(f"{document} ({grade})" for document, grade in grades[:8])
            more = f" and {len(grades) - 8} more" if len(grades) > 8 else ""
            rows.append(_row(self.queries[query], found + more))
        return super()._repr_html_() + _table("query", "relevant documents (grade)", rows)


@dataclass(frozen=True, repr=False, eq=False)
class Dictionary(Dataset):
    """Definitions and the words that have them. Five tuples of one length, an entry a meaning; ``len`` counts entries.

    ``words`` tuples of synonyms; ``parts`` "noun", "verb", "adjective" or "adverb"; ``definitions`` strings;
    ``examples`` tuples of sentences or phrases, often empty; ``topics`` as "noun.animal", one of 45. For a reverse
    dictionary the definition is the query and any of the words an answer; a word with several meanings is in several
    entries.

    >>> from nbkit import datasets
    >>> d = datasets.load("wordnet")
    >>> i = d.words.index(("dog", "domestic dog", "Canis familiaris"))
    >>> d.parts[i], d.topics[i], d.examples[i]
    ('noun', 'noun.animal', ('the dog barked all night',))
    """

    words: tuple[tuple[str, ...], ...] = ()
    definitions: tuple[str, ...] = ()
    examples: tuple[tuple[str, ...], ...] = ()
    parts: tuple[str, ...] = ()
    topics: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.definitions)

    def _repr_html_(self) -> str:
        first = [self.parts.index(part) for part in dict.fromkeys(self.parts)]
        rows = [_row(self.definitions[i], f"{', '.join(self.words[i])} ({self.parts[i]})") for i in first]
        return super()._repr_html_() + _table("definition", "words", rows)


def _row(*cells: str) -> str:
    return "<tr>" + "".join(f"<td style='text-align:left'>{html.escape(c)}</td>" for c in cells) + "</tr>"


def _table(left: str, right: str, rows: list[str]) -> str:
    head = "".join(f"<th style='text-align:left'>{name}</th>" for name in (left, right))
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"
