"""What a paper's notebook looks like beside that: the walk from the question to the sources."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

from nbkit import _cells, claims, papers
from tests.notebooks import code
from tests.notebooks.book import SECTIONS, Book, headings, pictures
from tests.notebooks.shape import EVERY

FEWEST_WORDS = 800
FEWEST_PICTURES = 3
_NOT_CONTROLS = {"initial", "figsize", "dpi", "cache_bytes"}


def sections(book: Book) -> list[str]:
    heads = [head for cell in book.cells for head in headings(cell, 2)]
    places = []
    for section, words in SECTIONS.items():
        place = next((i for i, head in enumerate(heads) if words in head and i not in places), None)
        if place is None:
            return [f"no section '## {section}'"]
        places.append(place)
    return [] if places == sorted(places) else [f"sections out of order: {', '.join(heads)}"]


def title_cell(book: Book) -> list[str]:
    text, paper = _cells.source(book.cells[0]), book.paper
    surname = paper.authors[0].split()[-1]
    wanted = {
        f"the paper's title ({paper.title})": _plain(paper.title) in _plain(text),
        f"its first author ({surname})": _plain(surname) in _plain(text),
        f"its year ({paper.year})": str(paper.year) in text,
        f"its arXiv id ({paper.arxiv})": paper.arxiv is None or paper.arxiv in text,
    }
    return [f"the title cell lacks {what}" for what, there in wanted.items() if not there]


def _plain(text: str) -> str:
    bare = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return re.sub(r"[^a-z0-9]+", " ", bare.lower()).strip()


def written(book: Book) -> list[str]:
    """Nothing is left of the skeleton that ``python -m nbkit.papers new`` made."""
    texts = [(number, _cells.source(cell)) for number, cell in enumerate(book.cells, start=1)]
    return [f"cell {number}: still says 'to write'" for number, text in texts if re.search(r"\bto write\b", text, re.I)]


def told(book: Book) -> list[str]:
    words = len(book.prose.split())
    return [f"{words} words, fewer than {FEWEST_WORDS}"] if words < FEWEST_WORDS else []


def method_cells(book: Book) -> list[str]:
    tagged = [(number, source) for number, _, source in book.numbered(tag="method")]
    if not tagged:
        return ["no cell is tagged 'method'"]
    return [
        f"cell {number}, line {line}: {why}"
        for number, source in tagged
        for line, why in papers.unsafe_statements(source)
    ]


def known_answer(book: Book) -> list[str]:
    source = book.code_of("A case with a known answer")
    return [] if re.search(r"^\s*assert |testing\.assert_", source, re.M) else ["the known answer is not asserted"]


def explorer(book: Book) -> list[str]:
    made = [c for _, _, s in book.numbered() for c in code.calls(s, run_now=True) if code.name(c) == "explore"]
    most = max((len({k.arg for k in call.keywords} - _NOT_CONTROLS) for call in made), default=0)
    return [] if most >= 2 else [f"no explorer with two controls or more (the richest has {most})"]


def claim(book: Book) -> list[str]:
    """The claims stand in their section, and each stored one says whose it is and how easily noise would pass."""
    asked = "claims.check(" in book.code_of("Does the claim hold here?")
    found = [] if asked else ["no claims.check in '## Does the claim hold here?'"]
    stored = [
        output["data"][claims.MIME]
        for _, cell, _ in book.numbered()
        for output in cell["outputs"]
        if claims.MIME in output.get("data", {})
    ]
    checks = sum(source.count("claims.check(") for _, _, source in book.numbered())
    if checks > len(stored):
        found.append(f"{checks} claims.check and {len(stored)} stored claims: make each the last line of its cell")
    found += [line for one in stored for line in _unsaid(one)]
    if not any(one.get("kind") == "paper" for one in stored):
        found.append("no claim of the paper in the stored outputs")
    return found


def _unsaid(stored: dict) -> list[str]:
    lacks = [] if stored.get("kind") in claims.KINDS else ["kind"]
    if stored["verdict"] != claims.UNTESTED and stored.get("by_chance") is None:
        lacks.append("by_chance and how it was got")
    return [f"the stored claim {stored['name']!r} lacks {what}" for what in lacks]


def illustrated(book: Book) -> list[str]:
    n = sum(pictures(cell) for _, cell, _ in book.numbered())
    return [] if n >= FEWEST_PICTURES else [f"{n} pictures stored, fewer than {FEWEST_PICTURES}"]


def main_picture(book: Book) -> list[str]:
    """The picture that stands for the notebook in the index."""
    tagged = [(number, cell) for number, cell, _ in book.numbered(tag="main-picture")]
    if len(tagged) != 1:
        return [f"{len(tagged)} cells are tagged 'main-picture', not one"]
    number, cell = tagged[0]
    return [] if pictures(cell) else [f"cell {number}: is tagged main-picture and stores none"]


def own_model(book: Book) -> list[str]:
    return [] if book.code_of("Your own model").strip() else ["'## Your own model' has no code"]


PAPER: list[Callable[[Book], list[str]]] = [
    *EVERY, sections, title_cell, written, told, method_cells, known_answer, explorer, claim, illustrated, main_picture,
    own_model,
]  # fmt: skip
