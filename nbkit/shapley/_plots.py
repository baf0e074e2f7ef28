"""shap's beeswarm and waterfall and the tree of aspects, drawn where the caller says, leaving pyplot as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np

from nbkit.shapley._aspects import Aspects
from nbkit.shapley._explain import numpy_seeded
from nbkit.shapley._explanation import Explanation

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def beeswarm(explanation: Explanation, *, ax: Axes | None = None, max_display: int = 10) -> Axes:
    """A dot for each row and feature: the value across, the rows piled up, coloured by the feature (shap's beeswarm).

    ``ax``: axes of any figure, also one that pyplot does not know; None makes a figure. Returns the axes.

    >>> beeswarm(explanation, ax=fig.subplots())
    """
    import shap

    ax = _axes(ax, rows=min(max_display, explanation.values.shape[1]))
    with numpy_seeded(0), _drawing_in(ax):  # shap jitters the dots
        shap.plots.beeswarm(explanation.to_shap(), max_display=max_display, ax=ax, plot_size=None, show=False)
    ax.set_xlabel(f"Shapley value: effect on {explanation.output}")
    return ax


def waterfall(
    explanation: Explanation, row: int = 0, *, ax: Axes | None = None, max_display: int = 10
) -> Axes:
    """From the base value to the prediction of one row, a bar for each feature (shap's waterfall).

    ``row``: which of the N rows; ``ax`` as for ``beeswarm`` (its figure keeps its size). Returns the axes.

    Raises: IndexError for a row that is not there.

    >>> waterfall(explanation, 3)
    """
    import shap

    if not -len(explanation) <= row < len(explanation):
        raise IndexError(f"row {row} is out of range; the explanation has rows 0 to {len(explanation) - 1}")
    ax = _axes(ax, rows=min(max_display, explanation.values.shape[1]))
    with _drawing_in(ax), mock.patch("matplotlib.pyplot.arrow", _forward_arrow(ax)):
        shap.plots.waterfall(explanation.to_shap()[row], max_display=max_display, show=False)
    return ax


def _forward_arrow(ax: Axes) -> Callable[..., Any]:
    """``ax.arrow`` for shap 0.51, which gives a bar shorter than an arrow's head a body of negative length: the arrow
    then points the wrong way and ends elsewhere than its bar. Here such a bar is all head."""
    from shap.plots._style import get_style

    upwards = get_style().primary_color_positive

    def arrow(x: float, y: float, dx: float, dy: float, **drawn: Any) -> Any:
        sign = 1 if np.array_equal(drawn["color"], upwards) else -1
        body = max(sign * dx, 1e-6 * drawn["head_length"])  # an arrow without any body has no direction
        return ax.arrow(x, y, sign * body, dy, **drawn)

    return arrow


def dendrogram(found: Aspects, *, ax: Axes | None = None) -> Axes:
    """The tree of features behind ``aspects``, with a dashed line where it was cut: what joins left of it is an aspect.

    ``ax`` as for ``beeswarm``. Returns the axes. Raises: ValueError for a single feature.

    >>> dendrogram(aspects(X_train, 0.5), ax=fig.subplots())
    """
    import matplotlib
    from scipy.cluster import hierarchy

    if len(found.features) < 2:
        raise ValueError(f"a dendrogram needs at least two features, not {found.features}")
    ax = _axes(ax, rows=len(found.features))
    hierarchy.dendrogram(
        found.linkage, labels=found.features, orientation="right", ax=ax,
        color_threshold=0, above_threshold_color="#555555", leaf_font_size=matplotlib.rcParams["ytick.labelsize"],
    )  # fmt: skip
    ax.axvline(1 - found.threshold, color="#D55E00", linestyle="--")
    ax.set_xlim(0, 1)
    ax.set_xlabel("1 - |Spearman|")
    return ax


def _axes(ax: Axes | None, rows: int) -> Axes:
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(8, 0.45 * rows + 1.5), layout="constrained")[1]


@contextmanager
def _drawing_in(ax: Axes) -> Iterator[None]:
    """Let code written for pyplot's current figure draw in ``ax``, whose figure pyplot need not know."""
    import matplotlib.pyplot as plt
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure: Any = ax.get_figure(root=True)
    if not hasattr(figure.canvas, "get_renderer"):  # shap measures its texts while it draws
        FigureCanvasAgg(figure)
    interactive = plt.isinteractive()
    try:
        with (
            mock.patch.object(plt, "gca", lambda: ax),
            mock.patch.object(plt, "gcf", lambda: figure),
            mock.patch.object(figure, "set_size_inches"),
        ):
            yield
    finally:
        plt.ion() if interactive else plt.ioff()
