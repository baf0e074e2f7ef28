"""Figures that several notebooks draw: pictures with heat maps, curves over seeds, bars with their points.

Every function draws on the axes it is given and returns them, so it works in a cell and in an explorer alike:

>>> style()                                                        # once, in a notebook's first cell
>>> fig, (left, right) = plt.subplots(1, 2)
>>> overlay(left, photo, grad_cam_map)
>>> curves(right, sparsities, {"magnitude": accuracy}, xlabel="sparsity", ylabel="accuracy")   # [seeds, x]

Arrays may be torch tensors (on any device, with or without gradient) or anything NumPy reads.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nbkit.errors import NotFinite

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Colours that stay apart for colour-blind readers (Okabe and Ito 2008), the pale yellow left out.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
SEQUENTIAL = "viridis"
DIVERGING = "RdBu_r"  # red above zero, blue below, white at zero

_STYLE = {
    "figure.figsize": (8, 3.6),
    "figure.dpi": 100,
    "savefig.dpi": 100,
    "figure.constrained_layout.use": True,
    "font.family": "DejaVu Sans",  # ships with matplotlib: the same figure on every machine
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.titley": 1.0,  # else every drawing looks for ticks above each axes, one by one
    "axes.labelsize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "legend.fontsize": 10,
    "legend.frameon": False,
    "lines.linewidth": 2,
    "image.cmap": SEQUENTIAL,
    "image.interpolation": "nearest",
    "grid.color": "#dddddd",
    "grid.linewidth": 0.8,
}


def style() -> None:
    """Set matplotlib's defaults for a notebook: the palette, sizes readable at notebook width, modest PNG files.

    Changes ``matplotlib.rcParams`` for the whole process (``matplotlib.rcdefaults()`` undoes it).
    """
    import matplotlib

    matplotlib.rcParams.update(_STYLE)
    matplotlib.rcParams["axes.prop_cycle"] = matplotlib.cycler(color=PALETTE)
    if "ipykernel" in sys.modules:
        from matplotlib_inline.backend_inline import set_matplotlib_formats

        # without the version that drew it, a picture is the same file on another machine
        set_matplotlib_formats("png", bbox_inches="tight", metadata={"Software": None})


def show_image(ax: Axes, image: Any, title: str | None = None) -> Axes:
    """A picture without axes.

    Args:
        image: ``[H, W]``, ``[H, W, 3]``, ``[3, H, W]`` or ``[1, H, W]``; bytes, or floats. Floats outside ``[0, 1]``
            (a model's normalised input) are stretched to it.

    Raises: ValueError (another shape), NotFinite.
    """
    ax.imshow(_picture(image), cmap="gray", vmin=0, vmax=1, interpolation="antialiased")
    return _bare(ax, title)


def heatmap(
    ax: Axes,
    values: Any,
    title: str | None = None,
    *,
    diverging: bool | None = None,
    limit: float | None = None,
    label: str | None = None,
    xlabel: str | None = None,
    ylabel: str | None = None,
) -> Axes:
    """A matrix as colours, with a colour bar.

    Args:
        values: ``[rows, columns]``.
        diverging: colours for values below and above zero, with limits symmetric around it; by default where there
            are both.
        limit: the value of the last colour (give it where several maps are to be compared).
        label: of the colour bar.

    Raises: ValueError (not a matrix, limit not positive), NotFinite.
    """
    matrix = _array(values, "values", 2)
    image = ax.imshow(matrix, aspect="auto", **_colours(matrix, diverging, limit))
    ax.figure.colorbar(image, ax=ax, label=label or "")
    ax.set(xlabel=xlabel, ylabel=ylabel)
    if title is not None:
        ax.set_title(title)
    return ax


def overlay(
    ax: Axes,
    image: Any,
    heat: Any,
    title: str | None = None,
    *,
    alpha: float = 0.75,
    diverging: bool | None = None,
    limit: float | None = None,
) -> Axes:
    """A heat map laid over the picture it explains: opaque where it is strong, clear where it is near zero.

    Args:
        image: as in :func:`show_image`; shown in grey, so that colour means heat.
        heat: ``[h, w]``, of any size; stretched over the picture.
        alpha: opacity of the strongest value.
        diverging, limit: as in :func:`heatmap`.

    Raises: ValueError (shapes, alpha outside ``(0, 1]``), NotFinite.
    """
    import matplotlib
    from PIL import Image

    if not 0 < alpha <= 1:
        raise ValueError(f"alpha must lie in (0, 1], not {alpha}")
    picture = _picture(image)
    grey = picture if picture.ndim == 2 else picture @ np.array([0.299, 0.587, 0.114])  # ITU-R BT.601 luma
    matrix = _array(heat, "heat", 2)
    colours = _colours(matrix, diverging, limit)
    if colours["cmap"] == SEQUENTIAL:
        colours["cmap"] = "inferno"  # its dark end is where the map is clear anyway, its light end shows on grey
    size = (grey.shape[1], grey.shape[0])
    matrix = np.asarray(Image.fromarray(matrix.astype(np.float32)).resize(size, Image.Resampling.BILINEAR))
    low, high = colours["vmin"], colours["vmax"]
    rgba = matplotlib.colormaps[colours["cmap"]](np.clip((matrix - low) / (high - low), 0, 1))
    rgba[..., 3] = alpha * np.clip(np.abs(matrix) / max(abs(low), abs(high)), 0, 1)
    ax.imshow(grey, cmap="gray", vmin=0, vmax=1, interpolation="antialiased")
    ax.imshow(rgba, interpolation="antialiased")
    return _bare(ax, title)


def gallery(fig: Figure, images: Sequence[Any], titles: Sequence[str] | None = None, *, columns: int = 6) -> list[Axes]:
    """Pictures in rows on a figure of their own; returns one axes a picture.

    Raises: ValueError (no pictures, as many titles as pictures not given, columns below 1) and as :func:`show_image`.
    """
    images = list(images)
    titles = [None] * len(images) if titles is None else list(titles)
    if not images:
        raise ValueError("a gallery needs at least one picture")
    if len(titles) != len(images):
        raise ValueError(f"{len(images)} pictures but {len(titles)} titles")
    if columns < 1:
        raise ValueError(f"columns must be at least 1, not {columns}")
    columns = min(columns, len(images))
    grid = fig.subplots(-(-len(images) // columns), columns, squeeze=False).ravel()
    for ax in grid[len(images) :]:
        ax.remove()
    return [show_image(ax, image, title) for ax, image, title in zip(grid, images, titles, strict=False)]


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
    x = _array(x, "x", 1)
    for label, values in lines.items():
        values = np.atleast_2d(_array(values, f"line {label!r}"))
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
        values = np.atleast_1d(_array(values, what))
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
    values = _array(list(parts.values()), "parts", 1)
    base = float(_array([base], "base")[0])
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


def _array(values: Any, name: str, ndim: int | None = None) -> np.ndarray:
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = values.float() if values.is_floating_point() else values  # NumPy has no bfloat16
    array = np.asarray(values)
    if array.dtype.kind not in "fiub":
        raise ValueError(f"{name} must hold numbers, not {array.dtype}")
    if array.size == 0:
        raise ValueError(f"{name} is empty: its shape is {array.shape}")
    if ndim is not None and array.ndim != ndim:
        raise ValueError(f"{name} has shape {array.shape}; it must have {ndim} {'axis' if ndim == 1 else 'axes'}")
    if not np.isfinite(array).all():
        raise NotFinite(f"{name} holds {(~np.isfinite(array)).sum()} NaN or infinite values of {array.size}")
    return array if array.dtype == np.uint8 else array.astype(float)


def _picture(image: Any) -> np.ndarray:
    """``[H, W]`` or ``[H, W, 3]``, floats in ``[0, 1]``."""
    array = _array(image, "image")
    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[2] not in (1, 3):
        array = np.moveaxis(array, 0, -1)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)):
        raise ValueError(f"image has shape {array.shape}; it must be [H, W], [H, W, 3], [3, H, W] or [1, H, W]")
    if array.dtype == np.uint8:
        return array / 255
    low, high = array.min(), array.max()
    return array if 0 <= low and high <= 1 else (array - low) / (high - low or 1)


def _colours(matrix: np.ndarray, diverging: bool | None, limit: float | None) -> dict[str, Any]:
    if limit is not None and not limit > 0:
        raise ValueError(f"limit must be positive, not {limit}")
    low, high = float(matrix.min()), float(matrix.max())
    if diverging or (diverging is None and low < 0 < high):
        top = limit or max(-low, high) or 1.0
        return {"cmap": DIVERGING, "vmin": -top, "vmax": top}
    bottom = min(low, 0.0) if high > 0 else low
    top = limit or high
    return {"cmap": SEQUENTIAL, "vmin": bottom, "vmax": top if top > bottom else bottom + 1.0}


def _interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    from scipy import stats

    half = stats.t.ppf(0.975, len(values) - 1) * values.std(0, ddof=1) / np.sqrt(len(values))
    return values.mean(0) - half, values.mean(0) + half


def _bare(ax: Axes, title: str | None) -> Axes:
    ax.set_axis_off()
    if title is not None:
        ax.set_title(title)
    return ax
