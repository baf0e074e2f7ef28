"""Comparing what a notebook measures again with what its recipe stored."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator, Mapping
from typing import Any

Label = tuple[Any, ...]


def again(stored: Any, now: Any, *, within: float) -> None:
    """Assert that a part of what is stored came out the same, and print one line about it.

    ``stored`` and ``now`` are Series, frames, arrays, tensors, lists, dicts (of any of these) or numbers. What has
    labels on both sides is compared label by label, in whatever order; else place by place. Numbers may differ by
    ``within``; everything else (names, truth values, NaN) must be equal.

    Raises: AssertionError naming the worst; ValueError where the two do not hold the same labels or as many values,
    or nothing to compare.

    >>> claims.again(stored.accuracy, now.accuracy, within=0.002)
    12 values again: all within 0.002 of the stored ones
    """
    if not isinstance(within, numbers.Real) or isinstance(within, bool) or not 0 <= within < math.inf:
        raise ValueError(f"within must be the largest difference allowed, 0 or more, not {within!r}")
    pairs = _pairs(_flat("stored", stored), _flat("now", now))
    if other := [(label, old, new) for label, old, new in pairs if not _number(old, new) and old != new]:
        label, old, new = other[0]
        raise AssertionError(f"{_name(label)}{new!r} now, {old!r} stored")
    apart = [(_apart(old, new), label, old, new) for label, old, new in pairs if _number(old, new)]
    if not apart:
        raise ValueError("there are no numbers to compare")
    far = [entry for entry in apart if entry[0] > within * (1 + 1e-9)]  # 0.853 - 0.851 is more than 0.002
    if far:
        worst, label, old, new = max(far, key=lambda entry: entry[0])
        raise AssertionError(
            f"{len(far)} of {len(apart)} values differ by more than {within:g} from the stored ones; the worst: "
            f"{_name(label)}{new:.6g} now, {old:.6g} stored ({worst:.2g} apart)"
        )
    many, ones = (f"{len(apart):,} values again: all", "ones") if len(apart) > 1 else ("1 value again:", "one")
    print(f"{many} within {within:g} of the stored {ones}" if within else f"{many} equal to the stored {ones}")


def _apart(old: float, new: float) -> float:
    if math.isnan(old) and math.isnan(new) or old == new:
        return 0.0
    apart = abs(old - new)
    return math.inf if math.isnan(apart) else apart


def _number(*values: Any) -> bool:
    return all(isinstance(value, numbers.Real) and not isinstance(value, bool) for value in values)


def _name(label: Label) -> str:
    text = ", ".join(map(str, label))
    return f"{text}: " if text else ""


def _pairs(stored: dict[Label, Any], now: dict[Label, Any]) -> list[tuple[Label, Any, Any]]:
    if stored.keys() == now.keys():
        return [(label, value, now[label]) for label, value in stored.items()]
    if len(stored) == len(now) and (_places(stored) or _places(now)):
        labels = now if _places(stored) else stored
        return list(zip(labels, stored.values(), now.values(), strict=True))
    lost, new = ([_name(k).rstrip(": ") or "a single number" for k in a if k not in b]
                 for a, b in ((stored, now), (now, stored)))  # fmt: skip
    sides = [f"{side} alone holds {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
             for side, names in (("stored", lost), ("now", new)) if names]  # fmt: skip
    raise ValueError(
        f"stored holds {len(stored)} values and now {len(now)}, not under the same labels: {'; '.join(sides)}. "
        "Select the same part of both, with the settings as index"
    )


class _Place(int):
    """A position in an array, which is no label: it may stand for any."""


def _places(side: dict[Label, Any]) -> bool:
    return all(isinstance(part, _Place) for label in side for part in label)


def _flat(side: str, given: Any) -> dict[Label, Any]:
    found: dict[Label, Any] = {}
    for label, value in _walk(given, ()):
        if label in found:
            raise ValueError(f"{side} holds {_name(label).rstrip(': ')} twice: give every row an index of its own")
        found[label] = value
    return found


def _walk(given: Any, label: Label) -> Iterator[tuple[Label, Any]]:
    if hasattr(given, "columns") and hasattr(given, "itertuples"):  # a frame
        for row in given.itertuples():
            for column, value in zip(given.columns, row[1:], strict=True):
                yield (*label, *_parts(row[0]), *_parts(column)), _plain(value)
    elif isinstance(given, Mapping) or (hasattr(given, "items") and hasattr(given, "index")):  # a dict, a Series
        for key, value in given.items():
            yield from _walk(value, (*label, *_parts(key)))
    elif hasattr(given, "tolist") and getattr(given, "shape", ()):  # an array, a tensor
        yield from _walk(given.tolist(), label)
    elif isinstance(given, (list, tuple)):
        for place, value in enumerate(given):
            yield from _walk(value, (*label, _Place(place)))
    else:
        yield label, _plain(given)


def _parts(key: Any) -> tuple:
    return key if isinstance(key, tuple) else (key,)


def _plain(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    if not isinstance(value, (numbers.Real, str, type(None))):
        raise TypeError(f"cannot compare {type(value).__name__}: give numbers, names, or tables of them")
    return value
