"""One thing done by the kit and by what a user would pick instead: the same machine, process, minute and inputs.

A row is registered where it is written:

>>> @row("integrated gradients, 50 steps", "captum", target=1.0)
... def _():
...     model, x = ...
...     return Row(
...         ours=lambda: attribution.integrated_gradients(model, x, 0, steps=50),
...         theirs=lambda: captum.attr.IntegratedGradients(model).attribute(x, target=0, n_steps=50),
...     )
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

TOLERANCE = 1e-4


@dataclass(frozen=True)
class Row:
    """Two callables that compute the same; ``value`` turns what they return into comparable arrays.

    ``part``: where the other side takes too long, it does one ``part``-th of the work and its time is multiplied;
    ``same_part`` then cuts our value down to what theirs holds.
    """

    ours: Callable[[], Any]
    theirs: Callable[[], Any]
    value: Callable[[Any], Any] = lambda result: result
    same_part: Callable[[Any], Any] = lambda value: value
    part: int = 1
    repeats: int = 7


@dataclass(frozen=True)
class Entry:
    """A registered row; ``target`` bounds the ratio of times, ``memory_target`` that of peak memory."""

    name: str
    beside: str
    build: Callable[[], Row]
    target: float | None = None
    memory_target: float | None = None


@dataclass(frozen=True)
class Measured:
    """``ratio`` is our time over theirs, so below 1 the kit is the faster; quartiles over the pairs of calls.

    ``difference``: the largest of any element, over the largest element of their result.
    """

    entry: Entry
    ours: float
    theirs: float
    ratio: float
    quartiles: tuple[float, float]
    ours_mb: float
    theirs_mb: float
    difference: float

    @property
    def verdict(self) -> str:
        """``differs`` (the results do), ``short`` (a target missed), ``reached``, or nothing where there is none."""
        if not self.difference <= TOLERANCE:
            return "differs"
        target, memory = self.entry.target, self.entry.memory_target
        missed = target is not None and self.ratio > target
        missed |= memory is not None and self.ours_mb > memory * self.theirs_mb + 1  # 1 MB: what sampling can tell
        return "short" if missed else "reached" if target is not None else ""


REGISTRY: list[Entry] = []


def row(
    name: str, beside: str, *, target: float | None = None, memory_target: float | None = None
) -> Callable[[Callable[[], Row]], Callable[[], Row]]:
    """Register a function that builds a :class:`Row`; it is called only when the row is measured."""

    def register(build: Callable[[], Row]) -> Callable[[], Row]:
        REGISTRY.append(Entry(name, beside, build, target, memory_target))
        return build

    return register


def measure(entry: Entry) -> Measured:
    """Warm both up and compare their results, then time them in turns, then take each one's peak memory."""
    row = entry.build()
    difference = _difference(row.same_part(row.value(row.ours())), row.value(row.theirs()))
    pairs = []
    for i in range(row.repeats):  # who goes first alternates, so that neither profits from a warm cache
        first, second = (row.ours, row.theirs) if i % 2 == 0 else (row.theirs, row.ours)
        a, b = seconds(first), seconds(second)
        ours, theirs = (a, b) if i % 2 == 0 else (b, a)
        pairs.append((ours, theirs * row.part))
    ratios = [ours / theirs for ours, theirs in pairs]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return Measured(
        entry, statistics.median(p[0] for p in pairs), statistics.median(p[1] for p in pairs),
        statistics.median(ratios), (low, high), peak_mb(row.ours), peak_mb(row.theirs), difference,
    )  # fmt: skip


def peak_mb(call: Callable[[], Any]) -> float:
    """How far the resident memory of the process rises above its start during the call, sampled every millisecond.

    What was freed before is handed back to the system first, so that a call cannot hide in it.
    """
    import psutil

    _trim()
    process = psutil.Process()
    start = process.memory_info().rss
    peak, done = [start], threading.Event()

    def watch():
        while not done.wait(0.001):
            peak[0] = max(peak[0], process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        call()
    finally:
        done.set()
        watcher.join()
    return (max(peak[0], process.memory_info().rss) - start) / 2**20


def _trim() -> None:
    import ctypes
    import gc
    import sys

    gc.collect()
    if sys.platform == "linux":  # elsewhere a peak may be underestimated
        ctypes.CDLL(None).malloc_trim(0)


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _difference(ours: Any, theirs: Any) -> float:
    """Largest absolute difference of any element, relative to the largest element of ``theirs``."""
    import numpy as np

    a, b = (np.asarray(x.detach().cpu() if hasattr(x, "detach") else x, dtype=float) for x in (ours, theirs))
    if a.shape != b.shape:
        raise ValueError(f"the results have shapes {a.shape} and {b.shape}")
    return float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30))
