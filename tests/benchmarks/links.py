"""QuickSelection's sparse training beside the same network with a dense mask: time and memory against width."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from tests.benchmarks.growth import exponent
from tests.benchmarks.rows import seconds

WIDTHS = (64, 128, 256, 1024, 4096, 16384)
HIDDEN, EPSILON, ROWS, BATCH = 1000, 13.0, 500, 100


@dataclass(frozen=True)
class Cost:
    """Of one width: milliseconds a training step and peak MB of allocated tensors, links and mask."""

    inputs: int
    ms: tuple[float, float]
    mb: tuple[float, float]

    @property
    def ratios(self) -> tuple[float, float]:
        """Time and memory of the links over those of the mask."""
        return self.ms[0] / self.ms[1], self.mb[0] / self.mb[1]


def cost(inputs: int, repeats: int = 3) -> Cost:
    """One width; both networks have the same links and take the same steps, in turns."""
    import torch

    from nbkit import papers, recipes

    method, recipe = papers.method("quick-selection"), recipes.load("papers/quick-selection/recipe.py")
    x = torch.randn(ROWS, inputs, generator=torch.Generator().manual_seed(0))

    def network(kind):
        chance = torch.Generator().manual_seed(0)
        sizes = ((inputs, HIDDEN), (HIDDEN, inputs))
        return [method.random_layer(kind, a, b, EPSILON, x, chance) for a, b in sizes]

    def train(layers, rows=x):
        method.one_epoch(layers, rows, rows, torch.Generator().manual_seed(1), batch=BATCH)

    kinds = method.SparseLinear, method.MaskedLinear
    # with the making of the network: weights, momentum and indices count as much as what a step needs for a while
    peaks = [recipe.allocated(lambda kind=kind: train(network(kind), x[:BATCH]))[0] / 2**20 for kind in kinds]
    networks = [network(kind) for kind in kinds]
    times = [[seconds(lambda n=n: train(n)) for n in networks] for _ in range(repeats + 1)][1:]
    steps = ROWS / BATCH
    links, mask = (1000 * statistics.median(column) / steps for column in zip(*times, strict=True))
    return Cost(inputs, (links, mask), (peaks[0], peaks[1]))


def summary(costs: list[Cost]) -> str:
    """Where the links begin to win, and how their cost grows with the dense size (inputs times hidden units)."""
    wins = [next((c.inputs for c in costs if all(later.ratios[k] < 1 for later in costs[costs.index(c) :])), None)
            for k in (0, 1)]  # fmt: skip
    wide = [c for c in costs if c.inputs >= 1000]
    time, memory = (
        exponent([c.inputs * HIDDEN for c in wide], [v[0] for v in values])
        for values in ([c.ms for c in wide], [c.mb for c in wide])
    )
    at = ["none of these widths" if width is None else f"{width:,} inputs on" for width in wins]
    return (
        f"Links take less time from {at[0]} and less memory from {at[1]}. From 1,024 inputs up their cost grows with "
        f"the dense size to the power of {time:.2f} (time) and {memory:.2f} (memory), with {HIDDEN:,} hidden units "
        "throughout."
    )
