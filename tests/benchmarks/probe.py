"""How long the explorers of a notebook take to answer; runs in the notebook's own kernel, after its last cell."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def probe(moves: int = 40, seconds: float = 20.0) -> list[dict[str, Any]]:
    """Turn random controls of each explorer, every frame drawn anew, and time from the move to the PNG bytes.

    Returns, an explorer each: its ``name``, the ``frames`` in seconds, and whether a ``model`` ran for any of them.
    The frame that stands at the start is not among them: it loads fonts and computes margins once.
    """
    from nbkit.widgets._explorer import alive

    return [_turn(explorer, moves, seconds) for explorer in list(alive)]


def _turn(explorer, moves: int, seconds: float) -> dict[str, Any]:
    from nbkit.widgets import _controls

    chance = random.Random(0)
    explorer.refresh()
    explorer.timings.clear()
    until = time.perf_counter() + seconds
    with counting_forwards() as forwards:
        for _ in range(moves):
            if time.perf_counter() > until:
                break
            widget = chance.choice(list(explorer.controls.values()))
            trait, value = chance.choice(_controls.samples(widget, 12))
            explorer._cache.clear()
            setattr(widget, trait, value)
            explorer.frame  # noqa: B018  (drawn now, where the kernel's loop would wait for more moves)
    return {"name": explorer.name, "frames": list(explorer.timings), "model": forwards[0] > 0}


@contextmanager
def counting_forwards() -> Iterator[list[int]]:
    """How often a torch module was called inside, in a list of one number."""
    count = [0]
    if "torch" not in sys.modules:
        yield count
        return
    from torch.nn.modules.module import register_module_forward_pre_hook

    def note(*_):
        count[0] += 1

    handle = register_module_forward_pre_hook(note)
    try:
        yield count
    finally:
        handle.remove()
