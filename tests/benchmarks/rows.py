"""One thing done by the kit and by another library, side by side: the same machine, process and minute.

A row is registered where it is written:

>>> @row("integrated gradients, 32 images, 50 steps", "captum")
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

REGISTRY: list[tuple[str, str, Callable[[], Row]]] = []


@dataclass(frozen=True)
class Row:
    """Two callables that compute the same; ``value`` turns what they return into comparable arrays."""

    ours: Callable[[], Any]
    theirs: Callable[[], Any]
    value: Callable[[Any], Any] = lambda result: result
    repeats: int = 7


@dataclass(frozen=True)
class Measured:
    """``ratio`` is theirs over ours, so above 1 the kit is the faster; quartiles over the pairs of calls."""

    name: str
    library: str
    ours: float
    theirs: float
    ratio: float
    quartiles: tuple[float, float]
    ours_mb: float
    theirs_mb: float
    difference: float


def row(name: str, library: str) -> Callable[[Callable[[], Row]], Callable[[], Row]]:
    """Register a function that builds a :class:`Row`; it is called only when the row is measured."""

    def register(build: Callable[[], Row]) -> Callable[[], Row]:
        REGISTRY.append((name, library, build))
        return build

    return register


def measure(name: str, library: str, build: Callable[[], Row]) -> Measured:
    """Warm both up and compare their results, then time them in turns, then take each one's peak memory."""
    row = build()
    difference = _difference(row.value(row.ours()), row.value(row.theirs()))
    pairs = []
    for i in range(row.repeats):  # who goes first alternates, so that neither profits from a warm cache
        first, second = (row.ours, row.theirs) if i % 2 == 0 else (row.theirs, row.ours)
        a, b = _seconds(first), _seconds(second)
        pairs.append((a, b) if i % 2 == 0 else (b, a))
    ratios = [theirs / ours for ours, theirs in pairs]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return Measured(
        name, library, statistics.median(p[0] for p in pairs), statistics.median(p[1] for p in pairs),
        statistics.median(ratios), (low, high), peak_mb(row.ours), peak_mb(row.theirs), difference,
    )  # fmt: skip


def peak_mb(call: Callable[[], Any]) -> float:
    """How far the resident memory of the process rises above its start during the call, sampled every millisecond."""
    import psutil

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


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _difference(ours: Any, theirs: Any) -> float:
    """Largest absolute difference between two arrays, tensors or numbers."""
    import numpy as np

    a, b = (np.asarray(x.detach().cpu() if hasattr(x, "detach") else x, dtype=float) for x in (ours, theirs))
    if a.shape != b.shape:
        raise ValueError(f"the results have shapes {a.shape} and {b.shape}")
    return float(np.abs(a - b).max())
