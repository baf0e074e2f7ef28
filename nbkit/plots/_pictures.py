"""Pictures, matrices as colours, and heat maps laid over the pictures they explain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nbkit.plots._arrays import array
from nbkit.plots._style import DIVERGING, SEQUENTIAL

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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
    matrix = array(values, "values", 2)
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
    matrix = array(heat, "heat", 2)
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


def _picture(image: Any) -> np.ndarray:
    """``[H, W]`` or ``[H, W, 3]``, floats in ``[0, 1]``."""
    pixels = array(image, "image")
    if pixels.ndim == 3 and pixels.shape[0] in (1, 3) and pixels.shape[2] not in (1, 3):
        pixels = np.moveaxis(pixels, 0, -1)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    if not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3)):
        raise ValueError(f"image has shape {pixels.shape}; it must be [H, W], [H, W, 3], [3, H, W] or [1, H, W]")
    if pixels.dtype == np.uint8:
        return pixels / 255
    low, high = pixels.min(), pixels.max()
    return pixels if 0 <= low and high <= 1 else (pixels - low) / (high - low or 1)


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


def _bare(ax: Axes, title: str | None) -> Axes:
    ax.set_axis_off()
    if title is not None:
        ax.set_title(title)
    return ax
