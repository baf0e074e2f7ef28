"""Curves and bars of dicts of arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nbkit.plots._arrays import array
from nbkit.plots._style import PALETTE

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def curves(
    ax: Axes,
    x: Any,
    lines: Mapping[str, Any],
    *,
    xlabel: str,
    ylabel: str,
    title: str | None = None,
    band: str = "range",
    percent: bool = False,
    legend: str | None = "best",
) -> Axes:
    """Curves over ``x``: the mean over seeds as a line, their spread as a band.

    Args:
        x: ``[n]``.
        lines: label -> ``[seeds, n]``, or ``[n]`` for a line without a band.
        band: ``"range"`` (smallest to largest seed) or ``"ci"`` (95 % interval of the mean, Student's t).
        percent: show both axes' shares as percent (y only where x goes beyond 1).
        legend: where, as in matplotlib's ``loc``; a place of one's own is quicker to draw than the best one. None: no
            legend.

    Raises: ValueError naming the line whose shape does not fit, NotFinite.
    """
    from matplotlib.ticker import PercentFormatter

    if band not in ("range", "ci"):
        raise ValueError(f"band must be 'range' or 'ci', not {band!r}")
    if not lines:
        raise ValueError("there are no lines to draw")
    x = array(x, "x", 1)
    for label, values in lines.items():
        values = np.atleast_2d(array(values, f"line {label!r}"))
        if values.ndim != 2 or values.shape[1] != len(x):
            raise ValueError(f"line {label!r} has shape {values.shape}; it must be [seeds, {len(x)}], one value an x")
        (line,) = ax.plot(x, values.mean(0), marker="o", markersize=4, label=label)
        if len(values) > 1:
            low, high = (values.min(0), values.max(0)) if band == "range" else _interval(values)
            ax.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    if percent:
        ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        if x.max() <= 1:
            ax.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    if title is not None:
        ax.set_title(title)
    ax.grid(axis="y")
    if legend is not None:
        ax.legend(loc=legend)
    return ax


def _bars(
    ax: Axes, places: Sequence[float], groups: Mapping[str, Any], *, width: float, colours: Sequence[str],
    label: str | None = None,
) -> None:  # fmt: skip
    """A bar a group (by what to call it in an error), as high as its mean; its values, if several, as points on it."""
    means, points = [], {colour: ([], []) for colour in colours}
    for place, (what, values), colour in zip(places, groups.items(), colours, strict=True):
        values = np.atleast_1d(array(values, what))
        if values.ndim != 1:
            raise ValueError(f"{what} has shape {values.shape}; it must be a list of values, [seeds]")
        means.append(values.mean())
        if len(values) > 1:
            # beside each other in the order of the seeds, so that equal values do not hide one another
            points[colour][0].extend(place + np.linspace(-0.28, 0.28, len(values)) * width)
            points[colour][1].extend(values)
    ax.bar(places, means, width, color=colours, alpha=0.55, label=label)
    for colour, (across, values) in points.items():  # all points of a colour at once: a call takes a millisecond
        if values:
            ax.plot(across, values, "o", markersize=4, color=colour, markeredgecolor="white", markeredgewidth=0.8)


def _reference(ax: Axes, value: float | None, label: str) -> None:
    if value is not None:
        ax.axhline(value, color="#555555", linestyle="--", linewidth=1.2, label=label)


def _finish_bars(ax: Axes, names: list[str], ylabel: str, title: str | None) -> Axes:
    ax.set_xticks(range(len(names)), names)
    ax.set_ylabel(ylabel)
    if title is not None:
        ax.set_title(title)
    ax.grid(axis="y")
    return ax


def bars(
    ax: Axes,
    groups: Mapping[str, Any],
    *,
    ylabel: str,
    title: str | None = None,
    reference: float | None = None,
    reference_label: str = "chance",
) -> Axes:
    """One bar a group, as high as the mean of its values, and the values themselves as points.

    Args:
        groups: label -> values ``[seeds]``, or a number.
        reference: a dashed line at this value, such as chance or the unpruned model.

    Raises: ValueError (no groups, a group that is empty or not a list of values), NotFinite.
    """
    if not groups:
        raise ValueError("there are no groups to draw")
    named = {f"group {label!r}": values for label, values in groups.items()}
    _bars(ax, range(len(named)), named, width=0.65, colours=[PALETTE[k % len(PALETTE)] for k in range(len(named))])
    _reference(ax, reference, reference_label)
    if reference is not None:
        ax.legend()
    return _finish_bars(ax, list(groups), ylabel, title)


def grouped(
    ax: Axes,
    settings: Mapping[str, Mapping[str, Any]],
    *,
    ylabel: str,
    title: str | None = None,
    reference: float | None = None,
    reference_label: str = "chance",
) -> Axes:
    """Bars side by side: for each group one bar a setting, as high as the mean of its values, and the values as points.

    Args:
        settings: label -> {group -> values ``[seeds]``, or a number}; the groups of the first setting name the places.
        reference: as in :func:`bars`.

    Raises: ValueError (no settings, other groups in one of them, a group that is no list of values), NotFinite.
    """
    if not settings or not all(settings.values()):
        raise ValueError("there are no groups to draw")
    names = list(next(iter(settings.values())))
    width = 0.8 / len(settings)
    for k, (label, groups) in enumerate(settings.items()):
        if set(groups) != set(names):
            raise ValueError(f"setting {label!r} has the groups {sorted(groups)}, the first one {sorted(names)}")
        places = np.arange(len(names)) + (k - (len(settings) - 1) / 2) * width
        named = {f"group {name!r} of {label!r}": groups[name] for name in names}
        _bars(ax, places, named, width=0.92 * width, colours=[PALETTE[k % len(PALETTE)]] * len(names), label=label)
    _reference(ax, reference, reference_label)
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return _finish_bars(ax, names, ylabel, title)


def _interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    from scipy import stats

    half = stats.t.ppf(0.975, len(values) - 1) * values.std(0, ddof=1) / np.sqrt(len(values))
    return values.mean(0) - half, values.mean(0) + half
