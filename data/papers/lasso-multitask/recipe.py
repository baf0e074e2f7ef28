"""The full measurement of notebooks/04-features/04-lasso-multitask.

- synthetic.csv.gz: excess risk on the target times 1000, by setting, mix and seed (40), a column a strategy.
- mnist.csv.gz: balanced test error and mean square error of 10 targets of 80 MNIST tasks, three seeds, by setting, a
  column a strategy.
- relevance.csv.gz: of the same runs, the size of nu, how many tasks Lasso buys from, and the share of what each
  strategy buys from tasks that ask for the target's digit.

All strategies with a budget get the same number of source examples, the same queues of them and the same target
examples. Options of a strategy, where it has some, are chosen by five folds of the target's training examples.

    python data/papers/lasso-multitask/recipe.py

The functions that learn and buy are the notebook's own method cells; the data, the rivals and the ways to choose their
options stand here, and the notebook loads them. One thread.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from nbkit import datasets, papers, runtime
from nbkit.errors import UnknownName
from nbkit.recipes import run, seeds_option, write_table

method = papers.method("lasso-multitask")

SEEDS, MNIST_SEEDS = 40, 3  # pilots: 1000 to 1007 and 2000 to 2009 (simulated), 5 and 999 (MNIST)
VARIANTS = {
    "default": {}, "N = 200": {"N": 200}, "N = 3200": {"N": 3200}, "sigma = 0.5": {"sigma": 0.5},
    "sigma = 2": {"sigma": 2.0}, "n_target = 50": {"n_target": 50}, "k = 8": {"k": 8},
}  # fmt: skip
SETTINGS = [(name, mix, given) for name, given in VARIANTS.items() for mix in ("sparse", "dense")] + [
    ("default", "balanced", {}),
    ("N_0 = 10", "sparse", {"N_0": 10}),
    ("N_0 = 10", "dense", {"N_0": 10}),
]  # fmt: skip
MNIST = {"default": {}, "n_target = 40": {"n_target": 40}, "k = 12": {"k": 12}}
STRENGTHS, RIDGES, MANY = (0.01, 0.03, 0.1, 0.3, 0.6), (0.0, 0.01, 0.1, 1.0, 10.0), (1, 2, 4, 8, 16)

MIXES = ("sparse", "dense", "balanced")
KINDS = ("noise", "blur", "rotate", "shear", "scale", "brightness", "stripes", "translate")
WARPS = {
    "rotate": [[0.9397, 0.3420, 0.0], [-0.3420, 0.9397, 0.0]],  # cosine and sine of 20 degrees
    "shear": [[1.0, 0.5, 0.0], [0.0, 1.0, 0.0]],
    "scale": [[1.5, 0.0, 0.0], [0.0, 1.5, 0.0]],
    "translate": [[1.0, 0.0, 0.25], [0.0, 1.0, 0.2]],
}

# all that the variants of MNIST and the simulation with a small stage 0, which is slow to converge, run
FEW = ("uniform", "L2 (squares)", "L2 by |nu|", "Lasso", "nearest k", "random k", "L2, k largest", "same digit",
       "known L1", "known L2")  # fmt: skip


PURCHASES = ["uniform", "random k", "scalar constraint", "L2 by |nu|", "L2 (squares)", "L2, k largest", "L2, tuned",
             "nearest 1", "nearest k", "nearest, tuned"]  # fmt: skip
GROUPS = {
    "same budget": PURCHASES,
    "Lasso's variants": ["no penalty", "Lasso, tuned", "Lasso, 4 rounds"],
    "joined": ["uniform, joined", "Lasso, joined", "nearest k, joined"],
    "told the truth": ["known L2", "known nearest k", "known L1", "same digit"],
    "no source": ["target alone"],
}
SHOWN = dict.fromkeys(["uniform", "L2 (squares)", "L2, k largest", "nearest 1", "nearest k"], "Lasso") | {
    "uniform, joined": "Lasso, joined"
}  # rival -> with whom the notebook's table compares it


def targets() -> list[tuple[str, int]]:
    return [(KINDS[j % 8], j % 10) for j in range(10)]


# --- source tasks, and the simulated ones


class Tasks:
    """Source tasks, each a queue of examples, X[t] [length, d] and y[t] [length]; one buys the first n.

    Raises: ValueError (shapes that part, NaN, a task with one label only)."""

    def __init__(self, X, y):
        self.X = [method.real(f"X[{t}]", one, 2) for t, one in enumerate(X)]
        self.y = [method.real(f"y[{t}]", one, 1) for t, one in enumerate(y)]
        self.length = np.array([len(one) for one in self.y])
        if [(len(one), self.X[0].shape[1]) for one in self.y] != [one.shape for one in self.X]:
            raise ValueError("X[t] and y[t] need the same length, and all tasks one d")
        if constant := [t for t, one in enumerate(self.y) if np.ptp(one) == 0]:
            raise ValueError(f"the labels of task {constant[0]} are all the same")

    def sums(self, n):
        """G [T, d, d] and c [T, d]: X'X and X'y of the first n[t] examples of each task."""
        n = np.asarray(n)
        if n.dtype.kind not in "iu" or n.shape != self.length.shape:
            raise ValueError(f"n holds a whole number for each of {len(self.y)} tasks, not {n}")
        if (n < 0).any() or (n > self.length).any():
            raise ValueError(f"n lies between 0 and {self.length.tolist()}, not {n.tolist()}")
        X = [one[:m] for one, m in zip(self.X, n, strict=True)]
        y = [one[:m] for one, m in zip(self.y, n, strict=True)]
        return np.stack([a.T @ a for a in X]), np.stack([a.T @ b for a, b in zip(X, y, strict=True)])


def simulate(seed, *, d=20, k=3, T=20, sigma=1.0, n_target=400, length=900, mix="sparse"):
    """Linear tasks: Tasks, target X [n_target, d] and y, true B [d, k], W [k, T], w [k].

    mix "sparse": w = 0.9 w_1 + 0.1 w_2. "dense": w is a random sum of all w_t, of length 1.
    "balanced": the w_t repeat k unit vectors, w is their mean direction. Raises: UnknownName."""
    if mix not in MIXES:
        raise UnknownName(f"mix is one of {', '.join(MIXES)}, not {mix!r}")
    g = np.random.default_rng(seed)
    B = np.linalg.qr(g.normal(size=(d, k)))[0]
    W = g.normal(size=(k, T))
    W = np.eye(k)[:, np.arange(T) % k] if mix == "balanced" else W / np.linalg.norm(W, axis=0)
    w = W @ g.normal(size=T)
    w = {"sparse": 0.9 * W[:, 0] + 0.1 * W[:, 1], "balanced": np.ones(k)}.get(mix, w)
    w = w if mix == "sparse" else w / np.linalg.norm(w)
    sources = g.normal(size=(T, length, d))
    noise = sigma * g.normal(size=(T, length))
    tasks = Tasks(sources, np.einsum("tnd,dt->tn", sources, B @ W) + noise)
    X = g.normal(size=(n_target, d))
    return tasks, X, X @ B @ w + sigma * g.normal(size=n_target), B, W, w


def excess(theta, B, w) -> float:
    """Excess risk of the predictor theta [d], X standard normal: |theta - B w|^2."""
    return float(((theta - B @ w) ** 2).sum())


# --- 80 tasks of MNIST


def corrupt(images, kind):
    """Images [n, 1, 28, 28] in [0, 1], corrupted the same way every time. Raises: UnknownName."""
    if kind in WARPS:
        matrix = torch.tensor(WARPS[kind]).expand(len(images), 2, 3)
        grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, align_corners=False)
    if kind == "noise":
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
        return (images + 0.3 * noise).clamp(0, 1)
    if kind == "blur":
        return F.avg_pool2d(F.avg_pool2d(images, 5, 1, 2), 5, 1, 2)
    if kind == "brightness":
        return (images + 0.4).clamp(0, 1)
    if kind == "stripes":
        return torch.where(torch.arange(28) % 4 == 0, 1.0, images)
    raise UnknownName(f"kind is one of {', '.join(KINDS)}, not {kind!r}")


class Digits:
    """80 tasks, a corruption and a digit each, on 24 principal components and a constant.

    pool: training images of the source tasks; own: those of the target. Tests are a third set."""

    def __init__(self, data, d=24):
        order = np.random.default_rng(0).permutation(len(data.x_train))
        self.pool, self.own = order[:-1000], order[-1000:]
        self.y, self.y_test = data.y_train.numpy(), data.y_test.numpy()
        clean = data.x_train[self.pool].flatten(1).double()
        directions = torch.linalg.eigh((clean - clean.mean(0)).T @ (clean - clean.mean(0)))[1]
        self.features, self.features_test = {}, {}
        for kind in KINDS:
            a = corrupt(data.x_train, kind).flatten(1).double() @ directions[:, -d:]
            b = corrupt(data.x_test, kind).flatten(1).double() @ directions[:, -d:]
            mean, sd = a[self.pool].mean(0), a[self.pool].std(0)
            self.features[kind] = F.pad((a - mean) / sd, (0, 1), value=1.0).numpy()
            self.features_test[kind] = F.pad((b - mean) / sd, (0, 1), value=1.0).numpy()

    def queue(self, kind, digit, rows, g):
        """Rows in random order, the digit (+1) and another one (-1) in turn: X [n, 25], y [n]."""
        yes = g.permutation(rows[self.y[rows] == digit])
        no = g.permutation(rows[self.y[rows] != digit])[: len(yes)]
        both = np.stack([yes, no], axis=1).ravel()
        return self.features[kind][both], np.where(self.y[both] == digit, 1.0, -1.0)


def problem(digits, kind, digit, seed, n_target=100):
    """Names of the 70 sources (all other corruptions), their Tasks, the target's X and y."""
    g = np.random.default_rng([seed, KINDS.index(kind), digit])
    names = [(other, number) for other in KINDS if other != kind for number in range(10)]
    queues = [digits.queue(*name, digits.pool, g) for name in names]
    X, y = digits.queue(kind, digit, digits.own, g)
    return names, Tasks(*zip(*queues, strict=True)), X[:n_target], y[:n_target]


def errors(digits, kind, digit, theta):
    """Error rate and mean square error on the test images, mean of the digit's and the others'."""
    score = digits.features_test[kind] @ theta
    sign = np.where(digits.y_test == digit, 1.0, -1.0)
    sides = [sign > 0, sign < 0]
    wrong = np.mean([(score * sign <= 0)[side].mean() for side in sides])
    return float(wrong), float(np.mean([((score - sign) ** 2)[side].mean() for side in sides]))


def pairs(ink, seed, d=16):
    """Pairs of digits of optdigits on d components and a constant: Tasks of the 44 pairs but (3, 8); X, y of that one.

    The target's images are none of the sources'."""
    parts = np.linalg.svd(ink.X - ink.X.mean(), full_matrices=False)[0][:, :d]
    columns = np.hstack([parts * len(parts) ** 0.5, np.ones((len(parts), 1))])
    label = ink.y.to_numpy()
    pool, own = np.split(np.random.default_rng(seed).permutation(len(label)), [3000])

    def pair(rows, a, b):
        rows = rows[np.isin(label[rows], [a, b])]
        return columns[rows], np.where(label[rows] == a, 1.0, -1.0)

    others = [two for two in itertools.combinations(range(10), 2) if two != (3, 8)]
    return Tasks(*zip(*[pair(pool, *two) for two in others], strict=True)), *pair(own, 3, 8)


# --- options of a strategy, chosen on the target's training examples


def ridge(W, w, rho: float):
    """nu [T]: the least squares solution of W nu = w that a ridge makes shorter still; rho = 0: nu2."""
    k = len(w)
    return W.T @ np.linalg.pinv(W @ W.T + rho * np.trace(W @ W.T) / k * np.eye(k), hermitian=True) @ w


def among(W, w, m: int):
    """nu [T]: least squares on the m nearest tasks alone."""
    chosen = np.flatnonzero(method.nearest(W, w, m))
    nu = np.zeros(W.shape[1])
    nu[chosen] = np.linalg.pinv(W[:, chosen]) @ w
    return nu


def by_folds(solve: Callable, options, X, y, B, W, folds: int = 5):
    """The option whose nu, found without a fold, predicts it best by x'BW nu."""

    def wrong(option) -> float:
        total = 0.0
        for fold in range(folds):
            out = np.arange(len(y)) % folds == fold
            w = np.linalg.lstsq(X[~out] @ B, y[~out], rcond=None)[0]
            total += ((y[out] - X[out] @ B @ W @ solve(W, w, option)) ** 2).sum()
        return total

    return min(options, key=wrong)


# --- strategies


def shortest(W, w):
    """The shortest nu as well, but by |nu|, not by squares, as the public code of a follow-up does."""
    return abs(method.minimum_norm(W, w))


def scalar(W, w):
    """|nu| for the shortest nu with sum(W nu - w) = 0: one equation in place of k, as in the follow-up's code."""
    one = W.sum(0)
    return abs(one * w.sum() / (one @ one))


def largest(nu, k: int):
    nu = np.asarray(nu)
    kept = np.argsort(-abs(nu), kind="stable")[:k]
    return np.where(np.isin(np.arange(len(nu)), kept), abs(nu), 0)


def strategies(X, y, learned, g) -> dict[str, tuple[Callable, dict]]:
    """Name -> (rule, what else active() is told)."""
    B, W, _ = learned
    k = W.shape[0]
    strength = by_folds(method.lasso, STRENGTHS, X, y, B, W)
    rho = by_folds(ridge, RIDGES, X, y, B, W)
    many = by_folds(among, MANY, X, y, B, W)
    drawn = np.isin(np.arange(W.shape[1]), g.permutation(W.shape[1])[:k]).astype(float)
    plain = {
        "uniform": method.uniform,
        "L2 (squares)": method.squares,
        "L2 by |nu|": shortest,
        "Lasso": method.sparse,
        "no penalty": lambda W, w: abs(method.smallest_sum(W, w)),
        "scalar constraint": scalar,
        "nearest 1": lambda W, w: method.nearest(W, w, 1),
        "nearest k": method.nearest,
        "random k": lambda W, w: drawn,
        "L2, k largest": lambda W, w: largest(method.minimum_norm(W, w), k),
        "Lasso, tuned": lambda W, w: method.sparse(W, w, strength),
        "L2, tuned": lambda W, w: ridge(W, w, rho) ** 2,
        "nearest, tuned": lambda W, w: method.nearest(W, w, many),
    }
    found = {name: (rule, {}) for name, rule in plain.items()}
    for name in ("uniform", "Lasso", "nearest k"):
        found[f"{name}, joined"] = (plain[name], {"join": True})
    return found | {"Lasso, 4 rounds": (method.sparse, {"rounds": 4})}


def alone(X, y):
    """theta [d] from the target's examples alone: ridge, its strength by leaving one out."""
    from sklearn.linear_model import RidgeCV

    return RidgeCV(np.logspace(-2, 3, 16), fit_intercept=False).fit(X, y).coef_


def pooled(tasks, n, X, y):
    """theta [d]: one ridge regression of all source examples; its strength and scale from the target's examples."""
    G, c = (part.sum(0) for part in tasks.sums(n))
    found = []
    for rho in np.logspace(-4, 1, 6):
        theta = np.linalg.solve(G + rho * np.trace(G) / len(G) * np.eye(len(G)), c)
        theta = theta * (X @ theta @ y) / ((X @ theta) @ (X @ theta))
        found.append((((y - X @ theta) ** 2).sum(), rho, theta))
    return min(found)[2]


def baselines(tasks, n, N, X, y, learned) -> dict[str, np.ndarray]:
    evenly = n + method.allocate(np.ones(len(n)), N, tasks.length - n)
    return {
        "no purchase": learned[0] @ learned[2],
        "target alone": alone(X, y),
        "pooled": pooled(tasks, evenly, X, y),
    }


# --- comparing


def gap(runs, rival, ours="Lasso") -> tuple[float, float]:
    """Mean of rival less ours, paired by row, and the half width of its 95 % interval (t)."""
    from scipy import stats

    apart = (runs[rival] - runs[ours]).dropna()
    return apart.mean(), stats.t.ppf(0.975, len(apart) - 1) * apart.sem()


def better(groups, rivals, ours="Lasso") -> dict[str, bool]:
    """Case -> whether the interval of every rival less ours lies above 0; groups: (names of the case, runs)."""
    gaps = {", ".join(case): [gap(runs, rival, ours) for rival in rivals] for case, runs in groups}
    return {case: all(bool(mean > half) for mean, half in some) for case, some in gaps.items()}


def forest(runs, panel: str, times: float, unit: str):
    """Each strategy less Lasso, mean and ``times`` standard errors, a panel each value of the index level ``panel``."""
    import seaborn as sns

    from nbkit import plots

    group = {name: what for what, names in GROUPS.items() for name in names}
    some = [name for name in group if name in runs and runs[name].notna().all()]
    apart = runs[some].sub(runs["Lasso"], axis=0).melt(ignore_index=False, var_name="strategy").reset_index()
    apart["group"] = apart["strategy"].map(group)
    grid = sns.catplot(
        apart, x="value", y="strategy", hue="group", palette=plots.colours(GROUPS), col=panel, kind="point",
        linestyle="none", errorbar=("se", times), capsize=0.3, markersize=5, height=4.6 if len(some) > 10 else 3.6,
        aspect=0.95,
    )  # fmt: skip
    grid.refline(x=0).set(xlabel=f"{unit}, less that of Lasso", ylabel="")
    return grid


def plane(W, w, weights: dict[str, np.ndarray]):
    """Heads W [2, T] with the polygon that they and their negatives span, the target w, and shares of a budget."""
    import matplotlib.pyplot as plt
    from scipy.spatial import ConvexHull

    from nbkit import plots

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), width_ratios=[1, 1.4], layout="constrained")
    corners = np.hstack([W, -W]).T
    left.fill(*corners[ConvexHull(corners).vertices].T, color="0.9")
    for t, head in enumerate(W.T):
        left.plot(*zip((0, 0), head, strict=True), color="0.35")
        left.annotate(t, head + 0.22 * head / np.linalg.norm(head), ha="center", va="center")
    left.plot(*zip((0, 0), w, strict=True), color=plots.PALETTE[1], linewidth=2.5)
    left.annotate("w", w + 0.25 * w / np.linalg.norm(w), ha="center", va="center", color=plots.PALETTE[1])
    left.set(aspect="equal", xlabel="first entry of the head", ylabel="second entry", title="sources, target w")
    left.margins(0.12)
    shares = pd.DataFrame({name: weight / weight.sum() for name, weight in weights.items()})
    shares.plot.bar(ax=right, color=plots.PALETTE[2:4], rot=0, width=0.8)
    right.set(xlabel="source task", ylabel="share of the budget")
    return right


def maps(figure, bought: dict[str, pd.DataFrame]) -> None:
    """Title -> examples bought, a row a corruption and a column a digit: heat maps side by side on one scale."""
    import seaborn as sns

    axes = figure.subplots(1, len(bought), sharey=True, squeeze=False)[0]
    for ax, (title, counts) in zip(axes, bought.items(), strict=True):
        sns.heatmap(counts, ax=ax, cmap="viridis", vmin=0, vmax=800, cbar_kws={"label": "examples"})
        ax.set(title=title, xlabel="digit of the source", ylabel="", facecolor="0.85")


# --- the two studies


def simulated(name, mix, seed, *, N=800, N_0=100, k=3, **given) -> dict:
    tasks, X, y, B, W, w = simulate(seed, mix=mix, k=k, length=N_0 + N, **given)
    n = np.full(len(tasks.y), N_0)
    learned = method.learn(tasks, n, X, y, k)
    plans = strategies(X, y, learned, np.random.default_rng([seed, 1]))
    truth = {"known": (W, w)}
    plans |= {
        "known L2": (method.squares, truth),
        "known L1": (lambda W, w: abs(method.smallest_sum(W, w)), truth),
        "known nearest k": (method.nearest, truth),
    }
    if N_0 < len(B):
        plans = {name: plan for name, plan in plans.items() if name in FEW}
    found = {}
    for plan, (rule, options) in plans.items():
        bought, B_hat, _, w_hat = method.active(tasks, X, y, k, n, N, rule, learned=learned, **options)
        assert bought.sum() == len(n) * N_0 + N
        found[plan] = B_hat @ w_hat
    found |= baselines(tasks, n, N, X, y, learned)
    found["true B"] = B @ np.linalg.lstsq(X @ B, y, rcond=None)[0]
    risks = {plan: 1000 * excess(theta, B, w) for plan, theta in found.items()}
    return {"setting": name, "mix": mix, "seed": seed} | {plan: float(f"{r:.3g}") for plan, r in risks.items()}


def real(digits, name, kind, digit, seed, *, N=4000, N_0=64, k=8, n_target=100) -> tuple[list[dict], dict]:
    names, tasks, X, y = problem(digits, kind, digit, seed, n_target)
    n = np.full(len(names), N_0)
    learned = method.learn(tasks, n, X, y, k)
    plans = strategies(X, y, learned, np.random.default_rng([seed, digit, 1]))
    same = np.array([number == digit for _, number in names])
    plans["same digit"] = (lambda W, w: same.astype(float), {})
    if name != "default":
        plans = {plan: given for plan, given in plans.items() if plan in FEW}
    found, share = {}, {}
    for plan, (rule, options) in plans.items():
        bought, B_hat, _, w_hat = method.active(
            tasks, X, y, k, n, N, rule, learned=learned, restart=False, **options
        )
        assert bought.sum() == len(n) * N_0 + N
        found[plan] = B_hat @ w_hat
        share[plan] = (bought - n)[same].sum() / N
    found |= baselines(tasks, n, N, X, y, learned)
    who = {"setting": name, "kind": kind, "digit": digit, "seed": seed}
    both = {plan: errors(digits, kind, digit, theta) for plan, theta in found.items()}
    rows = [who | {"measure": measure} | {plan: round(pair[i], digits_kept) for plan, pair in both.items()}
            for i, (measure, digits_kept) in enumerate((("error", 4), ("square", 4)))]  # fmt: skip
    _, W, w = learned
    sizes = {
        "nu2 sum": abs(method.minimum_norm(W, w)).sum(),
        "nu1 sum": abs(method.smallest_sum(W, w)).sum(),
        "Lasso tasks": (method.sparse(W, w) > 0).sum(),
    }
    shares = {plan: share[plan] for plan in ("L2 (squares)", "L2 by |nu|", "Lasso", "nearest k")}
    return rows, who | {what: round(float(value), 3) for what, value in (sizes | shares).items()}


def build(out: Path, seeds: int) -> list[Path]:
    runtime.deterministic(seed=0)
    table = [simulated(*setting[:2], seed, **setting[2]) for setting in SETTINGS for seed in range(seeds)]
    write_table(out / "synthetic.csv.gz", pd.DataFrame(table))
    print("simulated", flush=True)
    digits = Digits(datasets.load("mnist"))
    rows, mixes = [], []
    for name, given in MNIST.items():
        for kind, digit in targets():
            for seed in range(min(seeds, MNIST_SEEDS)):
                some, one = real(digits, name, kind, digit, seed, **given)
                rows += some
                mixes.append(one)
        print(name, flush=True)
    write_table(out / "mnist.csv.gz", pd.DataFrame(rows))
    write_table(out / "relevance.csv.gz", pd.DataFrame(mixes))
    return [out / f"{name}.csv.gz" for name in ("synthetic", "mnist", "relevance")]


if __name__ == "__main__":
    run(build, __doc__, seeds=seeds_option(SEEDS))
