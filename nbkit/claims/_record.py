"""What is kept of a claim, and how a notebook shows it."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any

from nbkit.claims._figures import _figure, share

MIME = "application/vnd.nbkit.claim+json"
KINDS = ("paper", "ours")
HOLDS, MIXED, FAILS, UNTESTED = VERDICTS = ("holds", "mixed", "does not hold here", "not tested")
NO_TEST = 0.05  # a rule that noise passes more often than this decides nothing

_NO_FIGURE = {"paper": "no number quoted", "ours": "makes no such claim: a check of our own"}
_LOOKS = {  # a colour that the colour-blind can tell from the others, and a mark for everybody
    HOLDS: ("#0072b2", "&#10003;"), MIXED: ("#8a5a00", "&plusmn;"), FAILS: ("#d55e00", "&#10007;"),
    UNTESTED: ("#666666", "&ndash;"),
}  # fmt: skip


@dataclass(frozen=True)
class Gain:
    """What a method is ahead of its strongest rival: positive where the method is better, whatever the direction."""

    method: str
    rival: str
    """The strongest by mean of ``rivals``."""
    rivals: tuple[str, ...]
    better: str
    """``"higher"`` or ``"lower"``."""
    values: tuple[float, ...]
    """One a run where the two have equally many runs, else the difference of their means."""
    paired: bool

    def __str__(self) -> str:
        text = f"{_figure(self.values, '', True)} over {self.rival}"
        if not self.paired:
            return f"{text} (difference of means)"
        ahead = sum(value > 0 for value in self.values)
        return text if len(self.values) == 1 else f"{text} (ahead in {ahead} of {len(self.values)} runs)"


@dataclass(frozen=True)
class Claim:
    """One claim, checked. ``ours`` maps what was measured to its values, one a seed (or a run)."""

    slug: str
    name: str
    claim: str
    ours: Mapping[str, tuple[float, ...]]
    verdict: str
    rule: str
    kind: str = "paper"
    """``"paper"`` for a claim the paper makes, ``"ours"`` for a check of our own."""
    cases: Mapping[str, bool] = field(default_factory=dict)
    """Whether the rule is met, case by case, where it has several."""
    by_chance: float | None = None
    """The probability that pure noise passes the rule; ``how`` says how it was got."""
    how: str = ""
    gain: Gain | None = None
    paper: str | None = None
    unit: str = ""
    note: str = ""

    @property
    def holds(self) -> bool:
        return self.verdict == HOLDS

    @property
    def no_test(self) -> bool:
        """Whether noise passes the rule more often than one time in twenty."""
        return self.by_chance is not None and self.by_chance > NO_TEST

    @property
    def caveat(self) -> str:
        """A sentence about a rule that decides nothing, else an empty text."""
        return f"Pure noise passes this rule in {self.chance} of cases: it is no test." if self.no_test else ""

    @property
    def figures(self) -> str:
        """Ours in one line: ``"neuron path 0.617 ± 0.040; activation 0.723 ± 0.025 [p / p0]"``."""
        line = "; ".join(f"{label} {_figure(values, '', False)}" for label, values in self.ours.items())
        return f"{line} [{self.unit}]" if line and self.unit else line

    @property
    def chance(self) -> str:
        """``"0.4 %"``, or that it was not computed."""
        if self.by_chance is None:
            return "not computed" if self.verdict != UNTESTED else ""
        return share(self.by_chance)

    @property
    def met(self) -> str:
        """The cases in one line: ``"80 %: yes; 99 %: no"``."""
        return "; ".join(f"{case}: {'yes' if met else 'no'}" for case, met in self.cases.items())

    def __repr__(self) -> str:
        facts = [self.figures, f"gain {self.gain}" if self.gain else "", self.met]
        facts = "; ".join(filter(None, facts))
        text = f"{self.slug} / {self.name}: {self.verdict}" + (f" ({facts})" if facts else "")
        return f"{text}. {self.caveat}" if self.caveat else text

    def record(self) -> dict[str, Any]:
        """The claim as JSON. Pairs instead of dicts where order matters: a notebook file sorts the keys of a dict."""
        pairs = {"ours": [[k, list(v)] for k, v in self.ours.items()], "cases": [[k, v] for k, v in self.cases.items()]}
        return {**asdict(self), **pairs}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Claim:
        """The claim that :meth:`record` stored. Raises: ValueError naming what is missing, unknown or not a record."""
        known = {f.name: f.default is MISSING and f.default_factory is MISSING for f in fields(cls)}
        wrong = [f"lacks {name!r}" for name, needed in known.items() if needed and name not in record]
        wrong += [f"holds {name!r}, which no claim has" for name in record if name not in known]
        if wrong:
            raise ValueError(f"a stored claim {', '.join(wrong)}; run the notebook again")
        gain = record.get("gain")
        if gain:
            gain = Gain(**{k: tuple(v) if isinstance(v, list) else v for k, v in gain.items()})
        ours = {label: tuple(values) for label, values in record["ours"]}
        return cls(**{**record, "ours": ours, "cases": dict(record.get("cases", ())), "gain": gain})

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, Any]:
        return {"text/plain": repr(self), "text/html": self._html(), MIME: self.record()}

    def _html(self) -> str:
        colour, mark = _LOOKS[self.verdict]
        facts = {
            "Paper": self.paper or _NO_FIGURE[self.kind],
            "Rule, set before": self.rule,
            "Cases": self.met,
            "Gain over the strongest rival": str(self.gain or ""),
            "By chance": f"{self.chance} ({self.how})" if self.how else self.chance,
            "Note": self.note,
        }
        lines = [
            f'<div style="border-left:4px solid {colour};padding-left:0.8em">',
            f"<div><b>{html.escape(self.claim)}</b></div>",
            *self._table(),
            *(f"<div><i>{label}:</i> {html.escape(text)}</div>" for label, text in facts.items() if text),
            f'<div style="color:{colour}"><b>{mark} {self.verdict}</b></div>',
            *([f"<div><b>{self.caveat}</b></div>"] if self.caveat else []),
        ]
        return "\n".join(lines) + "</div>"

    def _table(self) -> list[str]:
        if not self.ours:
            return []
        unit = f" ({html.escape(self.unit)})" if self.unit else ""
        left = 'style="text-align:left"'
        rows = "".join(
            f"<tr><td {left}>{html.escape(label)}</td><td>{_figure(values, '', False)}</td><td>{len(values)}</td></tr>"
            for label, values in self.ours.items()
        )
        return [
            f"<table><thead><tr><th {left}>ours{unit}</th><th>mean &plusmn; sd</th><th>runs</th>",
            f"</tr></thead><tbody>{rows}</tbody></table>",
        ]
