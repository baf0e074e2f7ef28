"""Exercises that are done in code: a line that says ``right`` or ``not yet`` and keeps the answer to itself.

A notebook stores the digest of the answer, never the answer:

>>> exercises.digest(0.7534)                                    # whoever writes the exercise, once
'3-7-8a8cab5076'
>>> exercises.check("kept", answer, "3-7-8a8cab5076")           # the last line of the starter and of the solution
kept: not yet

An answer is a number, a bool, a text, or a list, array or tensor of them (nested lists have to agree in shape).
Texts are compared without case and extra spaces. Numbers are right where they are off by less than nine tenths of a
unit in the last of ``digits`` significant digits, and wrong where they are off by more than eleven tenths of it; in an
array that unit is the largest element's, and each element is compared on its own.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from typing import Any

__all__ = ["check", "digest"]

MOST = 100  # elements: beyond that a digest is a wall of digits, and a summary is the better question
_ZERO = 1e-9  # where the largest number is below this, all are taken for 0
_NOT_AN_ANSWER = (TypeError, ValueError, RuntimeError, AttributeError, OverflowError)


def check(name: str, answer: Any, digest: str) -> None:
    """Print ``name: right`` or ``name: not yet``; never raises because of the answer, whatever it is.

    ``digest`` is what :func:`digest` made of the right answer. Raises ValueError where it is no such thing.

    >>> exercises.check("kept", ..., "3-7-8a8cab5076")
    kept: not yet
    """
    match = re.fullmatch(r"(\d+)-(\d*)-([0-9a-f]{10})", digest) if isinstance(digest, str) else None
    if match is None:
        raise ValueError(f"{digest!r} is no digest; exercises.digest(answer) makes one")
    digits, phases, wanted = int(match[1]), match[2], match[3]
    try:
        found = any(_hash(answer, digits, phases, exponent) == wanted for exponent in _exponents(answer))
    except _NOT_AN_ANSWER:
        found = False
    print(f"{name}: {'right' if found else 'not yet'}")


def digest(answer: Any, digits: int = 3) -> str:
    """What :func:`check` compares an answer with: ``digits``, a digit for the place of each number, and a hash.

    Whole numbers are compared exactly: they get the digits they need. Raises: TypeError for what is no answer,
    ValueError for an empty one, one with NaN or infinity, one of more than 100 elements, and ``digits`` below 1.

    >>> exercises.digest(["relu", "gelu"])
    '3--9f37b2b899'
    """
    leaves = _leaves(_plain(answer))
    if not 1 <= len(leaves) <= MOST:
        raise ValueError(f"an answer has 1 to {MOST} elements, not {len(leaves)}; ask for a summary of a longer one")
    if digits < 1:
        raise ValueError(f"digits is {digits}; it would have to be 1 or more")
    numbers = _numbers(answer)
    if numbers and all(float(number).is_integer() for number in numbers):
        digits = max(digits, 1 + max(len(str(abs(int(number)))) for number in numbers))
    exponent = _exponents(answer)[0]
    steps = [_step(number, digits, exponent) for number in numbers]
    # where each number lies on its grid, in tenths: no boundary is ever near the right answer
    phases = "".join(str(round(10 * (step - math.floor(step))) % 10) for step in steps)
    return f"{digits}-{phases}-{_hash(answer, digits, phases, exponent)}"


def _plain(answer: Any) -> Any:
    """The answer in nested lists of bool, int, float and str."""
    if isinstance(answer, bool | int | float):
        return answer
    if isinstance(answer, str):
        return " ".join(answer.split()).casefold()
    if isinstance(answer, list | tuple):
        return [_plain(one) for one in answer]
    if callable(getattr(answer, "tolist", None)) and not isinstance(answer, type):  # numpy, torch, a pandas Series
        return _plain(answer.tolist())
    raise TypeError(f"an answer is a number, a bool, a text, or a list or array of them, not {type(answer).__name__}")


def _leaves(answer: Any) -> list[Any]:
    return [leaf for one in answer for leaf in _leaves(one)] if isinstance(answer, list) else [answer]


def _numbers(answer: Any) -> list[float]:
    numbers = [leaf for leaf in _leaves(_plain(answer)) if isinstance(leaf, int | float) and not isinstance(leaf, bool)]
    if not all(math.isfinite(number) for number in numbers):
        raise ValueError("an answer has no NaN and no infinity in it")
    return numbers


def _exponents(answer: Any) -> list[int]:
    """The power of ten of the largest number, and those beside it: 0.9999 may stand for 1."""
    largest = max(map(abs, _numbers(answer)), default=0)
    if largest < _ZERO:
        return [0]
    exponent = math.floor(math.log10(largest))
    return [exponent, exponent + 1, exponent - 1]


def _step(number: float, digits: int, exponent: int) -> float:
    """A number in steps of two units of the last digit."""
    return number / (2 * 10.0 ** (exponent - digits + 1))


def _hash(answer: Any, digits: int, phases: str, exponent: int) -> str:
    """The hash of an answer whose numbers stand for the middle of the step they are in."""
    if len(_numbers(answer)) != len(phases):
        raise ValueError("another number of numbers")
    rest = iter(phases)

    def rounded(one: Any) -> Any:
        if isinstance(one, list):
            return [rounded(inner) for inner in one]
        if isinstance(one, bool | str):
            return one
        return round(_step(one, digits, exponent) - int(next(rest)) / 10)

    text = json.dumps([exponent if phases else None, rounded(_plain(answer))])
    return hashlib.sha256(text.encode()).hexdigest()[:10]
