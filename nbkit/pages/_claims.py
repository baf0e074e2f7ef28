"""``CLAIMS.md``: what a verdict means, a count a chapter, a table a paper."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from nbkit import _catalogue
from nbkit.claims import FAILS, HOLDS, MIXED, UNTESTED, VERDICTS, Claim, figure
from nbkit.pages._markdown import anchor, counted, table, text

HEAD = f"""\
# Claims

What the notebooks found when they checked the papers' claims at the scale of a laptop. A verdict speaks of the
notebook's model and data, not of the paper's.

- **{HOLDS}**: the rule, set before the outcome was seen, is met in every case that it names.
- **{MIXED}**: met on one model, budget or measure and not on another; the row says which.
- **{FAILS}**: met in no case, at this scale. The figures stand beside it.
- **{UNTESTED}**: our scale cannot tell; the note says why.
- **By chance**: how often pure noise passes the rule; above 5 % it is no test, whatever the verdict.

Figures are means ± sample standard deviations. **Gain** is how far the method (bold) is ahead of the strongest rival
measured beside it, run by run where runs can be paired; a minus means behind. Rows of the kind *ours* are checks of our
own, which the paper does not make; the table counts them apart. `make index` writes this page."""

NBSP = "\N{NO-BREAK SPACE}"
UNBROKEN = 36  # characters of a figure with its label that GitHub is not to break
_COLUMNS = ["kind", "claim", "ours", "gain", "verdict"]


def page(claims: Iterable[Claim]) -> str:
    """The text of ``CLAIMS.md``."""
    claims = list(claims)
    lines = [HEAD, "", *_counts(claims)]
    lines += ["", chances] if (chances := _chances(claims)) else []
    for chapter in _catalogue.chapters():
        slugs = list(dict.fromkeys(c.slug for c in claims if _catalogue.get(c.slug).chapter == chapter))
        lines += ["", f"## {chapter_title(chapter)}"] if slugs else []
        for slug in slugs:
            paper = _catalogue.get(slug)
            lines += ["", f"### [{paper.title}](notebooks/{paper.file})", "", f"{paper.byline}, {paper.year}", ""]
            lines += table(_COLUMNS, [_row(claim) for claim in claims if claim.slug == slug])
    return "\n".join(lines) + "\n"


def chapter_title(chapter: str) -> str:
    """``"07-lean-transformers"`` -> ``"07 lean transformers"``."""
    return chapter.replace("-", " ")


def verdicts(claims: Sequence[Claim]) -> str:
    """How many of each verdict, in words; the papers' claims first, then our own checks."""
    papers, own = ([c for c in claims if c.kind == kind] for kind in ("paper", "ours"))
    said = {HOLDS: ("holds", "hold"), FAILS: ("does not hold here", "do not hold here")}
    parts = []
    for verdict in VERDICTS:
        if n := sum(c.verdict == verdict for c in papers):
            parts.append(f"{n} {said.get(verdict, (verdict, verdict))[n > 1]}")
    if own:
        parts.append(f"own checks: {sum(c.holds for c in own)} of {len(own)} hold")
    return ", ".join(parts) or "-"


def _counts(claims: Sequence[Claim]) -> list[str]:
    """A row a chapter, and their sum."""
    columns = ["chapter", "papers", "claims", *VERDICTS, "our own checks that hold"]
    catalogue = _catalogue.papers().values()
    rows = []
    for chapter in dict.fromkeys(paper.chapter for paper in catalogue):
        inside = [paper.slug for paper in catalogue if paper.chapter == chapter]
        part = [claim for claim in claims if claim.slug in inside]
        title = chapter_title(chapter)
        rows.append([f"[{title}](#{anchor(title)})" if part else title, *_numbers(part, len(inside))])
    rows.append(["**all**", *(f"**{number}**" for number in _numbers(claims, len(catalogue)))])
    return table(columns, rows)


def _numbers(claims: Sequence[Claim], of: int) -> list[str]:
    papers, own = ([c for c in claims if c.kind == kind] for kind in ("paper", "ours"))
    counts = [len(papers), *(sum(c.verdict == verdict for c in papers) for verdict in VERDICTS)]
    there = f"{len({c.slug for c in claims})} of {of}".replace(" ", NBSP)
    return [there, *(str(n or "-") for n in counts), f"{sum(c.holds for c in own)} of {len(own)}" if own else "-"]


def _chances(claims: Sequence[Claim]) -> str:
    """What the counts cannot say: how many rules decide nothing, and of how many that is not known."""
    tested = [claim for claim in claims if claim.verdict != UNTESTED]
    weak, unknown = sum(c.no_test for c in tested), sum(c.by_chance is None for c in tested)
    known = len(tested) - unknown
    said = [f"Noise passes {weak or 'none'} of {counted(known, 'rule')} more often than 5 %."] if known else []
    said += [f"For {unknown} of {counted(len(tested), 'rule')} that chance is not computed."] if unknown else []
    return " ".join(said)


def _row(claim: Claim) -> list[str]:
    chance = f"*By chance:* {claim.chance}{f' ({claim.how})' if claim.how else ''}" if claim.chance else ""
    about = [claim.claim, f"*Rule:* {claim.rule}", f"*In the paper:* {claim.paper}" if claim.paper else ""]
    outcome = [f"**{claim.verdict}**", claim.met, claim.note, chance, f"**{claim.caveat}**" if claim.caveat else ""]
    return [claim.kind, _lines(about), _ours(claim), _lines([str(claim.gain or "-")]), _lines(outcome)]


def _lines(parts: Iterable[str]) -> str:
    """Lines of one cell, their figures in one piece."""
    return "<br>".join(text(part) for part in parts if part).replace(" ± ", f"{NBSP}±{NBSP}")


def _ours(claim: Claim) -> str:
    lines = [f"{label}: {figure(values)}" for label, values in claim.ours.items()]
    lines = [line.replace(" ", NBSP) if len(line) <= UNBROKEN else line for line in lines]
    if claim.gain:
        lines = [f"**{line}**" if label == claim.gain.method else line
                 for label, line in zip(claim.ours, lines, strict=True)]  # fmt: skip
    runs = sorted({len(values) for values in claim.ours.values()} - {1})
    about = [claim.unit] * bool(claim.unit) + [f"{' or '.join(map(str, runs))} runs"] * bool(runs)
    return _lines(lines + [f"({', '.join(about)})"] * bool(about)) or "-"
