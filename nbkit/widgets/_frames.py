"""Turning a render function into PNG bytes: a figure outside pyplot, quick encoding, a bounded store of frames."""

from __future__ import annotations

import gc
import io
import sys
import textwrap
import warnings
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubplotParams
from matplotlib.ticker import AutoLocator
from PIL import Image

_MARGINS = ("left", "right", "bottom", "top", "wspace", "hspace")
# at most six intervals between the ticks of an axis, each 1, 2 or 5 times a power of ten (2.5 would put ticks between
# the numbers of layers); matplotlib's own choice is up to nine, and a tick takes milliseconds
_TICKS = {"nbins": 6, "steps": [1, 2, 5, 10]}


class Canvas:
    """One matplotlib figure, made without pyplot so that no inline backend shows it a second time, drawn to PNG."""

    def __init__(self, figsize: tuple[float, float], dpi: float):
        self.figsize, self.dpi = figsize, dpi
        with _no_automatic_layout():
            self.figure = Figure(figsize=figsize, dpi=dpi)
        FigureCanvasAgg(self.figure)
        self._facecolor = self.figure.get_facecolor()
        self._margins: dict[tuple, dict[str, float]] = {}
        self._reset()

    def draw(self, render: Callable, values: dict[str, Any]) -> bytes:
        """Call ``render(figure, **values)``, return the picture, leave the figure empty for the next.

        Raises: what ``render`` raises; ValueError where it draws nothing on the figure.
        """
        try:
            return self._draw(render, values)
        finally:
            self._reset()

    def _draw(self, render: Callable, values: dict[str, Any]) -> bytes:
        with _pyplot_left_alone():
            render(self.figure, **values)
        if len(self.figure.get_children()) <= 1:
            raise ValueError(
                "render drew nothing on its figure; it must draw on the fig it is given, as in ax = fig.subplots(), "
                "not through pyplot"
            )
        for ax in self.figure.axes:
            _thin_ticks(ax)
        self._arrange()
        self.figure.canvas.draw()
        return encode(np.asarray(self.figure.canvas.buffer_rgba()))

    def _reset(self) -> None:
        figure = self.figure
        # clear() first rebuilds the ticks of every axes that it then drops: a fifth of the time of a small frame
        for ax in list(figure.axes):
            ax.figure.delaxes(ax)  # which may be a subfigure
        figure.clear()
        if figure.get_layout_engine() is not None:
            with _no_automatic_layout():
                figure.set_layout_engine(None)
        figure.subplotpars = SubplotParams()
        self._untouched = _margins_of(figure)
        figure.set_dpi(self.dpi)
        figure.set_size_inches(self.figsize)
        figure.set_facecolor(self._facecolor)

    def _arrange(self) -> None:
        """Tight margins, computed once for each arrangement of axes.

        Computing them lays out every label, which takes as long as drawing it. Frames with the same axes and tick
        labels of about the same length share their margins; that also keeps the axes still while a slider moves.
        A render that sets margins or a layout engine of its own keeps them, and saves the time.
        """
        figure = self.figure
        own = figure.get_layout_engine() is not None or _margins_of(figure) != self._untouched
        if own or all(map(_is_placed, figure.axes)):
            return
        arrangement = (tuple(figure.get_size_inches()), bool(figure.get_suptitle()), *map(_arrangement, figure.axes))
        if arrangement not in self._margins:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*tight_layout.*|.*[Tt]ight layout.*")
                figure.tight_layout()
            self._margins[arrangement] = _margins_of(figure)
        figure.subplots_adjust(**self._margins[arrangement])


def _margins_of(figure: Figure) -> dict[str, float]:
    return {name: getattr(figure.subplotpars, name) for name in _MARGINS}


def _is_placed(ax) -> bool:
    """Whether an axes has no cell in a grid, or one in a grid whose four margins were given."""
    cell = ax.get_subplotspec()
    grid = cell and cell.get_topmost_subplotspec().get_gridspec()
    return grid is None or None not in (grid.left, grid.right, grid.bottom, grid.top)


def _arrangement(ax) -> tuple:
    """What an axes' margins depend on: its cell in the grid, lines of text around it, length of its tick labels."""
    cell = ax.get_subplotspec()
    place = cell and (cell.get_gridspec().get_geometry(), cell.num1, cell.num2)
    if not ax.axison:
        return place, ax.get_title().count("\n"), bool(ax.get_title())
    texts = (ax.get_title(), ax.get_xlabel(), ax.get_ylabel())
    longest = [max((len(t.get_text()) for t in axis.get_ticklabels()), default=0) for axis in (ax.xaxis, ax.yaxis)]
    return place, *((bool(t), t.count("\n")) for t in texts), *((n + 1) // 2 for n in longest)


def _thin_ticks(ax) -> None:
    """Fewer ticks on the axes whose ticks were left to matplotlib: a third of the time of a small frame."""
    for axis in (ax.xaxis, ax.yaxis):
        locator = axis.get_major_locator()
        if axis.isDefault_majloc and type(locator) is AutoLocator:
            locator.set_params(**_TICKS)


@contextmanager
def collecting_afterwards() -> Iterator[None]:
    """Put garbage collection off until the end, then collect what is young.

    A frame leaves thousands of objects in cycles, enough to set off a full collection every dozen frames; in a process
    that has loaded torch and transformers that takes longer than the frame.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
            gc.collect(1)


@contextmanager
def _no_automatic_layout() -> Iterator[None]:
    with matplotlib.rc_context({"figure.constrained_layout.use": False, "figure.autolayout": False}):
        yield


@contextmanager
def _pyplot_left_alone() -> Iterator[None]:
    """Close the pyplot figures that a render opens: the inline backend would print them under the cell."""
    pyplot = sys.modules.get("matplotlib.pyplot")
    before = set(pyplot.get_fignums()) if pyplot else set()
    try:
        yield
    finally:
        pyplot = sys.modules.get("matplotlib.pyplot")
        for number in set(pyplot.get_fignums()) - before if pyplot else ():
            pyplot.close(number)


def encode(pixels: np.ndarray) -> bytes:
    """Pixels ``[H, W, 3 or 4]`` (bytes) as PNG, quickly: a moving slider waits for this."""
    out = io.BytesIO()
    # looking for runs of one value alone takes less time than the usual search and packs a chart as well
    Image.fromarray(pixels).convert("RGB").save(out, "png", compress_level=1, compress_type=zlib.Z_RLE)
    return out.getvalue()


def error_picture(canvas: Canvas, title: str, message: str, last: bytes | None) -> bytes:
    """The message on a page of the figure's size, over the last good picture faded to a shadow."""
    figure = Figure(figsize=canvas.figsize, dpi=canvas.dpi, facecolor="white")
    FigureCanvasAgg(figure)
    if last is not None:
        faded = 255 - (255 - np.asarray(Image.open(io.BytesIO(last)).convert("L"), dtype=float)) * 0.12
        figure.figimage(faded, cmap="gray", vmin=0, vmax=255, origin="upper")
    columns = max(20, int(figure.get_figwidth() * 11))
    lines = [part for line in message.splitlines() for part in (textwrap.wrap(line, columns) or [""])]
    room = max(1, int((figure.get_figheight() - 0.9) / 0.21))
    text = "\n".join(lines[:room] if len(lines) <= room else [*lines[: room - 1], "..."])
    plain = {"parse_math": False, "va": "top", "family": "DejaVu Sans"}
    panel = {"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 4}
    width, height = figure.get_figwidth(), figure.get_figheight()
    figure.text(0.3 / width, 1 - 0.25 / height, title, size=12, color="#a33b00", weight="bold", bbox=panel, **plain)
    figure.text(0.3 / width, 1 - 0.6 / height, text, size=10.5, color="#222222", linespacing=1.35, bbox=panel, **plain)
    figure.canvas.draw()
    return encode(np.asarray(figure.canvas.buffer_rgba()))


class FrameCache:
    """Frames by control values, the least recently shown dropped first once they take more than ``max_bytes``."""

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.bytes = 0
        self._frames: OrderedDict[tuple, tuple[dict, bytes]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._frames)

    def get(self, values: dict[str, Any]) -> bytes | None:
        key = _key(tuple(values.values()))
        if key not in self._frames:
            return None
        self._frames.move_to_end(key)
        return self._frames[key][1]

    def put(self, values: dict[str, Any], frame: bytes) -> None:
        # the values are kept beside the frame: a key made of an object's id holds only as long as the object lives
        key = _key(tuple(values.values()))
        if key in self._frames:
            self.bytes -= len(self._frames.pop(key)[1])
        self._frames[key] = (values, frame)
        self.bytes += len(frame)
        while self.bytes > self.max_bytes:
            _, (_, dropped) = self._frames.popitem(last=False)
            self.bytes -= len(dropped)

    def clear(self) -> None:
        self._frames.clear()
        self.bytes = 0


def _key(value: Any) -> Any:
    # 1, 1.0 and True are equal as keys but not to a reader; arrays and tensors compare elementwise or not at all
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return type(value).__name__, value
    return tuple(map(_key, value)) if isinstance(value, tuple) else ("object", id(value))
