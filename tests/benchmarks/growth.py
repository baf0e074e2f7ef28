"""How time and memory of the kit's own methods grow with what they are given.

A sweep varies one size, the rest fixed. Time: the exponent of a power law fitted through all sizes (1 is linear, 2
quadratic). Memory: the peak beside the bytes of what the call returns or keeps.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tests.benchmarks.rows import peak_mb, seconds

PICTURE = Path(__file__).with_name("growth.png")


class Sweep(NamedTuple):
    """``build(size)`` makes the call; what it returns is what is kept. ``expected``: what the exponent should be."""

    name: str
    varied: str
    sizes: Sequence[int]
    build: Callable[[int], Callable[[], Any]]
    expected: str


@dataclass
class Grown:
    sweep: Sweep
    seconds: list[float] = field(default_factory=list)
    peak_mb: list[float] = field(default_factory=list)
    kept_mb: list[float] = field(default_factory=list)

    @property
    def exponent(self) -> float:
        return exponent(self.sweep.sizes, self.seconds)


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The slope of log(values) on log(sizes), by least squares."""
    import numpy as np

    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def grow(sweep: Sweep, repeats: int = 3) -> Grown:
    """Measure one sweep; the median of a few calls for each size, after one to warm up."""
    grown = Grown(sweep)
    for size in sweep.sizes:
        call = sweep.build(size)
        kept = _bytes(call())
        grown.seconds.append(statistics.median(seconds(call) for _ in range(repeats)))
        grown.peak_mb.append(peak_mb(call))
        grown.kept_mb.append(kept / 2**20)
    return grown


def _bytes(kept: Any) -> int:
    if hasattr(kept, "nbytes"):
        return int(kept.nbytes)
    if hasattr(kept, "values") and callable(kept.values):
        kept = kept.values()
    return sum(_bytes(part) for part in kept)


def _vit(**config):
    from nbkit import models

    return models.build("tiny-vit", seed=0, **config).eval()


def _record_layers(layers: int):
    import torch

    from nbkit import hooks

    net, x = _vit(depth=16), torch.rand(64, 1, 28, 28)

    def call():
        with torch.no_grad(), hooks.record(net, [f"blocks.{i}.mlp.act" for i in range(layers)]) as kept:
            net(x)
        return dict(kept)

    return call


def _record_width(width: int):
    import torch

    from nbkit import hooks

    net, x = _vit(width=width, hidden=4 * width), torch.rand(16, 1, 28, 28)

    def call():
        with torch.no_grad(), hooks.record(net, "blocks.3.mlp.act") as kept:
            net(x)
        return dict(kept)

    return call


def _neuron_path(images: int = 4, **config):
    import torch

    from nbkit import neurons

    net = _vit(**config)
    x = torch.rand(images, 1, 28, 28, generator=torch.Generator().manual_seed(0))

    def call():
        found = neurons.neuron_path(net, x, 0, layers="blocks.*.mlp.act", steps=10)
        return [found.path, found.scores, found.activations, found.joint]

    return call


def _input_gradients(hidden: int):
    import torch

    from nbkit import neurons

    net, x = _vit(hidden=hidden), torch.rand(1, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    return lambda: neurons.input_gradients(net, x, layer="blocks.3.mlp.act")


def _permutation(rows: int = 1000, columns: int = 64, hidden: int = 64):
    import torch

    from nbkit import importance, models

    net = models.build("lenet-300-100", seed=0, inputs=columns, hidden=(hidden, hidden)).eval()
    chance = torch.Generator().manual_seed(0)
    x, y = torch.randn(rows, columns, generator=chance), torch.randint(10, (rows,), generator=chance)
    return lambda: importance.permutation(net, x, y, n_repeats=3, seed=0).values


def _magnitude_mask(width: int):
    from torch import nn

    from nbkit import sparsity

    net = nn.Sequential(*(nn.Linear(width, width) for _ in range(4)))
    return lambda: sparsity.magnitude_mask(net, 0.9)


SWEEPS = [
    Sweep("record", "layers recorded of 16", (1, 2, 4, 8, 16), _record_layers, "0: the forward outweighs the hooks"),
    Sweep("record", "width of the model", (32, 64, 128, 256), _record_width, "1 to 2: that of the forward"),
    Sweep("neuron_path", "layers (of the model and path)", (3, 6, 12, 24), lambda n: _neuron_path(depth=n),
          "2: passes through half the layers, for each layer"),
    Sweep("neuron_path", "images", (2, 4, 8, 16), lambda n: _neuron_path(n), "1"),
    Sweep("neuron_path", "patches (28 / patch, squared)", (16, 49, 196),
          lambda n: _neuron_path(patch=round(28 / n**0.5)), "1 to 2: that of attention"),
    Sweep("input_gradients", "hidden units", (64, 128, 256, 512, 1024), _input_gradients,
          "0 to 1: backward passes for the 64 numbers below, then one product"),
    Sweep("permutation", "rows", (500, 1000, 2000, 4000), lambda n: _permutation(rows=n), "1"),
    Sweep("permutation", "columns", (32, 64, 128, 256), lambda n: _permutation(columns=n),
          "1: the first layer is updated"),
    Sweep("magnitude_mask", "weights", tuple(4 * w * w for w in (256, 512, 1024, 2048)),
          lambda n: _magnitude_mask(round((n / 4) ** 0.5)), "1: a selection, not a sort"),
]  # fmt: skip


def draw(grown: list[Grown], path: Path = PICTURE) -> None:
    """Time against size, both relative to the smallest; peak memory against what is kept."""
    from matplotlib.figure import Figure

    from nbkit import plots

    figure = Figure(figsize=(11, 5.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    marks = "osD^vP*Xh"
    for i, g in enumerate(grown):
        look = {"marker": marks[i % len(marks)], "color": plots.PALETTE[i % len(plots.PALETTE)], "markersize": 5}
        relative = [s / g.sweep.sizes[0] for s in g.sweep.sizes]
        label = f"{g.sweep.name}, {g.sweep.varied.split(' (')[0]}: {g.exponent:.2f}"
        left.plot(relative, [t / g.seconds[0] for t in g.seconds], label=label, **look)
        right.plot(g.kept_mb, [max(p, 0.05) for p in g.peak_mb], **look)
    left.plot([1, 16], [1, 16], color="#999999", linestyle="--", linewidth=1, label="exponent 1")
    left.set(xscale="log", yscale="log", title="Time: fitted exponents", xlabel="size, relative to the smallest",
             ylabel="time, relative to the smallest")
    left.legend(fontsize=7.5, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
    right.set(xscale="log", yscale="log", xlabel="bytes returned or kept, MB", ylabel="peak memory above the start, MB",
              title="Memory: peak beside what is kept (line: equal)")
    low, high = right.get_xlim()
    right.plot([low, high], [low, high], color="#999999", linestyle="--", linewidth=1)
    figure.savefig(path, dpi=110)
