"""Beside seaborn: bars of means with every seed as a point, ticks one can read, one legend for several panels.

Measured results are tidy tables, a row a seed and setting, and seaborn draws them. These fill the gaps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from nbkit.errors import NotFinite, UnknownName, did_you_mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend
    from pandas import DataFrame

#: For seaborn's ``errorbar=``: a band from the smallest to the largest seed. Its default draws bootstrap samples.
RANGE = ("pi", 100)


def means(
    ax: Axes,
    table: DataFrame,
    *,
    x: str,
    y: str,
    hue: str | None = None,
    palette: Mapping[str, str] | None = None,
    order: Iterable[Any] | None = None,
    reference: float | None = None,
    reference_label: str = "chance",
) -> Axes:
    """Means as bars, every row (a seed) as a point on its bar. Names on the longer axis: swap x and y to lay it down.

    Args:
        table: a row a seed; columns named by x, y and hue. Of x and y one holds numbers, the other names.
        palette: as from :func:`colours`; with no hue it is looked up by the names themselves.
        order: of the names.
        reference: a dashed line at this value, such as chance or the unpruned model.

    Raises: UnknownName (a column that is not there), ValueError (an empty table), NotFinite.
    """
    import seaborn as sns

    for column in filter(None, (x, y, hue)):
        if column not in table.columns:
            raise UnknownName(f"the table has no column {column!r}{did_you_mean(str(column), map(str, table.columns))}")
    if table.empty:
        raise ValueError("the table is empty: there are no means to draw")
    number = next((c for c in (y, x) if table[c].dtype.kind in "fiu"), None)
    if number is None:
        raise ValueError(f"neither {x!r} nor {y!r} holds numbers")
    if bad := int((~np.isfinite(table[number].astype(float))).sum()):
        raise NotFinite(f"column {number!r} holds {bad} NaN or infinite values of {len(table)}")
    name = x if number == y else y
    order = list(dict.fromkeys(table[name])) if order is None else list(order)
    colour = {"hue": hue or name, "palette": dict(palette) if palette else None}
    if hue is None:
        colour |= {"hue_order": order, "legend": False}
    common = {"data": table, "x": x, "y": y, "order": order, "ax": ax, **colour}
    sns.barplot(errorbar=None, alpha=0.55, saturation=1, **common)
    points = {**common, "dodge": hue is not None, "legend": False, "jitter": 0.12}
    with _seeded():
        sns.stripplot(size=4.5, edgecolor="white", linewidth=0.7, **points)
    line, grid = (ax.axhline, "y") if number == y else (ax.axvline, "x")
    if reference is not None:
        line(reference, color="#555555", linestyle="--", linewidth=1.2, label=reference_label)
        ax.legend()
    ax.grid(axis=grid)
    return ax


def percent(ax: Axes, axis: str = "y", decimals: int = 0) -> Axes:
    """Ticks of an axis that holds shares, as percent. ``axis``: ``"x"``, ``"y"`` or ``"both"``. Raises: ValueError."""
    from matplotlib.ticker import PercentFormatter

    for which in _axes_of(ax, axis):
        which.set_major_formatter(PercentFormatter(1.0, decimals=decimals))
    return ax


def log_ticks(ax: Axes, axis: str = "x") -> Axes:
    """A logarithmic axis with ticks one can read: 1, 2, 5, 10, 20 ..., or powers of ten over three decades or more.

    ``axis`` as in :func:`percent`. Call it after the data are drawn: what is not above 0 has no place on it.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for which in _axes_of(ax, axis):
        (ax.set_xscale if which is ax.xaxis else ax.set_yscale)("log")
        low, high = sorted(which.get_view_interval())
        steps = (1.0, 2.0, 5.0) if high / low < 1000 else (1.0,)
        which.set_major_locator(LogLocator(subs=steps, numticks=12))
        which.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
        which.set_minor_formatter(NullFormatter())
    return ax


def legend(figure: Figure, *, below: bool = True, columns: int | None = None, title: str | None = None) -> Legend:
    """One legend for all panels of a figure, outside of them; the panels' own legends go.

    Args:
        below: under the panels, else to their right.
        columns: entries a row (below: as many as there are, at most six).

    Raises: ValueError where no panel has anything to name.
    """
    entries = {}
    for ax in figure.axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
        if ax.get_legend() is not None:
            ax.get_legend().remove()
    if not entries:
        raise ValueError("no panel has anything to name: draw with labels, or with seaborn's hue")
    columns = columns or (min(6, len(entries)) if below else 1)
    place = "outside lower center" if below else "outside right upper"
    return figure.legend(entries.values(), entries.keys(), loc=place, ncols=columns, title=title)


def direct_labels(ax: Axes, *, room: float = 0.25, size: float = 10) -> Axes:
    """Name each line at its right end, in its colour, in place of the legend; names keep a line's height apart.

    Works on lines with a label and on seaborn's, whose labels hang on empty lines of the same colour.

    Args:
        room: width left for the names, as a share of the axis.

    Raises: ValueError where no line has a label.
    """
    from matplotlib.colors import to_hex

    named = {to_hex(line.get_color()): line.get_label() for line in ax.lines if line.get_label()[:1] != "_"}
    drawn = [line for line in ax.lines if len(line.get_xdata()) and to_hex(line.get_color()) in named]
    ends = {to_hex(line.get_color()): (line.get_xdata()[-1], line.get_ydata()[-1]) for line in drawn}
    if not ends:
        raise ValueError("no line has a label: draw with label=, or with seaborn's hue")
    pixels = {colour: ax.transData.transform(end) for colour, end in ends.items()}
    height = 1.25 * size * ax.figure.dpi / 72
    colours = sorted(pixels, key=lambda colour: pixels[colour][1])
    right = max(x for x, _ in pixels.values())
    places = _apart([pixels[colour][1] for colour in colours], height)
    for colour, y in zip(colours, places, strict=True):
        across, up = ax.transAxes.inverted().transform((right, y))
        ax.text(across * (1 - room) + 0.02, up, named[colour], transform=ax.transAxes, color=colour, size=size,
                va="center")  # fmt: skip
    transform = ax.transScale + ax.transLimits  # widened on the axis's own scale, linear or logarithmic
    new_right = transform.inverted().transform((1 / (1 - room), 0))[0]
    low, end = ax.get_xlim()
    ax.set_xticks([tick for tick in ax.get_xticks() if low <= tick <= end])  # none under the names
    ax.set_xlim(low, new_right)
    if ax.get_legend() is not None:
        ax.get_legend().remove()
    return ax


def _apart(places: list[float], gap: float) -> list[float]:
    """Rising ``places``, moved as little as a sweep up and one down need to keep ``gap`` between neighbours."""
    moved = list(places)
    for _ in range(50):
        for i in range(1, len(moved)):
            short = gap - (moved[i] - moved[i - 1])
            if short > 1e-9:
                moved[i], moved[i - 1] = moved[i] + short / 2, moved[i - 1] - short / 2
    return moved


def _axes_of(ax: Axes, axis: str) -> list:
    known = {"x": [ax.xaxis], "y": [ax.yaxis], "both": [ax.xaxis, ax.yaxis]}
    if axis not in known:
        raise ValueError(f"axis must be 'x', 'y' or 'both', not {axis!r}")
    return known[axis]


def _short(value: float) -> str:
    """``1000`` as 1k and ``2000000`` as 2M: ticks stay narrow."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


@contextmanager
def _seeded() -> Iterator[None]:
    """seaborn jitters points by NumPy's global state: the same picture at every run, and the state as it was."""
    state = np.random.get_state()
    np.random.seed(0)
    try:
        yield
    finally:
        np.random.set_state(state)
