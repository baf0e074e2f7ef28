"""Numbers as they are shown: one rounding for a cell's table, for CLAIMS.md and for prose."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nbkit.errors import NotFinite

SMALL, LARGE = 1e-4, 1e15  # beyond these a row of zeros says less than an exponent


def figure(values: float | Sequence[float], unit: str = "", *, signed: bool = False) -> str:
    """Mean and sample standard deviation, to three digits of the larger of the two; a single number as it is.

    ``values`` is a number or one number a run: a list, array, tensor or Series of shape ``[runs]``. A whole number
    that stands alone keeps all its digits. ``signed`` writes the plus before a gain.

    Raises: TypeError (no numbers), ValueError (none, or several a run), NotFinite.

    >>> claims.figure([0.61, 0.58, 0.66], "p / p0")
    '0.617 ± 0.040 p / p0'
    >>> claims.figure(45661), claims.figure(0.25), claims.figure([2, 3, 5], signed=True)
    ('45,661', '0.250', '+3.33 ± 1.53')
    """
    return _figure(runs("values", values), unit, signed)


def _figure(values: Sequence[float], unit: str, signed: bool) -> str:
    mean = sum(values) / len(values)
    alone = len(values) == 1
    deviation = 0.0 if alone else math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
    largest = max(abs(mean), deviation)
    if not largest or (alone and mean == round(mean) and largest < LARGE):
        kind = ",.0f"
    elif SMALL <= largest < LARGE:
        kind = f",.{max(0, 2 - math.floor(math.log10(largest)))}f"
    else:
        kind = ".2e"
    shown = f"{_no_minus_zero(mean, kind):{'+' * signed}{kind}}"
    shown += "" if alone else f" ± {deviation:{kind}}"
    return f"{shown} {unit}" if unit else shown


def _no_minus_zero(value: float, kind: str) -> float:
    return 0.0 if not float(f"{value:{kind}}".replace(",", "")) else value


def share(p: float) -> str:
    """A probability in per cent, to three digits: ``"0.4 %"``; below one in ten thousand only that it is."""
    return "under 0.01 %" if 0 < p < 1e-4 else f"{100 * p:.3g} %"


def runs(label: str, given: Any) -> tuple[float, ...]:
    """One number a run, rounded to six digits so that what is shown is what is stored."""
    given = given.tolist() if hasattr(given, "tolist") else given  # arrays, tensors, Series
    if isinstance(given, (str, Mapping)) or not isinstance(given, (numbers.Real, Iterable)):
        raise TypeError(f"{label} must be a number or a list of numbers, not {type(given).__name__}")
    given = [given] if isinstance(given, numbers.Real) else list(given)
    if not given:
        raise ValueError(f"{label} is empty: give a value a run")
    if not all(isinstance(value, numbers.Real) and not isinstance(value, bool) for value in given):
        raise ValueError(f"{label} must hold one number a run, not {given!r:.80}")
    if bad := [value for value in given if not math.isfinite(value)]:
        raise NotFinite(f"{label} holds {len(bad)} NaN or infinite values of {len(given)}")
    return tuple(map(rounded, given))


def rounded(value: float) -> float:
    """To the six digits that are stored."""
    return float(f"{value:.6g}")
