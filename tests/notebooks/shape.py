"""What every notebook of the kit looks like: each rule returns what breaks it, a line each."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable

from nbkit import _cells, notebooks
from tests.notebooks import code
from tests.notebooks.book import Book, headings, pictures, printed, tags

MOST_STATEMENTS = 210
MOST_WORDS = 2000
LONGEST_CELL = 25
LONGEST_LINE = 100  # a reader of a notebook cannot scroll sideways and follow
LONGEST_DRAWING = 10
MOST_KB = notebooks.MAX_KB
_DRAWS = {"explore", "show", "subplots", "subplot_mosaic", "figure"}
_ARTISTS = {"plt", "plots", "sns", "ax", "axes", "fig"}
_SETS_UP = {"style", "colours"}
_BUNDLES = (ast.Tuple, ast.List)
_LOOPS = (ast.ListComp, ast.SetComp, ast.GeneratorExp, ast.DictComp)


# --- the file


def normal_form(book: Book) -> list[str]:
    return notebooks.check(book.path)


def formatted(book: Book) -> list[str]:
    return notebooks.unformatted(book.path)


def small(book: Book) -> list[str]:
    size = book.path.stat().st_size / 1024
    return [f"{size:.0f} KB stored, over {MOST_KB}"] if size > MOST_KB else []


# --- the text


def titled(book: Book) -> list[str]:
    return [] if book.cells and headings(book.cells[0], 1) else ["the first cell is not a title (# ...)"]


def headed(book: Book) -> list[str]:
    """The title cell says what to know before, what one is able to afterwards, how long it takes, how hard it is."""
    return _cells.head_problems(book.cells)


def brief(book: Book) -> list[str]:
    words = len(book.prose.split())
    return [f"{words} words, over {MOST_WORDS}"] if words > MOST_WORDS else []


# --- the code


def few_statements(book: Book) -> list[str]:
    count = sum(code.statements(source) for _, _, source in book.numbered())
    return [f"{count} statements, over {MOST_STATEMENTS}"] if count > MOST_STATEMENTS else []


def short_cells(book: Book) -> list[str]:
    """No cell longer than a screen, no line wider than one."""
    found = []
    for number, _, source in book.numbered():
        lines, widest = code.lines(source), max(map(len, source.splitlines()), default=0)
        found += [f"cell {number}: {lines} lines of code, over {LONGEST_CELL}"] if lines > LONGEST_CELL else []
        found += [f"cell {number}: a line of {widest} columns, over {LONGEST_LINE}"] if widest > LONGEST_LINE else []
    return found


def plain(book: Book) -> list[str]:
    """One assignment a line, and a loop's header that is read at a glance."""
    found = []
    for number, _, source in book.numbered():
        for node in ast.walk(code.tree(source)):
            if isinstance(node, ast.Assign) and _packed(node):
                found.append(f"cell {number}: a packed assignment: {ast.unparse(node):.60}")
            if isinstance(node, ast.For) and _nested(node.iter):
                found.append(f"cell {number}: a nested comprehension in a loop's header: {ast.unparse(node):.60}")
    return found


def _packed(node: ast.Assign) -> bool:
    """``a, b = 1, 2`` is, as is ``a, b = (f(x) for x in y)``; ``a, b = f(x)`` is not, nor is ``a, b = b, a``."""
    if not any(isinstance(target, _BUNDLES) for target in node.targets):
        return False
    if not isinstance(node.value, _BUNDLES):
        return isinstance(node.value, _LOOPS)
    left = [sorted(map(ast.unparse, target.elts)) for target in node.targets if isinstance(target, _BUNDLES)]
    return left != [sorted(map(ast.unparse, node.value.elts))]


def _nested(header: ast.expr) -> bool:
    loops = [node for node in ast.walk(header) if isinstance(node, _LOOPS)]
    return sum(len(loop.generators) for loop in loops) > 1


def deterministic(book: Book) -> list[str]:
    first = next((source for _, _, source in book.numbered()), "")
    called = "deterministic" in {code.name(call) for call in code.calls(first, run_now=True)}
    return [] if called else ["the first code cell does not call runtime.deterministic()"]


def hidden(book: Book) -> list[str]:
    """A notebook's own drawing of more than ten lines stands in a cell that is shown collapsed; nothing else does."""
    found = []
    for number, cell, source in book.numbered():
        draws = any(code.owner(call) in _ARTISTS and code.name(call) not in _SETS_UP for call in code.calls(source))
        draws = draws and "method" not in tags(cell)
        lines = code.lines(source)
        if "hide-input" in tags(cell):
            found += [] if draws else [f"cell {number}: is tagged hide-input and is no drawing code"]
        elif draws and lines > LONGEST_DRAWING:
            found.append(f"cell {number}: draws in {lines} lines: shorten it, compute before it, or tag it hide-input")
    return found


# --- what a reader sees


def drawn(book: Book) -> list[str]:
    """A cell that draws shows what it drew."""
    found = []
    for number, cell, source in book.numbered():
        draws = _DRAWS & {code.name(call) for call in code.calls(source, run_now=True)}
        if draws and not pictures(cell):
            found.append(f"cell {number}: calls {', '.join(sorted(draws))} and stores no picture")
    return found


def tidy(book: Book) -> list[str]:
    """No picture is introduced by the name of a matplotlib object: a semicolon ends such a line."""
    found = []
    for number, cell, _ in book.numbered():
        texts = ["".join(output.get("data", {}).get("text/plain", "")) for output in cell.get("outputs", [])]
        if any(re.match(r"[\[(]*(<Axes|<matplotlib|<seaborn|Text\()", text) for text in texts):
            found.append(f"cell {number}: shows a matplotlib object's name; end its last line with a semicolon")
    return found


# --- what a reader touches


def selfchecked(book: Book) -> list[str]:
    """Explorers, where there are any, are checked in a cell whose output nbval compares."""
    explorers = sum(code.name(call) == "explore" for _, _, s in book.numbered() for call in code.calls(s, run_now=True))
    if not explorers:
        return []
    checks = [
        cell
        for _, cell, source in book.numbered()
        if source.lstrip().startswith("# NBVAL_CHECK_OUTPUT") and "selfcheck()" in source
    ]
    if not checks:
        return ["no cell that starts with '# NBVAL_CHECK_OUTPUT' calls widgets.selfcheck()"]
    return [] if re.search(r"selfcheck: \d+ explorer", printed(checks[-1])) else ["selfcheck's stored line is missing"]


def steady(book: Book) -> list[str]:
    """No cell further down rebinds what an explorer draws from: its controls are turned after the last cell, too."""
    reads, found = {}, []
    drawn_in: dict[str, int] = {}  # a render function -> the cell of its explorer
    for number, _, source in book.numbered():
        assigned, functions = code.top_level(source)
        for render, cell in drawn_in.items():
            for one in sorted(assigned & code.reached(render, reads)):
                found.append(f"cell {number}: binds {one!r} anew, which the explorer of cell {cell} reads")
        reads |= functions
        for call in code.calls(source, run_now=True):
            if code.name(call) == "explore" and call.args and isinstance(call.args[0], ast.Name):
                drawn_in[call.args[0].id] = number
    return found


def untimed(book: Book) -> list[str]:
    """Figures that differ from run to run are never compared."""
    return [
        f"cell {number}: compares its output and measures time or memory"
        for number, _, source in book.numbered()
        if "NBVAL_CHECK_OUTPUT" in source and re.search(r"perf_counter|%time|\btime\.time|getrusage|rss\b", source)
    ]


def exercised(book: Book) -> list[str]:
    """An exercise is done in code: a starter cell that ends by asking, and a folded solution that asks the same."""
    folded, found = {}, []
    for solution in book.solutions:
        try:
            folded |= code.answers(solution)
        except SyntaxError as error:
            found.append(f"a ```python fence of a solution is not Python: {error}")
    starters = list(book.numbered(tag="exercise"))
    for number, cell, source in starters:
        if not code.answers(code.last(source)):
            found.append(f"cell {number}: does not end with exercises.check(name, answer, digest)")
        for exercise, digest in code.answers(source).items():
            if folded.get(exercise) != digest:
                found.append(f"cell {number}: no ```python fence of a solution ends with the check of {exercise!r}")
            if not re.search(rf"^{re.escape(exercise)}: (right|not yet)$", printed(cell), re.M):
                found.append(f"cell {number}: its stored output does not say whether {exercise!r} is right")
    return found if starters else ["no cell is tagged 'exercise': at least one exercise is done in code", *found]


EVERY: list[Callable[[Book], list[str]]] = [
    normal_form, formatted, small, titled, headed, brief, few_statements, short_cells, plain, deterministic, hidden,
    drawn, tidy, selfchecked, steady, untimed, exercised,
]  # fmt: skip
