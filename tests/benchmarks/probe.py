"""How long the explorers of a notebook take to answer; runs in the notebook's own kernel, after its last cell."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_ASKED = {
    "forward": "torch.nn.", "_call_impl": "torch.nn.",
    "predict": "sklearn.", "predict_proba": "sklearn.", "decision_function": "sklearn.",
}  # fmt: skip
"""Functions that ask a model something, and the packages in whose code they count."""


def probe(moves: int = 40, seconds: float = 20.0) -> list[dict[str, Any]]:
    """Turn random controls of each explorer, every frame drawn anew, and time from the move to the PNG bytes.

    Returns, an explorer each: its ``name``, the ``frames`` in seconds, and whether a ``model`` ran for any of them: a
    torch module or a scikit-learn estimator, looked for in frames that are not timed. The frame that stands at the
    start is not among them: it loads fonts and computes margins once.
    """
    from nbkit.widgets._explorer import alive

    return [_turn(explorer, moves, seconds) for explorer in list(alive)]


def _turn(explorer, moves: int, seconds: float) -> dict[str, Any]:
    explorer.refresh()
    with asking() as asked:
        _move(explorer, 8, seconds / 2)  # few: what a notebook keeps of them is not computed again below
    explorer.timings.clear()
    _move(explorer, moves, seconds)
    return {"name": explorer.name, "frames": list(explorer.timings), "model": bool(asked)}


def _move(explorer, moves: int, seconds: float) -> None:
    from nbkit.widgets import _controls

    chance, until = random.Random(moves), time.perf_counter() + seconds
    for _ in range(moves):
        if time.perf_counter() > until:
            return
        widget = chance.choice(list(explorer.controls.values()))
        trait, value = chance.choice(_controls.samples(widget, 12))
        explorer._cache.clear()
        setattr(widget, trait, value)
        explorer.frame  # noqa: B018  (drawn now, where the kernel's loop would wait for more moves)


@contextmanager
def asking() -> Iterator[set[str]]:
    """The names of the functions of models that were called inside; slow, so nothing is to be timed there."""
    found: set[str] = set()

    def note(frame, event: str, _) -> None:
        if event == "call" and (package := _ASKED.get(frame.f_code.co_name)):
            if frame.f_globals.get("__name__", "").startswith(package):
                found.add(frame.f_code.co_name)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        yield found
    finally:
        sys.setprofile(before)
