"""The full measurement of notebooks/04-features/03-quick-selection.

- mnist.csv: features chosen by QuickSelection (10 and 100 epochs) and other selectors on the
  10,000 shipped MNIST training images, and what they are worth: accuracy of 50 extremely randomised trees on the
  2,000 test images, K-means on the training images matched to the classes, and the share of inked pixels. Five seeds
  at k = 50, three seeds at other k and after other numbers of epochs.
- madelon.csv: the same on simulated Madelon-like data, three seeds, and the share of relevant columns.
- width.csv: processor time and exact peak of allocated bytes against the width, links alone beside
  the dense-mask version of the same network; with processor and torch version. Inputs are random numbers.
- strength.safetensors: "DATA/EPS" [4 scores, 11 epochs, 784] for the explorer, and
  "mnist/13/long" [8, 784], the strength after the epochs of "epochs".

    python data/papers/quick-selection/recipe.py                  # everything
    python data/papers/quick-selection/recipe.py --part width     # or mnist, madelon, scores: one file

The functions are the notebook's own method cells. One thread; twelve minutes of processor time.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from nbkit import datasets, papers, runtime
from nbkit.recipes import part_option, run, write_table, write_tensors

SEEDS, FEW, DRAWS = range(5), range(3), range(20)
KS, MOMENTS = (20, 50, 100), (0, 1, 2, 5, 10, 20, 50, 100)
EPS, ALL = 13.0, 1e9  # the paper's, and one that asks for every link
SMALL = 0.017  # start of the dense network's weights for the sums of the sparse one: 0.1 times the root of its density
WIDTHS = {"h = 1000": [2**i for i in range(5, 15)], "h = d": [2**i for i in range(7, 15)]}
MOST_DENSE = 2**24  # weights a layer, beyond which the dense version is not run


def laplacian(X: torch.Tensor, neighbours: int = 5) -> torch.Tensor:
    """[d], larger is better: minus the Laplacian score (He et al. 2005), nearest rows of X [n, d], heat kernel."""
    from sklearn.neighbors import kneighbors_graph

    X = X.double().numpy()
    graph = kneighbors_graph(X, neighbours, mode="distance")
    graph = graph.maximum(graph.T)
    graph.data = np.exp(-(graph.data**2) / np.mean(graph.data**2))
    degree = np.asarray(graph.sum(1)).reshape(-1, 1)
    F = X - (degree * X).sum(0) / degree.sum()
    spread = (degree * F**2).sum(0)
    score = 1 - (F * (graph @ F)).sum(0) / np.where(spread > 0, spread, 1)
    return -torch.tensor(np.where(spread > 0, score, np.inf).clip(max=1e6))


def madelon_like(seed: int):
    """X_train [2000, 500], X_test [600, 500], y_train, y_test: columns 0 to 4 decide the class, 5 to 19 mix them."""
    from sklearn.datasets import make_classification

    X, y = make_classification(2600, 500, n_informative=5, n_redundant=15, n_clusters_per_class=16, shuffle=False,
                               random_state=seed)  # fmt: skip
    order = np.random.default_rng(seed).permutation(len(y))  # the rows come sorted by cluster
    X, y = torch.tensor(X[order], dtype=torch.float32), torch.tensor(y[order])
    return X[:2000], X[2000:], y[:2000], y[2000:]


def accuracy(columns, X, y, X_test, y_test, seed: int) -> float:
    from sklearn.ensemble import ExtraTreesClassifier

    trees = ExtraTreesClassifier(50, random_state=seed).fit(X[:, columns].numpy(), y.numpy())
    return trees.score(X_test[:, columns].numpy(), y_test.numpy())


def clustering(columns, X, y, restarts: int = 10) -> float:
    """Share of rows whose cluster is matched to their class (Hungarian method), mean over restarts of K-means."""
    from scipy.optimize import linear_sum_assignment
    from sklearn.cluster import KMeans
    from sklearn.metrics.cluster import contingency_matrix

    def once(seed: int) -> float:
        found = KMeans(len(y.unique()), n_init=1, random_state=seed).fit_predict(X[:, columns].numpy())
        table = contingency_matrix(y.numpy(), found)
        return table[linear_sum_assignment(-table)].sum() / len(y)

    return float(np.mean([once(seed) for seed in range(restarts)]))


class Bench:
    """One data set, split and standardised, and the rows measured on it."""

    def __init__(self, method, X, X_test, y, y_test):
        self.method, self.raw, self.y, self.y_test = method, X, y, y_test
        self.X, self.X_test = method.standardised(X, X_test)
        self.rows: list[dict] = []

    def add(self, selector: str, seed: int, columns, *, epochs: int = 0, cluster: bool = True) -> None:
        columns = torch.as_tensor(columns)
        self.rows.append({
            "selector": selector, "epochs": epochs, "seed": seed, "k": len(columns),
            "accuracy": accuracy(columns, self.X, self.y, self.X_test, self.y_test, seed),
            "clustering": clustering(columns, self.X, self.y) if cluster else None,
            "inked": (self.raw[:, columns] > 0).float().mean().item(),
            "relevant": (columns < 20).float().mean().item(),
        })  # fmt: skip

    def trained(self, seed: int, epochs: int, X=None, **options) -> torch.Tensor:
        X = self.X if X is None else X
        return self.method.quick_selection(X, epochs=epochs, seed=seed, **options)[1]["strength"]

    def table(self) -> pd.DataFrame:
        return pd.DataFrame(self.rows)


def mnist(method) -> tuple[pd.DataFrame, dict[str, torch.Tensor]]:
    data = datasets.load("mnist")
    bench = Bench(method, data.x_train.flatten(1), data.x_test.flatten(1), data.y_train, data.y_test)
    fixed = {"variance": bench.raw.var(0), "Laplacian score": laplacian(bench.X[::5])}
    dense, kept = {"eps": ALL, "zeta": 0, "kind": method.MaskedLinear}, {}
    for draw in DRAWS:
        bench.add("random", draw, np.random.default_rng(draw).choice(784, 50, replace=False))
    for seed in SEEDS:
        long = bench.trained(seed, 100 if seed in FEW else 10)
        if seed == 0:
            kept = {"mnist/13/long": long[list(MOMENTS)].half(), "epochs": torch.tensor(MOMENTS)}
        runs = {
            ("QuickSelection", 10): long[10], ("untrained sparse", 0): long[0],
            ("static sparse", 10): bench.trained(seed, 10, zeta=0)[10],
        }  # fmt: skip
        runs["dense, small start", 10] = bench.trained(seed, 10, scale=SMALL, **dense)[10]
        slow = bench.trained(seed, 10, **dense) if seed in FEW else None
        runs |= {("dense", 10): slow[10]} if seed in FEW else {}
        runs |= {(name, 0): score for name, score in fixed.items()}
        for (name, epochs), score in runs.items():
            for k in KS if seed in FEW else (50,):
                bench.add(name, seed, method.select(score, k), epochs=epochs)
        for epochs in [e for e in MOMENTS if e not in (0, 10)] if seed in FEW else ():
            top = method.select(long[epochs], 50)
            bench.add("QuickSelection", seed, top, epochs=epochs, cluster=epochs == 100)
        for epochs in (1, 2, 5) if seed in FEW else ():
            bench.add("dense", seed, method.select(slow[epochs], 50), epochs=epochs, cluster=False)
    return bench.table().drop(columns="relevant"), kept


def madelon(method) -> pd.DataFrame:
    tables = []
    for seed in FEW:
        bench = Bench(method, *madelon_like(seed))
        long = bench.trained(seed, 100, output=torch.tanh)
        options = {"zeta": 0, "output": torch.tanh}
        scores = {
            ("variance", 0): bench.raw.var(0), ("Laplacian score", 0): laplacian(bench.X),
            ("untrained sparse", 0): long[0], ("static sparse", 100): bench.trained(seed, 100, **options)[100],
            ("dense, small start", 100): bench.trained(seed, 100, eps=ALL, scale=SMALL, kind=method.MaskedLinear,
                                                       **options)[100],
        }  # fmt: skip
        scores |= {("QuickSelection", epochs): long[epochs] for epochs in MOMENTS[1:]}
        for (name, epochs), score in scores.items():
            bench.add(name, seed, method.select(score, 20), epochs=epochs)
        for draw in DRAWS:
            bench.add("random", draw, np.random.default_rng(draw).choice(500, 20, replace=False), cluster=False)
        tables.append(bench.table().drop(columns="inked").assign(data=seed))
    return pd.concat(tables, ignore_index=True)


def explorer_scores(method) -> dict[str, torch.Tensor]:
    found = {}
    for name in ("mnist", "fashion-mnist"):
        (X,) = method.standardised(datasets.load(name).x_train.flatten(1))
        for eps in (5, 13, 40):
            scores = method.quick_selection(X, eps=float(eps), epochs=10)[1]
            found[f"{name}/{eps}"] = torch.stack(list(scores.values())).half()
    return found


def seconds(job, repeats: int = 3) -> float:
    """Processor seconds of the fastest of several runs."""
    found = []
    for _ in range(repeats):
        began = time.process_time()
        job()
        found.append(time.process_time() - began)
    return min(found)


def one_width(method, kind, d: int, h: int) -> dict:
    g = torch.Generator().manual_seed(0)
    X = torch.randn(300, d, generator=g)
    layers = [method.random_layer(kind, a, b, EPS, X, g) for a, b in ((d, h), (h, d))]
    step = seconds(lambda: method.one_epoch(layers, X, X, g)) / 3
    rewiring = seconds(lambda: [method.evolve(layer, 0.2, g) for layer in layers])
    links = sum(len(layer.links()[0]) for layer in layers)
    layers.clear()  # so that the two versions of the network are never held at once
    peak, largest = method.allocated(lambda: method.quick_selection(X[:100], h=h, epochs=2, kind=kind))
    return {"d": d, "h": h, "links": links, "places": 2 * d * h, "step": step, "rewiring": rewiring,
            "epoch": 100 * step + rewiring, "peak": peak, "largest": largest}  # fmt: skip


def width(method) -> pd.DataFrame:
    rows = []
    for series, widths in WIDTHS.items():
        for d in widths:
            h = 1000 if series == "h = 1000" else d
            for name, kind in {"links": method.SparseLinear, "mask": method.MaskedLinear}.items():
                if name == "links" or d * h <= MOST_DENSE:
                    rows.append({"series": series, "kind": name, **one_width(method, kind, d, h)})
    return pd.DataFrame(rows).assign(processor=runtime.processor(), torch=torch.__version__, threads=1)


def build(out: Path, part: str) -> list[Path]:
    from safetensors.torch import load_file

    runtime.deterministic(seed=0)
    method = papers.method("quick-selection")
    tables, tensors, paths = {}, {}, []
    if part in ("all", "mnist"):
        tables["mnist"], tensors = mnist(method)
    if part in ("all", "madelon"):
        tables["madelon"] = madelon(method)
    if part in ("all", "width"):
        tables["width"] = width(method)
    if part in ("all", "scores"):
        tensors |= explorer_scores(method)
    for name, table in tables.items():
        paths.append(out / f"{name}.csv")
        write_table(paths[-1], table, float_format="%.6g")
    if tensors:
        paths.append(out / "strength.safetensors")
        write_tensors(paths[-1], {**(load_file(paths[-1]) if paths[-1].exists() else {}), **tensors})
    return paths


if __name__ == "__main__":
    run(build, __doc__, part=part_option("mnist", "madelon", "width", "scores"))
