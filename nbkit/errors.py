"""Error types: each derives from the builtin a caller would expect, and names the nearest valid value."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class _Message(Exception):
    # KeyError prints the repr of its argument; a sentence should print as a sentence.
    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class LayerNotFound(_Message, KeyError):
    """No module of the model has this dotted name."""


class LayerDidNotRun(_Message, KeyError):
    """The layer exists, but the forward pass never reached it."""


class UnknownName(_Message, KeyError):
    """A data set, model, paper or method that the kit does not have."""


class NotFinite(ValueError):
    """A value that must be finite is NaN or infinite."""


class DownloadError(OSError):
    """A download failed, was incomplete, or did not match its checksum; nothing was stored."""

    def _render_traceback_(self) -> list[str]:
        """What IPython shows: the sentence that helps, without the sixty lines of the way there."""
        return [f"{type(self).__name__}: {self}"]


class NotFittedError(ValueError, AttributeError):
    """A result was asked for before the step that produces it."""


def nearest(name: str, known: Iterable[str], n: int = 3) -> list[str]:
    """The ``n`` names of ``known`` most like ``name``, whatever their case, best first."""
    name, plain = name.lower(), {}
    for k in known:
        plain.setdefault(k.lower(), []).append(k)
    close = difflib.get_close_matches(name, plain, n=n, cutoff=0.5)
    close = close or [k for k in plain if name and (name in k or k in name)]
    return [k for alike in close for k in plain[alike]][:n]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'a' or 'b'?"`` or, with nothing alike, what there is."""
    known = list(known)
    close = nearest(name, known)
    if close:
        return f"; did you mean {' or '.join(map(repr, close))}?"
    shown = ", ".join(map(repr, known[:8])) + (", ..." if len(known) > 8 else "")
    return f"; there is {shown}" if known else "; there are none"
