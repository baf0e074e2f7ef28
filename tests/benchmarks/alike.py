"""Rows of what compares representations: dissimilarities of all layers, alignment of Gram matrices."""

from __future__ import annotations

import functools

from tests.benchmarks.rows import Row, row


@functools.cache
def layers() -> dict:
    """What each layer of a small network makes of 300 digits, float64 [300, features]."""
    import torch

    from nbkit import datasets, hooks, models

    net = models.load("small-cnn", dataset="mnist")
    with torch.no_grad(), hooks.record(net, ["relu1", "relu2", "relu3", "relu4", "gap", "head"]) as acts:
        net(datasets.load("mnist").x_test[:300])
    return {name: acts[name].flatten(1).double() for name in acts}


@row("dissimilarities of six layers, 300 pictures", "rsatoolbox", target=1.0)
def _():
    import numpy as np
    import rsatoolbox

    from nbkit.representations import rdm

    def theirs():
        sets = [rsatoolbox.data.Dataset(acts.numpy()) for acts in layers().values()]
        return np.stack([rsatoolbox.rdm.calc_rdm(one, method="correlation").dissimilarities[0] for one in sets])

    return Row(ours=lambda: np.stack([rdm(acts).numpy() for acts in layers().values()]), theirs=theirs)


@row("unbiased alignment of two Gram matrices, 40 examples", "the sum over distinct indices", target=0.1)
def _():
    import itertools
    import math

    from nbkit.representations import alignment

    x, y = (layers()[name][:40] for name in ("relu2", "head"))
    k1, k2 = x @ x.T, y @ y.T

    def loops(a, b):
        a, b = a.tolist(), b.tolist()
        return sum(
            a[i][j] * (b[i][j] + b[q][r] - 2 * b[i][q]) for i, j, q, r in itertools.permutations(range(len(a)), 4)
        )

    def theirs():
        return loops(k1, k2) / math.sqrt(loops(k1, k1) * loops(k2, k2))

    return Row(ours=lambda: alignment(k1, k2, debiased=True), theirs=theirs, repeats=1)
