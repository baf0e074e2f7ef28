"""Recording whether a paper's claim holds here: the figures, the rule decided before looking, and the verdict.

A notebook computes ``holds`` from its own runs and states the verdict it expects. :func:`check` fails the cell where
the two part, so a stored verdict is one that is still true. ``python -m nbkit.claims`` gathers the stored outputs of
all notebooks into ``CLAIMS.md``; with ``--check`` it only says whether that file is up to date.
"""

from __future__ import annotations

import argparse
import html
import math
import numbers
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nbkit import _catalogue, _cells, _paths
from nbkit.errors import NotFinite

MIME = "application/vnd.nbkit.claim+json"
HOLDS, FAILS = VERDICTS = ("holds", "does not hold here")


class VerdictChanged(AssertionError):
    """What a notebook computes no longer agrees with the verdict it states."""


@dataclass(frozen=True)
class Claim:
    """One claim of a paper, checked. ``ours`` maps what was measured to its values, one a seed (or a run)."""

    slug: str
    name: str
    claim: str
    ours: Mapping[str, tuple[float, ...]]
    verdict: str
    threshold: str
    paper: str | None = None
    unit: str = ""
    note: str = ""

    @property
    def holds(self) -> bool:
        return self.verdict == HOLDS

    @property
    def figures(self) -> str:
        """Ours in one line: ``"neuron path 0.617 ± 0.040; activation 0.723 ± 0.025"``."""
        return "; ".join(f"{label} {spread(values, self.unit)}" for label, values in self.ours.items())

    def __repr__(self) -> str:
        return f"{self.slug} / {self.name}: {self.verdict} ({self.figures})"

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, Any]:
        # A list of pairs: a notebook file sorts the keys of a dict.
        ours = [[label, [float(f"{value:.6g}") for value in values]] for label, values in self.ours.items()]
        return {"text/plain": repr(self), "text/html": self._html(), MIME: {**asdict(self), "ours": ours}}

    def _html(self) -> str:
        colour, mark = ("#0072b2", "&#10003;") if self.holds else ("#d55e00", "&#10007;")  # colour-blind safe
        rows = "".join(
            f'<tr><td style="text-align:left">{html.escape(label)}</td>'
            f"<td>{spread(values)}</td><td>{len(values)}</td></tr>"
            for label, values in self.ours.items()
        )
        unit = f" ({html.escape(self.unit)})" if self.unit else ""
        facts = [("Paper", self.paper or "no number quoted"), ("Rule, set before", self.threshold)]
        facts += [("Note", self.note)] if self.note else []
        return "\n".join(
            [
                f'<div style="border-left:4px solid {colour};padding-left:0.8em">',
                f"<div><b>{html.escape(self.claim)}</b></div>",
                f'<table><thead><tr><th style="text-align:left">ours{unit}</th><th>mean &plusmn; sd</th><th>runs</th>',
                f"</tr></thead><tbody>{rows}</tbody></table>",
                *(f"<div><i>{label}:</i> {html.escape(text)}</div>" for label, text in facts),
                f'<div style="color:{colour}"><b>{mark} {self.verdict}</b></div></div>',
            ]
        )


def check(
    slug: str,
    name: str,
    claim: str,
    *,
    ours: Mapping[str, float | Sequence[float]] | float | Sequence[float],
    holds: bool,
    verdict: str,
    threshold: str,
    paper: str | float | None = None,
    unit: str = "",
    note: str = "",
) -> Claim:
    """Record a claim of the paper ``slug`` and assert that its verdict is still true.

    ``ours`` maps what was measured to its values, one a seed or run (a list, array or tensor of shape ``[runs]``, or a
    single number); without a name they are called "ours". The table shows their mean and sample standard deviation.
    ``holds`` is what this notebook computes; ``verdict`` what it states: ``"holds"`` or ``"does not hold here"``.
    ``threshold`` says the rule behind ``holds`` in words, decided before the figures were seen. ``paper`` quotes the
    paper's own number, ``None`` where nobody read it in the source. ``name`` tells a paper's claims apart. Make the
    call the last line of its cell: the output is what ``CLAIMS.md`` is made of.

    Raises: VerdictChanged (an AssertionError) where ``holds`` and ``verdict`` part; UnknownName (slug), ValueError
    (verdict, empty values or texts), NotFinite (NaN or infinite values), TypeError (``holds`` is not a truth value,
    ``ours`` holds no numbers, ``paper``, ``unit`` or ``note`` is neither text nor number).

    >>> claims.check("neuron-path", "removal", "Removing the path hurts more than removing the largest activations",
    ...              ours={"neuron path": [.61, .58, .66], "activation": [.72, .70, .75]}, unit="p / p0",
    ...              holds=True, verdict="holds", threshold="lower mean in at least 2 of 3 seeds")
    """
    _catalogue.get(slug)
    if verdict not in VERDICTS:
        raise ValueError(f"verdict must be {HOLDS!r} or {FAILS!r}, not {verdict!r}")
    for field, text in (("name", name), ("claim", claim), ("threshold", threshold)):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{field} must be a text that says something, not {text!r}")
    named = dict(ours) if hasattr(ours, "keys") else {"ours": ours}
    values = {str(label): _values(label, given) for label, given in named.items()}
    if not values:
        raise ValueError("ours is empty: give at least one measured quantity")
    paper, unit, note = _text("paper", paper) or None, _text("unit", unit), _text("note", note)
    result = Claim(slug, name, claim, values, verdict, threshold, paper, unit, note)
    computed = HOLDS if _truth(holds) else FAILS
    if computed != verdict:
        raise VerdictChanged(
            f"{slug} / {name}: the verdict was {verdict!r}, but the figures now say {computed!r}: {result.figures}; "
            f"rule: {threshold}"
        )
    return result


def _values(label: str, given: Any) -> tuple[float, ...]:
    given = given.tolist() if hasattr(given, "tolist") else given  # arrays, tensors, Series
    if isinstance(given, (str, Mapping)) or not isinstance(given, (numbers.Real, Iterable)):
        raise TypeError(f"ours[{label!r}] must be a number or a list of numbers, not {type(given).__name__}")
    given = [given] if isinstance(given, numbers.Real) else list(given)
    if not given:
        raise ValueError(f"ours[{label!r}] is empty: give a value a run")
    if not all(isinstance(value, numbers.Real) and not isinstance(value, bool) for value in given):
        raise ValueError(f"ours[{label!r}] must hold one number a run, not {given!r:.80}")
    if bad := [value for value in given if not math.isfinite(value)]:
        raise NotFinite(f"ours[{label!r}] holds {len(bad)} NaN or infinite values of {len(given)}")
    return tuple(float(value) for value in given)


def _text(field: str, given: Any) -> str:
    if isinstance(given, numbers.Real) and not isinstance(given, bool):
        return str(given)
    if not isinstance(given, str | None):
        raise TypeError(f"{field} must be a text or a number, not {type(given).__name__}")
    return given or ""


def _truth(holds: Any) -> bool:
    holds = holds.item() if hasattr(holds, "item") else holds  # numpy and torch have their own truth values
    if not isinstance(holds, bool):
        raise TypeError(f"holds must be True or False, computed in the cell, not {holds!r}")
    return holds


def spread(values: Sequence[float], unit: str = "") -> str:
    """``"0.617 ± 0.040 p / p0"``: mean and sample standard deviation to three digits, or the one value there is."""
    mean = sum(values) / len(values)
    unit = f" {unit}" if unit else ""
    if len(values) == 1:
        return f"{mean:.3g}{unit}"
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    digits = max(0, 2 - math.floor(math.log10(max(abs(mean), deviation)))) if mean or deviation else 0
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}{unit}"


def collect(notebooks: str | Path | None = None) -> list[Claim]:
    """The claims stored in the outputs of the executed notebooks of every paper, in reading order.

    ``notebooks`` is the folder of the chapters, the kit's own by default. Raises: ValueError where a notebook holds a
    claim of another paper, two claims of one name, or a ``claims.check`` cell without its stored claim.
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
        calls = _cells.source(cell).count("claims.check(") if cell["cell_type"] == "code" else 0
        if calls > len(stored):
            raise ValueError(
                f"{path.name}, cell {number}: {calls} claims.check and {len(stored)} stored claims; make it the last "
                "line of its cell (or display() it) and run the notebook"
            )
        for record in stored:
            claim = Claim(**{**record, "ours": {label: tuple(values) for label, values in record["ours"]}})
            if claim.slug != slug:
                raise ValueError(f"{path.name}, cell {number}: a claim of {claim.slug!r} in the notebook of {slug!r}")
            if claim.name in claims:
                raise ValueError(f"{path.name}, cell {number}: two claims have the name {claim.name!r}")
            claims[claim.name] = claim
    return list(claims.values())


def markdown(claims: Iterable[Claim]) -> str:
    """The text of ``CLAIMS.md``: counts, then a table a paper."""
    claims = list(claims)
    held = sum(claim.holds for claim in claims)
    slugs = list(dict.fromkeys(claim.slug for claim in claims))
    lines = [
        "# Claims",
        "",
        "What the notebooks found when they checked the papers' claims at the scale of a laptop, each by a rule set "
        "before looking. A verdict speaks of the notebook's model and data, not of the paper's. `make claims` writes "
        "this file from the notebooks' stored outputs.",
        "",
        f"{_count(len(claims), 'claim')} of {_count(len(slugs), 'paper')}: **{held}** hold, "
        f"**{len(claims) - held}** do not hold here.",
    ]
    for slug in slugs:
        paper = _catalogue.get(slug)
        lines += ["", f"## [{paper.title}](notebooks/{paper.file})", "", f"{paper.byline}, {paper.year}", ""]
        lines += ["| claim | paper | ours (mean ± sd) | rule | verdict |", "| --- | --- | --- | --- | --- |"]
        lines += [_row(claim) for claim in claims if claim.slug == slug]
    return "\n".join(lines) + "\n"


def _row(claim: Claim) -> str:
    runs = {len(values) for values in claim.ours.values()}
    ours = [f"{label}: {spread(values)}" for label, values in claim.ours.items()]
    about = [claim.unit] * bool(claim.unit) + [f"{' or '.join(map(str, sorted(runs)))} runs"] * (runs != {1})
    ours += [f"({', '.join(about)})"] if about else []
    verdict = f"**{claim.verdict}**" + (f"<br>{claim.note}" if claim.note else "")
    cells = [claim.claim, claim.paper or "-", "<br>".join(ours), claim.threshold, verdict]
    return "| " + " | ".join(" ".join(text.split()).replace("|", "\\|") for text in cells) + " |"


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m nbkit.claims", description="Gather the claims into CLAIMS.md.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the file is out of date")
    parser.add_argument("--notebooks", type=Path, default=None, help="folder of the chapters (the kit's own)")
    parser.add_argument("--out", type=Path, default=None, help="file to write (CLAIMS.md beside the notebooks)")
    args = parser.parse_args(argv)
    root = args.notebooks or _paths.notebooks_dir()
    out = args.out or root.parent / "CLAIMS.md"
    try:
        claims = collect(root)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    text = markdown(claims)
    stored = out.read_text(encoding="utf-8") if out.is_file() else None
    if args.check and stored != text:
        print(f"{out.name} {'is out of date' if stored else 'is missing'}: run `make claims`", file=sys.stderr)
        return 1
    if not args.check:
        out.write_text(text, encoding="utf-8", newline="\n")
    print(f"{out.name}: {_count(len(claims), 'claim')}, {sum(c.holds for c in claims)} hold")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
