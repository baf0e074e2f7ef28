"""What a notebook of the kit looks like: each rule returns what breaks it, a line each."""

from __future__ import annotations

import ast
import re
import symtable
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from nbkit import _cells, claims, notebooks, papers

SECTIONS = {
    "The question": "question",
    "The method": "method",
    "A case with a known answer": "known answer",
    "On real data": "real data",
    "Explore": "explore",
    "Does the claim hold here?": "claim",
    "Your own model": "your own model",
    "Exercises": "exercise",
    "Sources": "source",
}
WORDS = (630, 2200)  # 700 to 2,000, and a tenth either way
LINES = (72, 310)  # of LONGEST_LINE at most; a reader of a notebook cannot scroll sideways and follow
LONGEST_LINE = 130
LONGEST_CELL = 40
MOST_KB = 450
_DRAWS = {"explore", "show", "subplots", "subplot_mosaic", "figure"}
_NOT_CONTROLS = {"initial", "figsize", "dpi", "cache_bytes"}


@dataclass(frozen=True)
class Book:
    """A notebook file as the rules see it; ``paper`` is None in 00-start."""

    path: Path
    cells: list[dict]
    paper: papers.Paper | None = None

    @classmethod
    def read(cls, path: Path, paper: papers.Paper | None = None) -> Book:
        return cls(path, _cells.read(path)["cells"], paper)

    def numbered(self, kind: str) -> Iterator[tuple[int, dict, str]]:
        """(place counted from 1, cell, source) of the cells of one kind."""
        for number, cell in enumerate(self.cells, start=1):
            if cell["cell_type"] == kind:
                yield number, cell, _cells.source(cell)

    def section(self, name: str) -> list[dict]:
        """The cells from one level-2 heading to the next."""
        found, inside = [], False
        for cell in self.cells:
            heads = headings(cell, 2)
            if heads:
                inside = any(SECTIONS[name] in head for head in heads)
            if inside:
                found.append(cell)
        return found

    @property
    def prose(self) -> str:
        return "\n".join(source for _, _, source in self.numbered("markdown"))


def headings(cell: dict, level: int) -> list[str]:
    if cell["cell_type"] != "markdown":
        return []
    text = re.sub(r"^```.*?^```", "", _cells.source(cell), flags=re.M | re.S)
    return [head.strip().lower() for head in re.findall(rf"^#{{{level}}} (.*)", text, re.M)]


def code_lines(source: str) -> int:
    return sum(bool(line.strip()) and not line.strip().startswith("#") for line in source.splitlines())


def pictures(cell: dict) -> int:
    return sum(any(kind.startswith("image/") for kind in output.get("data", {})) for output in cell.get("outputs", []))


def printed(cell: dict) -> str:
    return "".join("".join(output.get("text", "")) for output in cell.get("outputs", []))


def _plain(text: str) -> str:
    bare = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return re.sub(r"[^a-z0-9]+", " ", bare.lower()).strip()


def _python(source: str) -> str:
    """A cell without its magics."""
    return "\n".join(line for line in source.splitlines() if not line.lstrip().startswith(("%", "!")))


def _calls(source: str, *, run_now: bool) -> list[ast.Call]:
    """The calls in a cell; with ``run_now`` those the cell makes itself, not those inside the functions it defines."""
    todo: list[ast.AST] = [ast.parse(_python(source))]
    found = []
    while todo:
        node = todo.pop()
        if run_now and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
            continue
        found += [node] if isinstance(node, ast.Call) else []
        todo += ast.iter_child_nodes(node)
    return found


def _name(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


# --- every notebook


def normal_form(book: Book) -> list[str]:
    return notebooks.check(book.path)


def small(book: Book) -> list[str]:
    size = book.path.stat().st_size / 1024
    return [f"{size:.0f} KB stored, over {MOST_KB}"] if size > MOST_KB else []


def short_cells(book: Book) -> list[str]:
    """No cell longer than a screen, no line wider than one."""
    found = []
    for number, _, source in book.numbered("code"):
        lines, widest = code_lines(source), max(map(len, source.splitlines()), default=0)
        found += [f"cell {number}: {lines} lines of code, over {LONGEST_CELL}"] if lines > LONGEST_CELL else []
        found += [f"cell {number}: a line of {widest} characters, over {LONGEST_LINE}"] if widest > LONGEST_LINE else []
    return found


def deterministic(book: Book) -> list[str]:
    first = next((source for _, _, source in book.numbered("code")), "")
    called = "deterministic" in {_name(call) for call in _calls(first, run_now=True)}
    return [] if called else ["the first code cell does not call runtime.deterministic()"]


def titled(book: Book) -> list[str]:
    return [] if book.cells and headings(book.cells[0], 1) else ["the first cell is not a title (# ...)"]


def drawn(book: Book) -> list[str]:
    """A cell that draws shows what it drew."""
    found = []
    for number, cell, source in book.numbered("code"):
        draws = _DRAWS & {_name(call) for call in _calls(source, run_now=True)}
        if draws and not pictures(cell):
            found.append(f"cell {number}: calls {', '.join(sorted(draws))} and stores no picture")
    return found


def tidy(book: Book) -> list[str]:
    """No picture is introduced by the name of a matplotlib object: a semicolon ends such a line."""
    found = []
    for number, cell, _ in book.numbered("code"):
        texts = ["".join(output.get("data", {}).get("text/plain", "")) for output in cell.get("outputs", [])]
        if any(re.match(r"[\[(]*(<Axes|<matplotlib|<seaborn|Text\()", text) for text in texts):
            found.append(f"cell {number}: shows a matplotlib object's name; end its last line with a semicolon")
    return found


def selfchecked(book: Book) -> list[str]:
    """Explorers, where there are any, are checked in a cell whose output nbval compares."""
    explorers = sum(_name(call) == "explore" for _, _, s in book.numbered("code") for call in _calls(s, run_now=True))
    if not explorers:
        return []
    checks = [
        cell
        for _, cell, source in book.numbered("code")
        if source.lstrip().startswith("# NBVAL_CHECK_OUTPUT") and "selfcheck()" in source
    ]
    if not checks:
        return ["no cell that starts with '# NBVAL_CHECK_OUTPUT' calls widgets.selfcheck()"]
    return [] if re.search(r"selfcheck: \d+ explorer", printed(checks[-1])) else ["selfcheck's stored line is missing"]


def steady(book: Book) -> list[str]:
    """No cell further down rebinds what an explorer draws from: its controls are turned after the last cell, too."""
    reads, found = {}, []
    drawn_in: dict[str, int] = {}  # a render function -> the cell of its explorer
    for number, _, source in book.numbered("code"):
        assigned, functions = _top_level(source)
        for render, cell in drawn_in.items():
            for name in sorted(assigned & _reached(render, reads)):
                found.append(f"cell {number}: binds {name!r} anew, which the explorer of cell {cell} reads")
        reads |= functions
        for call in _calls(source, run_now=True):
            if _name(call) == "explore" and call.args and isinstance(call.args[0], ast.Name):
                drawn_in[call.args[0].id] = number
    return found


def _top_level(source: str) -> tuple[set[str], dict[str, set[str]]]:
    """The names that a cell assigns itself, and the globals that each function it defines reads."""
    table = symtable.symtable(_python(source), "cell", "exec")
    assigned = {s.get_name() for s in table.get_symbols() if s.is_assigned() and not s.is_imported()}
    functions = {child.get_name(): _globals(child) for child in table.get_children() if child.get_type() == "function"}
    return assigned - set(functions), functions


def _globals(table: symtable.SymbolTable) -> set[str]:
    own = {s.get_name() for s in table.get_symbols() if s.is_global() and not s.is_assigned()}
    return own.union(*(_globals(child) for child in table.get_children()))


def _reached(function: str, reads: dict[str, set[str]]) -> set[str]:
    """The globals a function reads, and those read by the functions among them."""
    seen, todo = set(), [function]
    while todo:
        for name in reads.get(todo.pop(), set()) - seen:
            seen.add(name)
            todo.append(name)
    return seen


def untimed(book: Book) -> list[str]:
    """Figures that differ from run to run are never compared."""
    return [
        f"cell {number}: compares its output and measures time or memory"
        for number, _, source in book.numbered("code")
        if "NBVAL_CHECK_OUTPUT" in source and re.search(r"perf_counter|%time|\btime\.time|getrusage|rss\b", source)
    ]


# --- a paper's notebook


def sections(book: Book) -> list[str]:
    heads = [head for cell in book.cells for head in headings(cell, 2)]
    places = []
    for name, words in SECTIONS.items():
        place = next((i for i, head in enumerate(heads) if words in head and i not in places), None)
        if place is None:
            return [f"no section '## {name}'"]
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
        "the run time": bool(re.search(r"run ?time|runs in|\d+ (s|seconds)\b", text, re.I)),
    }
    return [f"the title cell lacks {what}" for what, there in wanted.items() if not there]


def method_cells(book: Book) -> list[str]:
    tagged = [
        (number, source)
        for number, cell, source in book.numbered("code")
        if "method" in cell["metadata"].get("tags", [])
    ]
    if not tagged:
        return ["no cell is tagged 'method'"]
    return [
        f"cell {number}, line {line}: {why}"
        for number, source in tagged
        for line, why in papers.unsafe_statements(source)
    ]


def explorer(book: Book) -> list[str]:
    calls = [call for _, _, s in book.numbered("code") for call in _calls(s, run_now=True) if _name(call) == "explore"]
    most = max((len({k.arg for k in call.keywords} - _NOT_CONTROLS) for call in calls), default=0)
    return [] if most >= 2 else [f"no explorer with two controls or more (the richest has {most})"]


def claim(book: Book) -> list[str]:
    inside = "\n".join(_cells.source(c) for c in book.section("Does the claim hold here?") if c["cell_type"] == "code")
    stored = [o for _, cell, _ in book.numbered("code") for o in cell["outputs"] if claims.MIME in o.get("data", {})]
    found = [] if "claims.check(" in inside else ["no claims.check in '## Does the claim hold here?'"]
    return found + ([] if stored else ["no claim in the stored outputs"])


def illustrated(book: Book) -> list[str]:
    n = sum(pictures(cell) for _, cell, _ in book.numbered("code"))
    return [] if n >= 3 else [f"{n} pictures stored, fewer than 3"]


def length(book: Book) -> list[str]:
    words = len(book.prose.split())
    lines = sum(code_lines(source) for _, _, source in book.numbered("code"))
    found = [] if WORDS[0] <= words <= WORDS[1] else [f"{words} words, not {WORDS[0]} to {WORDS[1]}"]
    return found + ([] if LINES[0] <= lines <= LINES[1] else [f"{lines} lines of code, not {LINES[0]} to {LINES[1]}"])


def known_answer(book: Book) -> list[str]:
    source = "\n".join(_cells.source(c) for c in book.section("A case with a known answer") if c["cell_type"] == "code")
    return [] if re.search(r"^\s*assert |testing\.assert_", source, re.M) else ["the known answer is not asserted"]


def own_model(book: Book) -> list[str]:
    code = [cell for cell in book.section("Your own model") if cell["cell_type"] == "code"]
    return [] if code else ["'## Your own model' has no code"]


def solutions(book: Book) -> list[str]:
    text = "\n".join(_cells.source(cell) for cell in book.section("Exercises"))
    return [] if "<details" in text else ["no solution folded in <details> under '## Exercises'"]


EVERY: list[Callable[[Book], list[str]]] = [
    normal_form, small, short_cells, deterministic, titled, drawn, tidy, selfchecked, steady, untimed,
]  # fmt: skip
PAPER: list[Callable[[Book], list[str]]] = [
    *EVERY, sections, title_cell, method_cells, explorer, claim, illustrated, length, known_answer, own_model,
    solutions,
]  # fmt: skip
