"""The full measurement of notebooks/04-features/05-graph-instance-selection.

- selections.csv: for four data sets and five seeds, every way to keep 4 % of the training rows: five graphs times seven
  scores of a graph attention network, and rivals. Columns: accuracy on test rows of one nearest neighbour (neighbour)
  and of a random forest (forest) trained on the rows kept, their mean (accuracy), that less the mean of 20 random draws
  (gain); both judges' mean on 1,000 training rows that were left out (left_out), by which "best score" and "best draw"
  are chosen ("strongest rival": of six rules without a graph the best in the mean over seeds); mixed, the share of
  other classes among the ten nearest training rows of the rows kept.
- curves.csv: accuracy of one nearest neighbour when 1 to 16 % are kept, by four rules.
- graphs.csv: share of the ten nearest rows that a graph joins, neighbours a row, accuracy of the network.
- order.safetensors: for two data sets and seed 0, the best 16 % of each class by each score, best first, the classes
  interleaved.

    python data/papers/graph-instance-selection/recipe.py            # goes on where it was stopped (--work)

The functions are the notebook's own method cells. One thread.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.spatial.distance import cdist
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupShuffleSplit, StratifiedShuffleSplit
from sklearn.neighbors import KNeighborsClassifier

from nbkit import datasets, papers, runtime
from nbkit.recipes import Work, run, work_option, write_table, write_tensors

NAMES = ["optdigits", "spambase", "fashion-mnist", "sleep-stages"]
SHOWN = ["optdigits", "sleep-stages"]
SEEDS = range(5)  # pilots had seed 100
SHARE = 0.04
SHARES = [0.01, 0.02, 0.08, 0.16]
DRAWS = 20  # random subsets, as many as there are graphs times scores to choose from


def raw(name: str) -> tuple:
    """X [n, d], y [n] and groups [n] or None: no row twice, stages of sleep as columns."""
    data = datasets.load(name)
    if name == "fashion-mnist":
        return data.x.flatten(1).numpy(), data.y.numpy(), None
    X = data.X
    y = np.asarray(data.y)
    if name != "sleep-stages":
        kept = ~X.duplicated().to_numpy()
        return X[kept].to_numpy(float), y[kept], None
    kept = ((X["epoch"] == 1) & X["previous"].notna() & (y != 6)).to_numpy()  # 6: movement
    X = X[kept]
    before = np.eye(7)[X["previous"].astype(int)]
    numbers = np.c_[X["hours"], X["clock"], np.log1p(X["minutes"]), before]
    return numbers, y[kept], np.asarray(data.groups)[kept]
def prepare(name: str, seed: int, n: int = 6000) -> tuple[np.ndarray, ...]:
    """X_train, X_test, y_train, y_test: 70 to 30 of at most n rows, scaled by the training rows.

    Fashion-MNIST as 32 principal components; nights of sleep-stages stay whole."""
    X, y, groups = raw(name)
    some = np.random.default_rng(seed).permutation(len(X))[:n]
    X, y = X[some], y[some]
    kind = StratifiedShuffleSplit if groups is None else GroupShuffleSplit
    split = kind(1, test_size=0.3, random_state=seed)
    train, test = next(split.split(X, y, None if groups is None else groups[some]))
    spread = X[train].std(0)
    X = (X - X[train].mean(0)) / np.where(spread > 0, spread, 1)
    if name == "fashion-mnist":
        X = PCA(32, random_state=0).fit(X[train]).transform(X)
        X = X / X[train].std()
    return X[train], X[test], y[train], y[test]


# --- rivals: a score [n], or the rows of one class, best first


def spread_out(X: np.ndarray, m: int, seed: int) -> np.ndarray:
    """The row next to each of m centres of K-means, no row twice."""
    centres = KMeans(m, n_init=1, random_state=seed).fit(X).cluster_centers_
    chosen: list[int] = []
    for distance in cdist(centres, X):
        distance[chosen] = np.inf
        chosen.append(int(distance.argmin()))
    return np.array(chosen)


def herded(X: np.ndarray, m: int) -> np.ndarray:
    """Row after row, each brings the mean of the rows kept closest to the mean of all."""
    mean = X.mean(0)
    total = np.zeros_like(mean)
    chosen: list[int] = []
    for count in range(1, m + 1):
        distance = np.linalg.norm((total + X) / count - mean, axis=1)
        distance[chosen] = np.inf
        chosen.append(int(distance.argmin()))
        total += X[chosen[-1]]
    return np.array(chosen)


def condensed(X: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Hart's condensed nearest neighbour: the rows that the ones before them get wrong, in the order they came."""
    order = rng.permutation(len(y))
    store = [order[0]]
    nearest = np.linalg.norm(X - X[order[0]], axis=1)
    label = np.full(len(y), y[order[0]])
    added = True
    while added:
        added = False
        for row in order:
            if label[row] != y[row]:
                store.append(row)
                distance = np.linalg.norm(X - X[row], axis=1)
                closer = distance < nearest
                nearest[closer] = distance[closer]
                label[closer] = y[row]
                added = True
    return np.array(store)


def ranked(rows: np.ndarray, n: int) -> np.ndarray:
    """A score [n] in the order of ``rows``; every row that is not among them has the lowest."""
    score = np.full(n, -1.0)
    score[rows] = np.arange(len(rows), 0, -1)
    return score


def rival_scores(X: np.ndarray, y: np.ndarray, distance: np.ndarray, near: np.ndarray, seed: int) -> dict:
    plain = LogisticRegression(max_iter=300).fit(X, y).predict_proba(X)
    place = np.unique(y, return_inverse=True)[1]
    own = plain[np.arange(len(y)), place]
    other = np.where(np.arange(plain.shape[1]) == place[:, None], -1, plain).max(1)
    means = np.stack([X[place == label].mean(0) for label in range(plain.shape[1])])
    return {
        "condensed": ranked(condensed(X, y, np.random.default_rng(seed)), len(y)),
        "edited": ((y[near[:, :3]] == y[:, None]).sum(1) >= 2).astype(float),
        "plain confidence": own,
        "plain boundary": -np.abs(own - other),
        "dense": -np.take_along_axis(distance, near, axis=1).mean(1),
        "centre": -np.linalg.norm(X - means[place], axis=1),
    }


def by_class(choose, X, y, share: float) -> np.ndarray:
    parts = [np.flatnonzero(y == label) for label in np.unique(y)]
    return np.sort(np.concatenate([rows[choose(X[rows], int(np.ceil(share * len(rows))))] for rows in parts]))


# --- what a selection is worth


def judged(rows, X, y, seed: int, *sets) -> list[list[float]]:
    """Accuracy of one nearest neighbour and of a forest, trained on the rows kept, on each set (X, y)."""
    fitted = [
        model.fit(X[rows], y[rows])
        for model in (KNeighborsClassifier(1), RandomForestClassifier(50, random_state=seed))
    ]
    return [[model.score(*pair) for model in fitted] for pair in sets]


def one_run(name: str, seed: int) -> dict:
    """Rows of the three tables for one data set and seed."""
    method = papers.method("graph-instance-selection")
    X, X_test, y, y_test = prepare(name, seed)
    rng = np.random.default_rng(seed)
    distance = cdist(X, X)
    np.fill_diagonal(distance, np.inf)
    near = np.argsort(distance, axis=1, kind="stable")[:, :10]
    mixed = (y[near] != y[:, None]).mean(1)
    left = rng.permutation(len(y))[:2000]
    table, curves, graphs, order = [], [], [], {}

    def add(builder: str, score: str, choose) -> None:
        rows = choose(SHARE)
        others = left[~np.isin(left, rows)][:1000]
        (neighbour, forest), left_out = judged(rows, X, y, seed, (X_test, y_test), (X[others], y[others]))
        where = {"data": name, "seed": seed, "builder": builder, "score": score}
        found = {"neighbour": neighbour, "forest": forest, "left_out": np.mean(left_out), "mixed": mixed[rows].mean()}
        table.append(where | found)
        curves.append(where | {"share": SHARE, "accuracy": neighbour})
        for share in SHARES:
            rows = choose(share)
            fitted = KNeighborsClassifier(1).fit(X[rows], y[rows])
            curves.append(where | {"share": share, "accuracy": fitted.score(X_test, y_test)})

    for builder, build in method.BUILDERS.items():
        parts = build(X, y, seed)
        model = method.train_gat(X, y, parts, seed=seed)
        for score, value in method.node_scores(model, X, y, parts).items():
            add(builder, score, lambda share, v=value: method.select(v, y, share, np.random.default_rng(seed)))
            if seed == 0 and name in SHOWN and score in method.SCORES:
                best = method.select(value, y, max(SHARES), np.random.default_rng(seed))
                order[f"{name}/{builder}/{score}"] = best[np.argsort(-value[best], kind="stable")].tolist()
        graphs.append({"data": name, "seed": seed, "builder": builder} | described(method, X, y, parts, model, near))
    for score, value in rival_scores(X, y, distance, near, seed).items():
        add("", score, lambda share, v=value: method.select(v, y, share, np.random.default_rng(seed)))
    add("", "k-means", lambda share: by_class(lambda part, m: spread_out(part, m, seed), X, y, share))
    add("", "herding", lambda share: by_class(herded, X, y, share))
    for draw in range(DRAWS):
        lot = np.random.default_rng([seed, draw])
        add("", f"random {draw}", lambda share, g=lot: method.select(np.zeros(len(y)), y, share, g))
    ((neighbour, forest),) = judged(np.arange(len(y)), X, y, seed, (X_test, y_test))
    full = {"data": name, "seed": seed, "builder": "", "score": "all rows", "neighbour": neighbour, "forest": forest}
    table.append(full | {"mixed": mixed.mean()})
    return {"table": table, "curves": curves, "graphs": graphs, "order": order}


def described(method, X, y, parts, model, near) -> dict:
    """What share of all pairs a builder may look at, of the ten nearest rows it joins; the network's accuracy."""
    met = sum(len(rows) for rows, _ in parts)  # a row counts once in each of its graphs
    joined = sum(
        len(np.intersect1d(rows[graph[i].indices], near[row])) for rows, graph in parts for i, row in enumerate(rows)
    )
    x, target, right = torch.tensor(X, dtype=torch.float32), torch.tensor(y), 0
    with torch.no_grad():
        for rows, graph in parts:
            right += (model(x[rows], method.edge_list(graph)[0])[0].argmax(1) == target[rows]).sum().item()
    return {
        "recall": joined / (10 * met),
        "neighbours": sum(graph.nnz for _, graph in parts) / met,
        "accuracy": right / met,
    }


def build(out: Path, work: Path) -> list[Path]:
    runtime.deterministic(seed=0)
    kept = Work(work)
    runs = [kept.once(f"{name} {seed}", lambda n=name, s=seed: one_run(n, s)) for name in NAMES for seed in SEEDS]
    tables = {part: pd.DataFrame([row for one in runs for row in one[part]]) for part in ("table", "curves", "graphs")}
    paths = [out / f"{name}.csv" for name in ("selections", "curves", "graphs")]
    found = summed_up(tables["table"]), drawn(tables["curves"], tables["table"]), tables["graphs"]
    for path, table in zip(paths, found, strict=True):
        write_table(path, table, float_format="%.4g")
    order = {name: interleaved(name, rows) for one in runs for name, rows in one["order"].items()}
    write_tensors(out / "order.safetensors", order)
    return [*paths, out / "order.safetensors"]


def summed_up(table: pd.DataFrame) -> pd.DataFrame:
    """With the mean of both judges; the random draws as their mean and the one that is best on the rows left out; the
    best so chosen of all graphs and scores."""
    table["accuracy"] = table[["neighbour", "forest"]].mean(axis=1)
    lots = table["score"].str.startswith("random")
    scored = table["score"].isin(papers.method("graph-instance-selection").SCORES)
    keys, more = ["data", "seed"], []
    for name, part in (("best draw", table[lots]), ("best score", table[scored])):
        more.append(table.loc[part.groupby(keys)["left_out"].idxmax()].assign(builder="", score=name))
    rivals = table[table["score"].isin(["k-means", "herding", "edited", "condensed", "centre", "dense"])]
    strongest = rivals.groupby(["data", "score"])["accuracy"].mean().groupby(level=0).idxmax()
    of_sets = pd.MultiIndex.from_frame(rivals[["data", "score"]]).isin(strongest)
    more.append(rivals[of_sets].assign(score="strongest rival"))
    mean = table[lots].groupby(keys).mean(numeric_only=True).reset_index().assign(builder="", score="random")
    table = pd.concat([table[~lots], mean, *more]).sort_values([*keys, "builder", "score"])
    chance = table[table["score"] == "random"].set_index(keys)["accuracy"]
    return table.assign(gain=table["accuracy"] - chance.loc[pd.MultiIndex.from_frame(table[keys])].values)


def drawn(curves: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """The lines of the figure, a row a split: one nearest neighbour against the share kept."""
    keys = ["data", "rule", "share", "seed"]
    lots = curves["score"].str.startswith("random")
    shown = {("mini-batch", "attention"): "attention", ("four views", "confidence"): "confidence",
             ("", "k-means"): "K-means"}  # fmt: skip
    rule = [shown.get(pair, "") for pair in zip(curves["builder"], curves["score"], strict=True)]
    curves = curves.assign(rule=np.where(lots, "random", rule))
    full = table[table["score"] == "all rows"].assign(rule="all rows", accuracy=lambda part: part["neighbour"])
    every = [full.assign(share=share) for share in sorted([SHARE, *SHARES])]
    lines = pd.concat([curves[curves["rule"] != ""], *every])
    return lines.groupby(keys)["accuracy"].mean().reset_index()


def sure(gap: pd.Series, kind: str = "") -> dict[str, bool]:
    """By data set: whether the mean over five splits is above 0, by a paired t at 97.5 %."""
    parts = gap.groupby("data")
    return (parts.mean() > 2.776 * parts.std() / 5**0.5).add_suffix(kind).to_dict()


def interleaved(name: str, rows: list[int]) -> torch.Tensor:
    """The rows so that any beginning of them holds the classes in their proportions: by rank over size of the class."""
    y = prepare(name.split("/")[0], seed=0)[2]
    kept = pd.Series(y[rows])
    place = (kept.groupby(kept).cumcount() + 0.5) / np.bincount(y)[kept]
    return torch.tensor(np.array(rows)[np.argsort(place.to_numpy(), kind="stable")], dtype=torch.int16)


if __name__ == "__main__":
    run(build, __doc__, work=work_option("graph-instance-selection"))
