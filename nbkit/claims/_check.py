"""Recording a claim: what was given is checked, the gain and the verdict are computed."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from typing import Any

from nbkit import _catalogue
from nbkit.claims._figures import rounded, runs
from nbkit.claims._record import FAILS, HOLDS, KINDS, MIXED, UNTESTED, VERDICTS, Claim, Gain
from nbkit.errors import UnknownName, did_you_mean

Values = float | Sequence[float]
DIRECTIONS = ("higher", "lower")


class VerdictChanged(AssertionError):
    """What a notebook computes no longer agrees with the verdict it states."""


def check(
    slug: str,
    name: str,
    claim: str,
    *,
    ours: Mapping[str, Values] | Values | None,
    holds: bool | Mapping[str, bool] | None,
    verdict: str,
    rule: str,
    kind: str = "paper",
    by_chance: float | None = None,
    how: str = "",
    method: str | None = None,
    better: str | None = None,
    rivals: Sequence[str] | None = None,
    paper: str | float | None = None,
    unit: str = "",
    note: str = "",
) -> Claim:
    """Record a claim about the paper ``slug`` and assert that its verdict is still true.

    ``claim`` names exactly what ``rule`` compares; ``rule`` says in words, set before the outcome was seen, what
    decides; ``name`` tells a paper's claims apart; ``kind`` is ``"paper"`` for a claim the paper makes, ``"ours"`` for
    a check of our own.

    ``ours`` maps what was measured to its values, one a seed or run (a list, array or tensor of shape ``[runs]``, or
    a single number); without a name they are called "ours". The table shows mean and sample standard deviation.

    ``holds`` is what this notebook computes: a truth value, or one a case (a model, a budget, a measure), or ``None``
    where our scale cannot tell. ``verdict`` is what it states: ``"holds"`` (met, in every case), ``"mixed"`` (met in
    some cases), ``"does not hold here"`` (met in none), ``"not tested"`` (``None``; ``note`` says why).

    ``by_chance`` is the probability that pure noise passes the rule, and ``how`` says how it was got. Above 0.05 the
    claim itself says that it is no test.

    ``method`` is the label in ``ours`` of what the claim is about and ``better`` which way is better (``"higher"`` or
    ``"lower"``): then its gain over the strongest rival is computed and stored. ``rivals`` are the labels that compete
    with it, by default all others; the strongest is the one with the best mean. The gain is taken run by run where the
    two have equally many runs, in the same order, else between the means; positive means that the method is better.

    ``paper`` quotes the paper's own number, ``None`` where nobody read it in the source. Make the call the last line of
    its cell: the output is what ``CLAIMS.md`` is made of.

    Raises: VerdictChanged (an AssertionError) where ``holds`` and ``verdict`` part; UnknownName (slug, or a label that
    ``ours`` does not have), NotFinite (NaN or infinite values), ValueError and TypeError naming the argument.

    >>> claims.check("neuron-path", "removal", "Removing the path hurts more than removing the largest activations",
    ...              ours={"neuron path": [.61, .58, .66], "activation": [.72, .70, .75]}, unit="p / p0",
    ...              method="neuron path", better="lower", rule="lower in every seed", by_chance=0.125,
    ...              how="0.5 ** 3: each seed is a coin", holds=True, verdict="holds")
    """
    _catalogue.get(slug)
    _choice("verdict", verdict, VERDICTS)
    _choice("kind", kind, KINDS)
    for field, text in (("name", name), ("claim", claim), ("rule", rule)):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{field} must be a text that says something, not {text!r}")
    computed, cases = _outcome(holds)
    values = _measured(ours, needed=verdict != UNTESTED)
    chance, how = _chance(by_chance, _text("how", how))
    paper, unit, note = _text("paper", paper) or None, _text("unit", unit), _text("note", note)
    if verdict == UNTESTED and not note.strip():
        raise ValueError(f"a claim that is {UNTESTED} needs a note that says why our scale cannot tell")
    gain = _gain(values, method, better, rivals)
    result = Claim(slug, name, claim, values, verdict, rule, kind, cases, chance, how, gain, paper, unit, note)
    if computed != verdict:
        facts = "; ".join(filter(None, (result.figures, result.met)))
        raise VerdictChanged(
            f"{slug} / {name}: the verdict was {verdict!r}, but the figures now say {computed!r}: {facts}; rule: {rule}"
        )
    return result


def _outcome(holds: Any) -> tuple[str, dict[str, bool]]:
    """The verdict that ``holds`` amounts to, and its cases."""
    if holds is None:
        return UNTESTED, {}
    if not hasattr(holds, "keys"):
        return HOLDS if _truth("holds", holds) else FAILS, {}
    cases = {str(case): _truth(f"holds[{case!r}]", met) for case, met in dict(holds).items()}
    if not cases:
        raise ValueError("holds names no case: give a truth value for each, or None where nothing was tested")
    return HOLDS if all(cases.values()) else MIXED if any(cases.values()) else FAILS, cases


def _measured(ours: Any, *, needed: bool) -> dict[str, tuple[float, ...]]:
    named = dict(ours) if hasattr(ours, "keys") else {} if ours is None else {"ours": ours}
    if needed and not named:
        raise ValueError(f"ours is empty: give at least one measured quantity (only what is {UNTESTED} has none)")
    return {str(label): runs(f"ours[{label!r}]", given) for label, given in named.items()}


def _chance(by_chance: Any, how: str) -> tuple[float | None, str]:
    by_chance = by_chance.item() if hasattr(by_chance, "item") else by_chance
    if by_chance is None:
        if how.strip():
            raise ValueError("how says how by_chance was got: give by_chance, too")
        return None, ""
    if not isinstance(by_chance, numbers.Real) or isinstance(by_chance, bool):
        raise TypeError(f"by_chance must be a probability or None, not {by_chance!r}")
    if not 0 <= by_chance <= 1:
        raise ValueError(f"by_chance must be a probability from 0 to 1, not {by_chance!r}")
    if not how.strip():
        raise ValueError("by_chance without how: say in words how that chance was got (computed, simulated, counted)")
    return rounded(by_chance), how


def _gain(
    values: Mapping[str, tuple[float, ...]], method: str | None, better: str | None, rivals: Sequence[str] | None
) -> Gain | None:
    if method is None:
        if given := [name for name, value in (("better", better), ("rivals", rivals)) if value is not None]:
            raise ValueError(f"{' and '.join(given)} without method: name the label in ours that the gain is of")
        return None
    _choice("better", better, DIRECTIONS)
    others = [label for label in values if label != method] if rivals is None else rivals
    others = tuple(dict.fromkeys([others] if isinstance(others, str) else others))
    for field, label in [("method", method), *(("rivals", rival) for rival in others)]:
        if label not in values:
            raise UnknownName(f"{field}: ours has no {label!r}{did_you_mean(str(label), values)}")
    if method in others:
        raise ValueError(f"{method!r} is the method and cannot be its own rival")
    if not others:
        raise ValueError(f"{method!r} has no rival in ours: add the baselines, or leave method out")
    sign = 1 if better == "higher" else -1
    rival = max(others, key=lambda label: sign * _mean(values[label]))
    mine, theirs = values[method], values[rival]
    paired = len(mine) == len(theirs)
    pairs = zip(mine, theirs, strict=True) if paired else [(_mean(mine), _mean(theirs))]
    return Gain(method, rival, others, better, tuple(rounded(sign * (a - b)) for a, b in pairs), paired)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _choice(field: str, given: Any, allowed: Sequence[str]) -> None:
    if given not in allowed:
        names = ", ".join(map(repr, allowed[:-1]))
        raise ValueError(f"{field} must be {names} or {allowed[-1]!r}, not {given!r}")


def _text(field: str, given: Any) -> str:
    if isinstance(given, numbers.Real) and not isinstance(given, bool):
        return str(given)
    if not isinstance(given, str | None):
        raise TypeError(f"{field} must be a text or a number, not {type(given).__name__}")
    return given or ""


def _truth(field: str, given: Any) -> bool:
    given = given.item() if hasattr(given, "item") else given  # numpy and torch have their own truth values
    if not isinstance(given, bool):
        raise TypeError(f"{field} must be True or False, computed in the cell, not {given!r}")
    return given
