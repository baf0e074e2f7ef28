"""From what a caller writes for a control to a widget, and what values a widget can take."""

from __future__ import annotations

import math
import sys
from collections.abc import KeysView, Mapping
from numbers import Integral, Real
from typing import Any

import ipywidgets
import numpy as np

from nbkit.errors import NotFinite, did_you_mean

_WIDE = {"description_width": "initial"}
_MENU = {"width": "auto", "max_width": "100%"}
_BUTTONS = 5
"""Up to so many options are buttons in a row, all of them in sight, while their labels fit into one line."""


def control(name: str, spec: Any, initial: Any = None) -> ipywidgets.Widget | None:
    """The widget for ``spec``, or None for a value to pass on as it is.

    Raises: ValueError (empty list, bad range, ``initial`` not among the values), TypeError (a tuple that is no range).
    """
    readable = name.replace("_", " ").strip()
    if isinstance(spec, ipywidgets.Widget):
        if not spec.has_trait("value"):
            raise TypeError(f"control {name!r}: a {type(spec).__name__} has no value")
        widget = spec
        if spec.has_trait("description") and spec.description == getattr(spec, "default_description", ""):
            spec.description = readable
    elif isinstance(spec, bool):
        widget = ipywidgets.Checkbox(value=spec, description=readable, indent=False, layout={"width": "auto"})
    elif isinstance(spec, str):
        widget = ipywidgets.Text(value=spec, description=readable, continuous_update=False, style=_WIDE)
    elif isinstance(spec, tuple):
        widget = _slider(name, spec, readable)
    elif isinstance(spec, Mapping) or _is_list(spec):
        widget = _menu(name, spec, readable)
    else:
        return None
    if initial is not None:
        assign(name, widget, initial)
    return widget


def _is_list(spec: Any) -> bool:
    """Whether ``spec`` is a row of options; a matrix, a tensor or a Series is data to pass on."""
    pandas = sys.modules.get("pandas")  # where it is not loaded, nothing is an Index
    row = isinstance(spec, np.ndarray) and spec.ndim == 1
    return row or isinstance(spec, (list, range, KeysView)) or (pandas is not None and isinstance(spec, pandas.Index))


def _slider(name: str, spec: tuple, readable: str):
    numbers = all(isinstance(v, Real) and not isinstance(v, bool) for v in spec)
    if not numbers or not 2 <= len(spec) <= 4:
        raise TypeError(
            f"control {name!r}: a tuple is a slider, (min, max), (min, max, step) or (min, max, step, value), not "
            f"{spec!r}; write a list for a menu"
        )
    if not all(map(math.isfinite, spec)):
        raise NotFinite(f"control {name!r}: the slider {spec!r} has a NaN or infinite value")
    whole = all(isinstance(v, Integral) for v in spec)
    low, high = spec[:2]
    step = spec[2] if len(spec) > 2 else 1 if whole else (high - low) / 20
    value = spec[3] if len(spec) > 3 else low
    if not low < high or not step > 0 or not low <= value <= high:
        raise ValueError(f"control {name!r}: a slider needs min < max, step > 0 and min <= value <= max, not {spec!r}")
    kind = ipywidgets.IntSlider if whole else ipywidgets.FloatSlider
    look = {} if whole else {"readout_format": f".{_decimals(low, step)}f"}
    return kind(min=low, max=high, step=step, value=value, description=readable, style=_WIDE, **look)


def _decimals(*numbers: float) -> int:
    """Digits after the point that show all of ``numbers`` exactly, six at most."""
    return next((d for d in range(1, 6) if all(abs(round(v, d) - v) < 1e-9 for v in numbers)), 6)


def _menu(name: str, spec, readable: str):
    values = spec.tolist() if isinstance(spec, np.ndarray) else spec
    options = list(spec.items()) if isinstance(spec, Mapping) else [(str(v), v) for v in values]
    if not options:
        raise ValueError(f"control {name!r}: there is nothing to choose from")
    about = {"options": options, "index": 0, "equals": _same, "description": readable}
    if len(options) <= _BUTTONS and sum(len(label) + 4 for label, _ in options) <= 80:
        return ipywidgets.ToggleButtons(**about, style={**_WIDE, "button_width": "auto"}, layout=_MENU)
    return ipywidgets.Dropdown(**about, style=_WIDE, layout=_MENU)


def _same(a: Any, b: Any) -> bool:
    """Equality for options that may be arrays (their == has no single answer) or both 1 and True."""
    plain = all(isinstance(v, (str, Real)) for v in (a, b)) and isinstance(a, bool) == isinstance(b, bool)
    return a is b or (plain and a == b)


def is_menu(widget) -> bool:
    return widget.has_trait("index") and widget.has_trait("_options_labels")


def is_range(widget) -> bool:
    return all(isinstance(getattr(widget, end, None), Real) for end in ("min", "max"))


def read(widget) -> Any:
    """The widget's value; a slider's without the noise (0.30000000000000004) that its steps add up to."""
    value = widget.value
    if isinstance(widget, ipywidgets.FloatLogSlider):
        return float(f"{value:.12g}")
    if isinstance(widget, ipywidgets.FloatSlider) and widget.step:
        return round(value, 9 - math.floor(math.log10(widget.step)))
    return value


def assign(name: str, widget, value: Any) -> None:
    """Give a control a value, for a menu also by label.

    Raises: ValueError where it cannot take that value; the control is left as it was.
    """
    before = state(widget)
    if is_menu(widget):
        labels = list(widget._options_labels)
        if isinstance(value, str) and value in labels:
            widget.index = labels.index(value)
            return
    elif is_range(widget) and isinstance(value, Real):
        low, high = (widget.base**v for v in (widget.min, widget.max)) if widget.has_trait("base") else (
            widget.min, widget.max
        )  # fmt: skip
        # a slider would quietly move such a value to its end
        if not low <= value <= high:
            raise ValueError(f"control {name!r} goes from {low} to {high}, not to {value}")
    try:
        widget.value = value
    except Exception as error:
        hint = did_you_mean(str(value), labels) if is_menu(widget) else f": {error}"
        raise ValueError(f"control {name!r} cannot take {value!r}{hint}") from error
    if not _took(widget, value):
        nearest = widget.value
        setattr(widget, *before)
        raise ValueError(f"control {name!r} cannot take {value!r}; the nearest it can is {nearest!r}")


def _took(widget, value: Any) -> bool:
    """Whether the widget stands at ``value``: it may have cut off a fraction, or moved an end into its range."""
    there = widget.value
    if isinstance(there, (tuple, list)):
        return is_menu(widget) or list(there) == list(value)
    return is_menu(widget) or not isinstance(there, (str, Real)) or there == value


def state(widget) -> tuple[str, Any]:
    """The trait that says where the control stands, and its value."""
    trait = "index" if is_menu(widget) else "value"
    return trait, getattr(widget, trait)


def samples(widget, most: int = 8) -> list[tuple[str, Any]]:
    """States that exercise a control: both ends and the middle of a range, up to ``most`` options of a menu.

    Raises: TypeError for a widget whose values nothing is known about; set its ``examples`` to a list of values.
    """
    if hasattr(widget, "examples"):
        return [("value", v) for v in widget.examples]
    value = widget.value
    if is_menu(widget):
        count = len(widget._options_labels)
        spread = sorted({round(i * (count - 1) / max(1, most - 1)) for i in range(most)}) if count else []
        if isinstance(widget, ipywidgets.SelectionRangeSlider):
            return [("index", (0, i)) for i in spread]
        several = isinstance(widget.index, tuple)
        return [("index", (i,) if several else i) for i in spread]
    if isinstance(value, bool):
        return [("value", v) for v in (False, True)]
    if is_range(widget):
        low, high = widget.min, widget.max
        step = getattr(widget, "step", None) or (high - low) / 2
        middle = min(low + round((high - low) / 2 / step) * step, high)
        if widget.has_trait("base"):
            low, middle, high = (widget.base**v for v in (low, middle, high))
        if isinstance(value, tuple):
            return [("value", v) for v in ((low, high), (low, middle), (middle, high))]
        return [("value", v) for v in dict.fromkeys((low, middle, high))]
    if isinstance(value, str) and widget.has_trait("placeholder"):  # a line of text; a colour is a string too
        return [("value", f"{value} {value}"), ("value", value)]
    if isinstance(value, Real):
        return [("value", value + (getattr(widget, "step", None) or 1)), ("value", value)]
    raise TypeError(f"a {type(widget).__name__} cannot be exercised; set its .examples to a list of values to try")
