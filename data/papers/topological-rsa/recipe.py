"""All tables of this folder: what notebooks/09-representations/01-topological-rsa measures beforehand.

Ten small networks trained on MNIST from ten seeds, six layers, twenty disjoint sets of 60 test digits (six of each
class): how often the layer is told from the other nine networks' dissimilarities, by eleven statistics, without noise,
with noise on the activations and with noise on the dissimilarities (sets.csv, the mean over networks and layers;
networks.csv, over sets and layers); distances within a layer and across layers (spread.csv); the same accuracy for 66
pairs of thresholds (map.csv), and with other dissimilarities, fewer layers or a single network to learn from
(variants.csv); which of seven people a recording is of (people.csv). About 2 minutes on one core; a run
that was stopped goes on where it was (delete the folder --work for a fresh start). The functions are the notebook's
method cells.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import rankdata

from nbkit.recipes import Work, run, work_option, write_table

LAYERS = ("relu1", "relu2", "relu3", "relu4", "gap", "head")
NETWORKS = 10
SETS = tuple(range(4, 24))  # 0 to 3 were looked at while the rules were written
MAP_SETS = tuple(range(4, 9))
CASES = [
    ("none", 0.0),
    *(("activations", s) for s in (0.5, 1.0, 2.0, 4.0)),
    *(("RDMs", s) for s in (0.3, 1.0)),
]
MAP_CASES = [("none", 0.0), ("activations", 2.0), ("RDMs", 1.0)]
VARIANTS = ("euclidean", "cosine", "four layers", "one network")
VARIANT_SIZES = (0.0, 2.0, 4.0)  # of noise on the activations
FAMILY = {
    "ranked": (0.0, 1.0),
    "geometry": (0.05, 0.95),
    "topology": (0.45, 0.55),
    "binary": (0.5, 0.5),
    "local": (0.0, 0.2),
    "global": (0.8, 1.0),
}
PLAIN = {  # of dissimilarities as they are
    "raw": lambda rdms: rdms,
    "mean only": lambda rdms: rdms.mean(-1, keepdims=True),
    "scaled": lambda rdms: the_method().scaled(rdms),
    "standardised": lambda rdms: the_method().standardised(rdms),
}
STATISTICS = (*PLAIN, *FAMILY, "geodesic")
VARIED = ("raw", "mean only", "standardised", "ranked", "topology")
TENTHS = [round(t / 10, 1) for t in range(11)]
FRAMES = (60, 120, 240)
DRAWS = 20


@functools.cache
def the_method():
    from nbkit import papers

    return papers.method("topological-rsa")


@functools.cache
def digits():
    from nbkit import datasets

    return datasets.load("mnist")


@functools.cache
def networks() -> list:
    from nbkit import models

    return [models.load("small-cnn", dataset="mnist", seed=seed) for seed in range(NETWORKS)]


def stimuli(number: int) -> torch.Tensor:
    """Set ``number`` of 33: 60 test images, six of each class, class by class; the sets share no image."""
    data = digits()
    places = [(data.y_test == c).nonzero()[6 * number : 6 * number + 6, 0] for c in range(10)]
    return data.x_test[torch.cat(places)]


def measured(number: int, kind: str, size: float, metric: str = "correlation") -> np.ndarray:
    """The dissimilarities of a set, [networks, layers, 1770]; noise of ``size`` standard deviations."""
    method, x = the_method(), stimuli(number)
    generator = torch.Generator().manual_seed(number)
    noise = size if kind == "activations" else 0.0
    found = np.stack([method.layer_rdms(net, x, LAYERS, noise, generator, metric) for net in networks()])
    if kind == "RDMs":
        drawn = np.random.default_rng(number).standard_normal(found.shape)
        found = (found + size * found.std() * drawn).clip(0)
    return found


def statistics(rdms: np.ndarray, names: Iterable[str] = STATISTICS) -> Iterator[tuple[str, np.ndarray]]:
    """Each statistic's name and the vectors it makes of dissimilarities [..., pairs]."""
    method = the_method()
    ranks = method.scaled(rankdata(rdms, axis=-1))  # once for all pairs of thresholds
    for name in names:
        if name in FAMILY:
            yield name, method.geotopological(ranks, *FAMILY[name], ranked=False)
        elif name == "geodesic":
            paths = method.geodesic(method.geotopological(ranks, 0.0, 0.5, ranked=False))
            # not scaled: under heavy noise an RDM clipped at 0 has paths of length 0 between all, which tie
            yield name, rankdata(paths, axis=-1) / paths.shape[-1]
        else:
            yield name, PLAIN[name](rdms)


def within_across(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each network, [instances]: mean distance to its own layers elsewhere, over that to the other layers.

    And how often the own layer is the closer, of all pairs of an own and another layer elsewhere.
    """
    n, labels = vectors.shape[:2]
    flat = vectors.reshape(n * labels, -1)
    square = (flat**2).sum(1)
    away = np.sqrt((square[:, None] + square - 2 * flat @ flat.T).clip(0)).reshape(n, labels, n, labels)
    same = np.eye(labels, dtype=bool)
    ratios, closer = [], []
    for k in range(n):
        other = np.delete(away[k], k, axis=1).transpose(0, 2, 1)  # [own label, label, other instances]
        ratios.append(other[same].mean() / other[~same].mean())
        wins = other[same][:, :, None] < other[~same].reshape(labels, 1, -1)
        closer.append(wins.mean())
    return np.array(ratios), np.array(closer)


def of_a_set(number: int, kind: str, size: float) -> tuple[list[dict], list[dict]]:
    rows, ratios = [], []
    for name, vectors in statistics(measured(number, kind, size)):
        right = the_method().right(vectors)
        where = {"noise": kind, "size": size, "statistic": name, "set": number}
        rows += [{**where, "network": k, "accuracy": r} for k, r in enumerate(right.mean(1).tolist())]
        if kind == "none" and vectors.shape[-1] > 1:
            both = zip(*(found.tolist() for found in within_across(vectors)), strict=True)
            ratios += [{**where, "network": k, "ratio": r, "closer": c} for k, (r, c) in enumerate(both)]
    return rows, ratios


def family(lower: float, upper: float) -> str:
    """Which of the paper's families a pair of thresholds belongs to, as the public code draws the lines."""
    lower, upper = round(10 * lower), round(10 * upper)
    if lower + upper <= 4:
        return "local"
    if lower + upper >= 16:
        return "global"
    if upper - lower >= 8:
        return "geometry"
    return "topology" if lower >= 4 and upper <= 6 else "intermediate"


def map_of(number: int, kind: str, size: float) -> list[dict]:
    """Accuracy of every pair of thresholds in tenths."""
    method = the_method()
    ranks = method.scaled(rankdata(measured(number, kind, size), axis=-1))
    where = {"noise": kind, "size": size, "set": number}
    return [
        {**where, "family": family(lower, upper), "lower": lower, "upper": upper}
        | {"accuracy": float(method.right(method.geotopological(ranks, lower, upper, ranked=False)).mean())}
        for lower, upper in itertools.combinations_with_replacement(TENTHS, 2)
    ]


def varied(number: int, variant: str, size: float) -> list[dict]:
    """Accuracies of five statistics where one thing differs; for "one network", of five pairs of networks."""
    rdms = measured(
        number, "activations", size, variant if variant in ("euclidean", "cosine") else "correlation"
    )
    if variant == "four layers":
        rdms = rdms[:, :4]
    groups = rdms.reshape(5, 2, *rdms.shape[1:]) if variant == "one network" else rdms[None]
    where = {"variant": variant, "size": size, "set": number}
    made = [
        {name: the_method().right(vectors).mean(1) for name, vectors in statistics(group, VARIED)}
        for group in groups
    ]
    rows = []
    for name in VARIED:
        right = [shares[name] for shares in made]
        shares = np.mean(right, axis=1) if len(groups) > 1 else right[0]
        rows += [
            {**where, "statistic": name, "network": k, "accuracy": float(a)} for k, a in enumerate(shares)
        ]
    return rows


def windows(frames: int, draw: int) -> np.ndarray:
    """Dissimilarities of the regions in one window of each half of the scan, [2, people, pairs]."""
    from nbkit import datasets
    from nbkit.representations import rdm

    series = datasets.load("rest-fmri").series
    half = series.shape[-1] // 2
    rng = np.random.default_rng([frames, draw])
    starts = [int(rng.integers(half - frames + 1)) + part * half for part in (0, 1)]
    return np.stack([[rdm(one[:, s : s + frames]).numpy() for one in series] for s in starts])


def people(frames: int, draw: int) -> list[dict]:
    """Who is it: the second half's nearest person in the first half."""
    rows = []
    for name, (first, second) in statistics(windows(frames, draw)):
        away = ((second[:, None] - first[None]) ** 2).sum(-1)
        right = away.argmin(1) == np.arange(len(second))
        where = {"frames": frames, "draw": draw, "statistic": name}
        rows += [{**where, "person": k, "right": int(r)} for k, r in enumerate(right)]
    return rows


def averaged(rows: list[dict], value: str | list[str], *by: str) -> pd.DataFrame:
    """The mean of a column, or of several, for each combination of others, in the order of first appearance."""
    table = pd.DataFrame(rows).groupby(list(by), sort=False, as_index=False)[value].mean()
    return table.round(4)


def build(out: Path, work: Path) -> list[Path]:
    from nbkit import runtime

    runtime.deterministic(seed=0)
    kept = Work(work)
    found, ratios, maps, varieties, brains = [], [], [], [], []
    for (kind, size), number in itertools.product(CASES, SETS):
        rows, more = kept.once(f"set-{kind}-{size}-{number}", functools.partial(of_a_set, number, kind, size))
        found += rows
        ratios += more
    for (kind, size), number in itertools.product(MAP_CASES, MAP_SETS):
        maps += kept.once(f"map-{kind}-{size}-{number}", functools.partial(map_of, number, kind, size))
    for variant, size, number in itertools.product(VARIANTS, VARIANT_SIZES, SETS):
        part = functools.partial(varied, number, variant, size)
        varieties += kept.once(f"variant-{variant}-{size}-{number}", part)
    for frames, draw in itertools.product(FRAMES, range(DRAWS)):
        brains += kept.once(f"people-{frames}-{draw}", functools.partial(people, frames, draw))
    tables = {
        "sets": averaged(found, "accuracy", "noise", "size", "statistic", "set"),
        "networks": averaged(found, "accuracy", "noise", "size", "statistic", "network"),
        "spread": averaged(ratios, ["ratio", "closer"], "statistic", "network"),
        "map": averaged(maps, "accuracy", "noise", "size", "family", "lower", "upper"),
        "variants": averaged(varieties, "accuracy", "variant", "size", "statistic", "network"),
        "people": averaged(brains, "right", "frames", "statistic", "person"),
    }
    for name, table in tables.items():
        write_table(out / f"{name}.csv", table)
    return [out / f"{name}.csv" for name in tables]


if __name__ == "__main__":
    run(build, __doc__, work=work_option("topological-rsa"))
