"""What pytest does with a notebook beyond nbval: it runs the exercises' solutions, and says which notebooks took long.

nbval runs a notebook's cells in one kernel, a test each. The code of the folded solutions (each ```python fence, in
order) follows as further tests in the same kernel, so a solution starts from what the reader's kernel holds at the end.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest
from nbformat.v4 import new_code_cell
from nbval.plugin import IPyNbCell, IPyNbFile

from tests.notebooks import code
from tests.notebooks.book import Book

PAPERS = 88
SHOWN = 5


class Solution(IPyNbCell):
    """A piece of solution code: it runs, and each exercise it checks is right."""

    def runtest(self) -> None:
        super().runtest()
        said = "".join(output.get("text", "") for output in self.test_outputs if output.get("name") == "stdout")
        for exercise in code.answers(self.cell.source):
            if f"{exercise}: right" not in said.splitlines():
                self.raise_cell_error(f"the solution of {exercise!r} was not found right; it printed\n{said}")

    def reportinfo(self):
        path, line, _ = super().reportinfo()
        return path, line, f"{self.parent.name}::{self.name}"


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    if isinstance(collector, IPyNbFile) and report.passed:
        for number, source in enumerate(Book.read(collector.path).solutions, start=1):
            about = {"cell_num": len(report.result), "cell": new_code_cell(source), "options": defaultdict(bool)}
            report.result.append(Solution.from_parent(collector, name=f"solution {number}", **about))
    return report


def pytest_terminal_summary(terminalreporter, config):
    reports = [report for group in terminalreporter.stats.values() for report in group if hasattr(report, "duration")]
    spent: dict[str, float] = defaultdict(float)
    for report in reports:
        spent[report.nodeid.split("::")[0]] += report.duration
    if lines := summary(spent, workers=config.getoption("numprocesses", None) or 1):
        terminalreporter.section("notebooks")
        for line in lines:
            terminalreporter.line(line)


def summary(spent: dict[str, float], workers: int) -> list[str]:
    """The longest notebooks, and what 88 papers would take; ``spent`` is file -> seconds."""
    books = {name: seconds for name, seconds in spent.items() if name.endswith(".ipynb")}
    if not books:
        return []
    longest = sorted(books, key=books.get, reverse=True)[:SHOWN]
    lines = ["slowest notebooks: " + ", ".join(f"{Path(name).stem} {books[name]:.0f} s" for name in longest)]
    papers = [name for name in books if not Path(name).parent.name.startswith("00-")]
    if papers:
        theirs = sum(s for name, s in spent.items() if name in papers or name.startswith("tests/papers/"))
        each, rest = theirs / len(papers), sum(spent.values()) - theirs
        minutes = (PAPERS * each + rest) / 60 / workers
        lines.append(
            f"a paper takes {each:.0f} s (notebook and tests), everything else {rest / 60:.1f} minutes: "
            f"{PAPERS} papers about {minutes:.0f} minutes on {workers} worker{'s' * (workers > 1)}"
        )
    return lines
