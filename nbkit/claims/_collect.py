"""Reading stored claims back from the outputs of the notebooks."""

from __future__ import annotations

import ast
from pathlib import Path

from nbkit import _catalogue, _cells, _paths
from nbkit.claims._record import MIME, Claim


def collect(notebooks: str | Path | None = None) -> list[Claim]:
    """The claims stored in the outputs of the executed notebooks of every paper, in reading order.

    ``notebooks`` is the folder of the chapters, the kit's own by default. Raises: ValueError where a notebook holds a
    claim of another paper, two claims of one name, a record that is no claim, or a ``claims.check`` cell without its
    stored claim.
    """
    root = Path(notebooks) if notebooks else _paths.notebooks_dir()
    found: list[Claim] = []
    for paper in _catalogue.papers().values():
        path = root / paper.file
        if path.is_file():
            found += _stored(path, paper.slug)
    return found


def _stored(path: Path, slug: str) -> list[Claim]:
    claims: dict[str, Claim] = {}
    for number, cell in _cells.numbered(path):
        outputs = [output.get("data", {}) for output in cell.get("outputs", [])]
        stored = [data[MIME] for data in outputs if MIME in data]
        calls = _calls(_cells.source(cell)) if cell["cell_type"] == "code" else 0
        where = f"{path.name}, cell {number}"
        if calls > len(stored):
            raise ValueError(
                f"{where}: {calls} claims.check and {len(stored)} stored claims; make it the last "
                "line of its cell (or display() it) and run the notebook"
            )
        for record in stored:
            try:
                claim = Claim.from_record(record)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            if claim.slug != slug:
                raise ValueError(f"{where}: a claim of {claim.slug!r} in the notebook of {slug!r}")
            if claim.name in claims:
                raise ValueError(f"{where}: two claims have the name {claim.name!r}")
            claims[claim.name] = claim
    return list(claims.values())


def _calls(source: str) -> int:
    """How often a cell calls ``claims.check`` when it runs; in a function it only says what the function will do."""
    try:
        made = _cells.calls(ast.parse(source))
    except SyntaxError:  # a magic
        return source.count("claims.check(")
    return sum(ast.unparse(call.func) == "claims.check" for call in made)
