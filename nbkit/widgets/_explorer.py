"""``explore``: a row of controls above a picture that follows them."""

from __future__ import annotations

import asyncio
import base64
import html
import inspect
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ipywidgets
import traitlets

from nbkit._png import compact
from nbkit.errors import UnknownName, did_you_mean
from nbkit.widgets import _controls
from nbkit.widgets._frames import Canvas, FrameCache, collecting_afterwards, error_picture

# Long enough for the positions a dragged slider sent meanwhile to arrive, too short to be felt.
_GATHER = 0.01

#: Explorers made in this process and not closed, oldest first.
alive: list[Explorer] = []


def explore(
    render: Callable,
    /,
    *,
    initial: Mapping[str, Any] | None = None,
    figsize: tuple[float, float] = (8, 4),
    dpi: float = 100,
    cache_bytes: int = 32 * 2**20,
    **controls: Any,
) -> Explorer:
    """Controls above a picture that follows them; shown where it is the last expression of a cell.

    ``render(fig, **values)`` draws on ``fig``, an empty matplotlib figure, and returns nothing. It should depend on
    the values alone: a frame is drawn once and then kept (:meth:`Explorer.refresh` forgets the frames). Where it
    raises, the message takes the picture's place until the next value that works.

    Args:
        controls: by the names of render's arguments, each one of: a picker or any ipywidget with a ``value``;
            a tuple ``(min, max)``, ``(min, max, step)`` or ``(min, max, step, value)``, a slider, over ints where all
            are ints; a list, a menu, as are a range, an array with one axis, an Index and a dict's keys; a dict
            label -> value, a menu (up to five short options are buttons); a bool, a tick box; a string, a line of text.
            Anything else is passed on unchanged.
        initial: where controls start, by name; for a menu the value or the label.
        figsize, dpi: of the picture; inches and pixels an inch. An axis has up to seven ticks, unless render sets them.
        cache_bytes: frames kept, in bytes; 0 keeps none.

    Raises: TypeError (render does not take these names; a tuple that is no range), ValueError (no control, an empty
    menu, a bad range or initial value), UnknownName (``initial`` names no control).

    >>> def wave(fig, frequency, kind):
    ...     fig.subplots().plot(t, kind(frequency * t))
    >>> explore(wave, frequency=(1, 10, 0.5), kind={"sine": np.sin, "cosine": np.cos})
    """
    return Explorer(render, controls, initial or {}, figsize, dpi, cache_bytes)


class Explorer:
    """A live figure; made by :func:`explore`.

    Attributes: ``controls`` (name -> widget), ``values`` (name -> what render gets), ``frame`` (the current picture,
    PNG), ``error`` (the exception render raised for it, or None), ``widget`` (the whole as an ipywidget).

    In JupyterLab the output is the live widget; GitHub and nbconvert show the frame that the same output carries, its
    metadata holding a description (``alt``) and the names of the controls.
    """

    def __init__(self, render, controls, initial, figsize, dpi, cache_bytes):
        widgets = {name: _controls.control(name, spec, initial.get(name)) for name, spec in controls.items()}
        self.controls: dict[str, ipywidgets.Widget] = {n: w for n, w in widgets.items() if w is not None}
        self.name = getattr(render, "__name__", type(render).__name__)
        _check_names(self.name, render, controls, self.controls, initial)
        self._fixed = {n: controls[n] for n, w in widgets.items() if w is None}
        self._order = list(controls)
        self._render = render
        self._canvas = Canvas(figsize, dpi)
        self._cache = FrameCache(cache_bytes)
        self.timings: deque[float] = deque(maxlen=1000)
        self._error: Exception | None = None
        self._png = b""
        self._good: bytes | None = None
        self._compact: tuple[bytes, bytes] = (b"", b"")
        self._image = _Picture(format="png", layout={"max_width": "100%", "align_self": "flex-start"})
        self._message = ipywidgets.HTML(layout={"display": "none"})
        self.widget = ipywidgets.VBox([_row(self.controls), self._image, self._message])
        self.widget.add_class("nbkit-explorer")  # by which JupyterLab's page knows it: nbkit/notebooks/labextension
        self._stale, self._held, self._scheduled = True, False, False
        self._loop = _running_loop()
        for widget in self.controls.values():
            # the index too: two options of a menu may be equal as values, as 1 and True are
            widget.observe(self._changed, ["value", "index"] if _controls.is_menu(widget) else "value")
        self._update()
        self._cell = _current_cell()
        _close_earlier_runs(self._cell)
        alive.append(self)

    @property
    def values(self) -> dict[str, Any]:
        """What ``render`` gets, by name, in the order the controls were given."""
        return {n: self._fixed[n] if n in self._fixed else _controls.read(self.controls[n]) for n in self._order}

    @property
    def frame(self) -> bytes:
        """The picture for the current values, as a compact PNG."""
        self._update()
        if self._compact[0] is not self._png:
            self._compact = (self._png, compact(self._png))
        return self._compact[1]

    @property
    def error(self) -> Exception | None:
        """What ``render`` raised for the current values, or None."""
        self._update()
        return self._error

    def set(self, **values: Any) -> Explorer:
        """Move controls, in the order given here, and draw one frame.

        Raises: UnknownName (no such control), ValueError (a value it cannot take; controls before it have moved).

        >>> explorer.set(layer="conv2", neuron=3)
        """
        for name in values:
            if name not in self.controls:
                raise UnknownName(f"no control {name!r}{did_you_mean(name, self.controls)}")
        with self.holding():
            for name, value in values.items():
                _controls.assign(name, self.controls[name], value)
        return self

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Move several controls inside, draw once at the end."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
            self._update()

    def refresh(self) -> Explorer:
        """Forget every frame and draw the current one anew, after what ``render`` looks at has changed."""
        self._cache.clear()
        self._stale = True
        self._update()
        return self

    def close(self) -> None:
        """Stop following the controls and free the frames; the pickers that were handed in stay usable."""
        if self not in alive:
            return
        for widget in self.controls.values():
            widget.unobserve(self._changed, ["value", "index"] if _controls.is_menu(widget) else "value")
        self._cache.clear()
        self._stale = False
        for part in (*self.widget.children, self.widget):
            part.close()
        alive.remove(self)

    def _changed(self, _change=None) -> None:
        """A control moved: draw now or, in a kernel, shortly, once for all the moves that arrived by then.

        A kernel with subshells may deliver widget messages on another thread. Drawing is left to the thread that the
        explorer was made on, so that a render never edits a model in the middle of a cell that uses it.
        """
        self._stale = True
        if self._held:
            return
        if self._loop is None or not self._loop.is_running():
            self._update()
        elif not self._scheduled:
            self._scheduled = True
            self._loop.call_soon_threadsafe(self._loop.call_later, _GATHER, self._update)

    def _update(self) -> None:
        self._scheduled = False
        if not self._stale:
            return
        # before reading: a move that arrives while the frame is drawn makes it stale again
        self._stale = False
        try:
            values = self.values
            png = self._cache.get(values)
            if png is None:
                with collecting_afterwards():  # after the picture is on its way
                    self._show_new(values)
            else:
                self._show(png)
        except BaseException:  # render was interrupted: the picture is still that of other values
            self._stale = True
            raise

    def _show_new(self, values: dict[str, Any]) -> None:
        try:
            png = self._draw(values)
        except Exception as error:
            self._show_error(error)
        else:
            self._cache.put(values, png)
            self._show(png)

    def _draw(self, values: dict[str, Any]) -> bytes:
        began = time.perf_counter()
        png = self._canvas.draw(self._render, values)
        self.timings.append(time.perf_counter() - began)
        return png

    def _show(self, png: bytes) -> None:
        self._error, self._good = None, png
        if self._message.value:
            self._message.value, self._message.layout.display = "", "none"
        self._put(png)

    def _show_error(self, error: Exception) -> None:
        self._error = error
        title = f"{self.name} raised {type(error).__name__}"
        message = str(error).strip() or "(no message)"
        self._put(error_picture(self._canvas, title, f"{message}\n\nwith {self._settings()}", self._good))
        self._message.value = _details(title, message, error)
        self._message.layout.display = None

    def _put(self, png: bytes) -> None:
        if png != self._png:
            self._png = png
            self._image.value = png
        self._image.tooltip = f"{self.name}: {self._settings()}"

    def _settings(self) -> str:
        return ", ".join(f"{n}={_shown(w)}" for n, w in self.controls.items())

    def __repr__(self) -> str:
        names = ", ".join([self.name, *(f"{n}=..." for n in self._order)])
        return f"explore({names}) at {self._settings()}"

    def _repr_mimebundle_(self, include=None, exclude=None):
        # one output with both: JupyterLab prefers the widget, everything without a kernel takes the picture
        frame = self.frame
        data = {"text/plain": repr(self), "image/png": base64.b64encode(frame).decode("ascii")}
        live = self.widget._repr_mimebundle_() if self.widget.comm is not None else {}
        data |= {mime: content for mime, content in live.items() if mime not in data}
        names = [getattr(w, "description", "") or n for n, w in self.controls.items()]
        return data, {"image/png": {"alt": f"{self.name} at {self._settings()}", "controls": names}}


class _Picture(ipywidgets.Image):
    """An image whose ``tooltip`` says what it shows, to a mouse and to a screen reader.

    The view sets a tooltip only where it finds an empty description, which an Image lacks (ipywidgets 8.1).
    """

    description = traitlets.Unicode("").tag(sync=True)


def _check_names(name: str, render: Callable, given: Mapping, controls: Mapping, initial: Mapping) -> None:
    if not callable(render):
        raise TypeError(f"render must be a function render(fig, **values), not {type(render).__name__}")
    if not controls:
        raise ValueError("explore needs at least one control")
    for unknown in set(initial) - set(controls):
        raise UnknownName(f"initial names no control {unknown!r}{did_you_mean(unknown, controls)}")
    try:
        signature = inspect.signature(render)
    except ValueError:  # some callables written in C have none
        return
    try:
        signature.bind(None, **given)
    except TypeError as error:
        raise TypeError(f"{name}{signature} cannot be called as {name}(fig, {', '.join(given)}): {error}") from None


def _row(controls: Mapping[str, ipywidgets.Widget]) -> ipywidgets.HBox:
    for widget in controls.values():
        if widget.has_trait("tooltip") and widget.tooltip is None:
            widget.tooltip = getattr(widget, "description", "")  # without one, a slider's label says "null"
    layout = {"flex_flow": "row wrap", "align_items": "center", "grid_gap": "0 24px", "margin": "0 0 4px 0"}
    return ipywidgets.HBox(list(controls.values()), layout=layout)


def _shown(widget) -> str:
    value = _controls.read(widget)
    # a menu's label is made to be read; its value may be an array or a function
    if _controls.is_menu(widget) and not isinstance(value, str) and widget.label != str(value):
        value = widget.label
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _details(title: str, message: str, error: Exception) -> str:
    """The message as text that can be copied and read aloud, the lines that led to it folded below."""
    here = str(Path(__file__).parent)
    steps = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(here)]
    lines = [
        f"{'cell' if 'ipykernel_' in f.filename else Path(f.filename).name}, line {f.lineno}, in {f.name}\n    {f.line}"
        for f in steps
    ]
    return (
        f'<div role="alert"><b>{html.escape(title)}:</b> {html.escape(message)}'
        f"<details><summary>Where</summary><pre>{html.escape(chr(10).join(lines))}</pre></details></div>"
    )


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _current_cell() -> tuple[str, str] | None:
    """The id of the notebook cell that runs, and of this run of it; None outside a notebook."""
    from IPython import get_ipython

    request = getattr(get_ipython(), "parent_header", None) or {}
    cell = request.get("metadata", {}).get("cellId")
    return (cell, request["header"]["msg_id"]) if cell else None


def _close_earlier_runs(cell: tuple[str, str] | None) -> None:
    # their output is gone from the notebook, but ipywidgets keeps every widget, and so its frames, for good
    for explorer in list(alive):
        if cell and explorer._cell and explorer._cell[0] == cell[0] and explorer._cell[1] != cell[1]:
            explorer.close()
