"""What a total is made of, and what each layer keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from nbkit.plots._arrays import array
from nbkit.plots._style import PALETTE

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def contributions(
    ax: Axes,
    parts: Mapping[str, float],
    *,
    base: float,
    xlabel: str,
    title: str | None = None,
    most: int = 8,
) -> Axes:
    """From a base value to a total: a bar a part, each beginning where the one below it ends, the largest on top.

    The lighter sibling of ``shapley.waterfall``, quick enough to follow a slider.

    Args:
        parts: label -> what it adds to ``base``.
        most: bars to draw; the smallest parts beyond it share one.

    Raises: ValueError (no parts, most below 1), NotFinite.
    """
    from matplotlib.ticker import MaxNLocator

    if not parts or most < 1:
        raise ValueError(f"there must be parts to draw and most at least 1, not {len(parts)} parts and most={most}")
    values = array(list(parts.values()), "parts", 1)
    base = float(array([base], "base")[0])
    order = np.argsort(np.abs(values), kind="stable")
    labels, values = [list(parts)[i] for i in order], values[order]
    if (rest := len(values) - most + 1) > 1:
        labels, values = [f"{rest} more", *labels[rest:]], np.concatenate([[values[:rest].sum()], values[rest:]])
    starts = base + np.concatenate([[0.0], np.cumsum(values)[:-1]])
    ax.barh(range(len(values)), values, left=starts, color=[PALETTE[int(v > 0)] for v in values])
    ax.axvline(base, color="#555555", linestyle="--", linewidth=1.2)
    # the numbers stand with the labels: as texts of their own beside the bars they take a third of a frame's time
    ax.set_yticks(range(len(values)), [f"{label}   {v:+.3g}" for label, v in zip(labels, values, strict=True)])
    ends = np.concatenate([[base], starts, starts + values])
    room = 0.04 * (np.ptp(ends) or 1.0)
    ax.set(xlabel=xlabel, xlim=(ends.min() - room, ends.max() + room))
    ax.xaxis.set_major_locator(MaxNLocator(4))  # the labels say the numbers; a tick takes milliseconds
    ax.tick_params(axis="y", left=False)
    if title is not None:
        ax.set_title(title)
    return ax


def layer_density(ax: Axes, densities: Mapping[str, float], title: str | None = None) -> Axes:
    """The share of weights each layer keeps, in percent, first layer on top.

    Args:
        densities: layer -> share in ``[0, 1]``.

    Raises: ValueError (no layers, a share outside ``[0, 1]``).
    """
    if not densities:
        raise ValueError("there are no layers to draw")
    shares = {name: float(share) for name, share in densities.items()}
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise ValueError(f"layer {name!r} keeps a share of {share}; it must lie in [0, 1]")
    places = range(len(shares))
    percents = [100 * share for share in shares.values()]
    ax.barh(places, [100] * len(shares), color="#eeeeee", height=0.7)
    ax.barh(places, percents, color=PALETTE[0], height=0.7)
    for place, percent in enumerate(percents):
        ax.text(101, place, f"{percent:.3g} %", va="center", size=9)
    ax.set_yticks(places, list(shares))
    ax.invert_yaxis()
    ax.set(xlabel="weights kept [%]", xlim=(0, 113), xticks=range(0, 101, 25))
    if title is not None:
        ax.set_title(title)
    return ax
