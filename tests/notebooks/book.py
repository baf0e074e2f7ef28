"""A notebook file as the rules see it: its cells, its sections, what they stored."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nbkit import _cells, papers

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
_FENCE = re.compile(r"^```python\n(.*?)^```", re.M | re.S)
_FOLDED = re.compile(r"<details.*?</details>", re.S)


@dataclass(frozen=True)
class Book:
    """``paper`` is None in 00-start."""

    path: Path
    cells: list[dict]
    paper: papers.Paper | None = None

    @classmethod
    def read(cls, path: Path, paper: papers.Paper | None = None) -> Book:
        return cls(path, _cells.read(path)["cells"], paper)

    def numbered(self, kind: str = "code", tag: str | None = None) -> Iterator[tuple[int, dict, str]]:
        """(place counted from 1, cell, source) of the cells of one kind, or of those among them that carry a tag."""
        for number, cell in enumerate(self.cells, start=1):
            if cell["cell_type"] == kind and (tag is None or tag in tags(cell)):
                yield number, cell, _cells.source(cell)

    def section(self, name: str) -> list[dict]:
        """The cells from one level-2 heading to the next, the cell that the next one stands in included."""
        found, inside = [], False
        for cell in self.cells:
            before = inside
            if heads := headings(cell, 2):
                inside = any(SECTIONS[name] in head for head in heads)
            if inside or before:
                found.append(cell)
        return found

    def code_of(self, name: str) -> str:
        """The code of a section."""
        return "\n".join(_cells.source(cell) for cell in self.section(name) if cell["cell_type"] == "code")

    @property
    def prose(self) -> str:
        return "\n".join(source for _, _, source in self.numbered("markdown"))

    @property
    def solutions(self) -> list[str]:
        """The code of the exercises' folded solutions: each ```python fence, in order."""
        text = "\n".join(_cells.source(cell) for cell in self.section("Exercises") if cell["cell_type"] == "markdown")
        return [fence.rstrip() for folded in _FOLDED.findall(text) for fence in _FENCE.findall(folded)]


def tags(cell: dict) -> list[str]:
    return cell.get("metadata", {}).get("tags", [])


def headings(cell: dict, level: int) -> list[str]:
    if cell["cell_type"] != "markdown":
        return []
    text = re.sub(r"^```.*?^```", "", _cells.source(cell), flags=re.M | re.S)
    return [head.strip().lower() for head in re.findall(rf"^#{{{level}}} (.*)", text, re.M)]


def pictures(cell: dict) -> int:
    return sum(any(kind.startswith("image/") for kind in output.get("data", {})) for output in cell.get("outputs", []))


def printed(cell: dict) -> str:
    return "".join("".join(output.get("text", "")) for output in cell.get("outputs", []))
