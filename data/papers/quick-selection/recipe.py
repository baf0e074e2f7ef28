"""The full measurement of notebooks/04-features/03-quick-selection.

- settings.csv: what the pixels' strengths do over 100 epochs (without dropout 50) on the 10,000 MNIST
  training images: with the public code's backward pass, with the dropout mask in it, and without dropout, three seeds;
  the same for 50 epochs with links that stay. One run has three epochs between SET steps. Columns: mean strength of
  four groups of pixels, the number of rare ones (few) among the 50 strongest, the accuracy of trees on those.
- public.csv: the same columns from the public code itself, run on the same images (needs a clone of it).
- selectors.csv: 50 pixels of MNIST and 20 columns of Madelon-like data chosen by every selector, three seeds: accuracy
  of 50 extremely randomised trees, of K-means matched to the classes, processor seconds of the selection.
- tuning.csv: the settings that were tried for the rivals, judged on the last 2,000 training images (on Madelon-like
  data: on another draw), and which was taken.
- width.csv: processor time and peak of allocated bytes against the width, links alone beside the same links laid into
  a dense matrix; random inputs.
- strength.safetensors: the strengths [epochs of "epochs", 784] of the runs that the explorer shows.

    python data/papers/quick-selection/recipe.py                               # everything but public.csv
    python data/papers/quick-selection/recipe.py --part width                  # one part
    python data/papers/quick-selection/recipe.py --part public --clone FOLDER  # of zahraatashgahi/QuickSelection

The functions are the notebook's own method cells. One thread. A run that was stopped goes on where it was (--work).
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
import time
import types
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from nbkit import datasets, papers, runtime
from nbkit.recipes import Work, part_option, run, work_option, write_table, write_tensors

SEEDS, DRAWS = (10, 11, 12), range(6)  # pilots had seeds 100 and 101
PUBLIC_SEEDS = (0, 1, 2)  # of the public code, whose random numbers are others
SETTINGS = {"public backward": {}, "masked backward": {"exact": True}, "dropout 0": {"dropout": 0.0}}
MOMENTS = (0, 1, 2, 5, 9, 10, 20, 30, 50, 70, 100)
JUDGED = (1, 2, 5, 9, 10, 20, 50, 100)  # epochs whose 50 pixels are given to the trees
RARE = 0.005  # a pixel inked in at most one image of 200
EPS, ALL = 13.0, 1e9  # the paper's, and one that asks for every link
WIDTHS = {"h = 1000": [2**i for i in (6, 8, 10, 12, 14)], "h = d": [2**i for i in (8, 10, 12)]}


# --- what a selection is worth


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


def madelon_like(seed: int):
    """X_train [2000, 500], X_test [600, 500], y_train, y_test: columns 0 to 4 decide the class, 5 to 19 mix them."""
    from sklearn.datasets import make_classification

    X, y = make_classification(2600, 500, n_informative=5, n_redundant=15, n_clusters_per_class=16, shuffle=False,
                               random_state=seed)  # fmt: skip
    order = np.random.default_rng(seed).permutation(len(y))  # the rows come sorted by cluster
    X, y = torch.tensor(X[order], dtype=torch.float32), torch.tensor(y[order])
    return X[:2000], X[2000:], y[:2000], y[2000:]


# --- rivals: scores [d], larger is better


def neighbours(X: torch.Tensor, n: int = 5):
    """The graph of each row's nearest rows, with a heat kernel (scipy sparse, symmetric)."""
    from sklearn.neighbors import kneighbors_graph

    graph = kneighbors_graph(X.double().numpy(), n, mode="distance")
    graph = graph.maximum(graph.T)
    graph.data = np.exp(-(graph.data**2) / np.mean(graph.data**2))
    return graph


def laplacian(X: torch.Tensor) -> torch.Tensor:
    """Minus the Laplacian score (He et al. 2005)."""
    graph, X = neighbours(X), X.double().numpy()
    degree = np.asarray(graph.sum(1)).reshape(-1, 1)
    F = X - (degree * X).sum(0) / degree.sum()
    spread = (degree * F**2).sum(0)
    score = 1 - (F * (graph @ F)).sum(0) / np.where(spread > 0, spread, 1)
    return -torch.tensor(np.where(spread > 0, score, np.inf).clip(max=1e6))


def mcfs(X: torch.Tensor, k: int, clusters: int) -> torch.Tensor:
    """Multi-cluster feature selection (Cai et al. 2010): the largest coefficient of a feature in sparse regressions of
    the graph's slowest eigenvectors, k features each."""
    from scipy.sparse import eye
    from scipy.sparse.csgraph import laplacian as normalised
    from scipy.sparse.linalg import eigsh
    from sklearn.linear_model import lars_path

    L, root = normalised(neighbours(X), normed=True, return_diag=True)
    start = np.random.default_rng(0).normal(size=len(root))
    values, vectors = eigsh(2 * eye(len(root)) - L, clusters + 1, which="LA", v0=start)
    slow = (vectors / root[:, None])[:, np.argsort(-values)][:, 1:]
    slow = (slow - slow.mean(0)) / slow.std(0)
    A = X.double().numpy()
    A = A - A.mean(0)
    paths = [lars_path(A, y, method="lar", max_iter=k)[2][:, -1] for y in slow.T]
    return torch.tensor(np.abs(paths).max(0))


def adam(parameters, loss, X: torch.Tensor, *, lr: float, epochs: int, batch: int, g: torch.Generator) -> None:
    """loss(rows, share of the training that is done, g), minimised."""
    optimizer = torch.optim.Adam(parameters, lr=lr)
    for epoch in range(epochs):
        for rows in torch.randperm(len(X), generator=g).split(batch):
            optimizer.zero_grad()
            loss(X[rows], epoch / epochs, g).backward()
            optimizer.step()


def aefs(X: torch.Tensor, seed: int, *, lr: float, alpha: float, h: int = 128, epochs: int = 10) -> torch.Tensor:
    """Autoencoder feature selection (Han et al. 2018): few rows of the first weights, by a group penalty."""
    g, d = torch.Generator().manual_seed(seed), X.shape[1]
    W1, W2 = ((torch.randn(a, b, generator=g) / a**0.5).requires_grad_() for a, b in ((d, h), (h, d)))
    b1, b2 = (torch.zeros(n, requires_grad=True) for n in (h, d))

    def loss(x, done, g):
        error = torch.sigmoid(x @ W1 + b1) @ W2 + b2 - x
        decay = 5e-4 * (W1.square().sum() + W2.square().sum())
        return 0.5 * error.square().sum(1).mean() + alpha * W1.norm(dim=1).sum() + decay

    adam([W1, W2, b1, b2], loss, X, lr=lr, epochs=epochs, batch=100, g=g)
    return W1.detach().norm(dim=1)


def concrete(X: torch.Tensor, k: int, seed: int, *, lr: float, h: int = 320, epochs: int = 50) -> list[int]:
    """Concrete autoencoder (Abid et al. 2019): k soft choices of an input that harden; equal ones once."""
    g, d = torch.Generator().manual_seed(seed), X.shape[1]
    torch.manual_seed(seed)
    logits = (0.01 * torch.randn(k, d, generator=g)).requires_grad_()
    net = torch.nn.Sequential(torch.nn.Linear(k, h), torch.nn.LeakyReLU(0.2), torch.nn.Linear(h, d))

    def loss(x, done, g):
        gumbel = -torch.empty(k, d).exponential_(generator=g).log()
        choice = torch.softmax((logits + gumbel) / (10 * 0.001**done), 1)  # from temperature 10 to 0.01
        return (net(x @ choice.T) - x).square().mean()

    adam([logits, *net.parameters()], loss, X, lr=lr, epochs=epochs, batch=max(1, len(X) // 40), g=g)
    return logits.detach().argmax(1).unique().tolist()


def dense(method, X: torch.Tensor, seed: int, *, h: int, epochs: int, **step) -> torch.Tensor:
    """Node strength of the same autoencoder with every link; its start gives hidden inputs the usual size."""
    smaller = (EPS * (1 / X.shape[1] + 1 / h)) ** 0.5

    class Dense(method.MaskedLinear):
        def __init__(self, n_in, n_out, place, weight):
            super().__init__(n_in, n_out, place, smaller * weight)

    return method.quick_selection(X, h=h, epochs=epochs, seed=seed, eps=ALL, zeta=0, kind=Dense, **step)[1]


# --- ours, and what is kept of a training


def learned(method, work: Work, name: str, X: torch.Tensor, seed: int, epochs: int, **options) -> dict:
    """strength [epochs + 1, d] by epoch, processor seconds, and the last scores of the public code's other rules."""

    def compute() -> dict:
        began = time.process_time()
        layers, strength = method.quick_selection(X, epochs=epochs, seed=seed, **options)
        took = time.process_time() - began
        rules = {rule: score.tolist() for rule, score in other_rules(method, layers).items()}
        return {"strength": strength.tolist(), "seconds": took, "rules": rules}

    return work.once(f"{name}, {epochs} epochs, seed {seed}", compute)


# --- MNIST over the epochs


class Pixels:
    """MNIST as rows, raw and standardised, and what is said of 50 pixels of it."""

    def __init__(self, method):
        data = datasets.load("mnist")
        self.method, self.raw, self.raw_test = method, data.x_train.flatten(1), data.x_test.flatten(1)
        self.y, self.y_test = data.y_train, data.y_test
        self.X, self.X_test = method.standardised(self.raw, self.raw_test)
        self.inked = (self.raw > 0).float().mean(0)

    def rows(self, strength: torch.Tensor, seed: int, moments=MOMENTS, **labels) -> list[dict]:
        """A row an epoch of moments that strength [epochs + 1, 784] holds."""
        on = self.inked
        groups = {"well": on > 0.2, "some": (on > RARE) & (on <= 0.2), "rare": (on > 0) & (on <= RARE)}
        groups["never"] = on == 0
        found = []
        for epoch in [moment for moment in moments if moment < len(strength)]:
            top = self.method.select(strength[epoch], 50)
            means = {name: strength[epoch][group].mean().item() for name, group in groups.items()}
            judged = epoch in JUDGED or "every" in labels
            right = accuracy(top, self.X, self.y, self.X_test, self.y_test, seed) if judged else None
            few = int((on[top] <= RARE).sum())
            found.append({**labels, "seed": seed, "epoch": epoch, **means, "few": few, "accuracy": right})
        return found


def trajectories(method, work: Work) -> tuple[pd.DataFrame, dict[str, torch.Tensor]]:
    pixels = Pixels(method)
    rows, kept = [], {"epochs": torch.tensor(MOMENTS)}

    def learn(name: str, seed: int, epochs: int, **options) -> torch.Tensor:
        return torch.tensor(learned(method, work, name, pixels.X, seed, epochs, **options)["strength"])

    def keep(name: str, strength: torch.Tensor) -> None:
        kept[name] = strength[[moment for moment in MOMENTS if moment < len(strength)]].half()

    for zeta in (0.2, 0):
        for setting, options in SETTINGS.items():
            for seed in SEEDS:
                epochs = 100 if zeta and setting != "dropout 0" else 50
                strength = learn(f"MNIST {setting} zeta {zeta}", seed, epochs, zeta=zeta, **options)
                labels = {"setting": setting, "zeta": zeta}
                rows += work.once(f"rows {setting} {zeta} {seed}", partial(pixels.rows, strength, seed, **labels))
                if seed == SEEDS[0]:
                    keep(setting if zeta else f"{setting}, links stay", strength)
    slow = learn("MNIST masked backward zeta 0.2 every 3", SEEDS[0], 150, exact=True, every=3)
    labels = {"setting": "masked backward", "zeta": 0.2, "every": 3}
    rows += work.once("rows every 3", partial(pixels.rows, slow, SEEDS[0], (30, 90, 150), **labels))
    return pd.DataFrame(rows).fillna({"every": 1}), kept


def public_code(clone: Path, X: np.ndarray, seed: int, epochs: int, dropout: float) -> list[list[float]]:
    """The strengths [epochs + 1, d] at the end of every epoch of the public code, whose files stay as they are.

    What was another five years ago is put in its place: ``np.in1d``, a ``coo_matrix`` that copies (else the gradient
    is written over the weights), and numpy for the compiled product.
    """
    product = types.ModuleType("sparseoperations")

    def at_links(a, delta, rows, cols, out):
        out[:] = (a.T @ delta)[rows, cols] / len(a)

    product.backpropagation_updates_Cython = at_links
    sys.modules["sparseoperations"] = product
    sys.path.insert(0, str(clone / "QuickSelection"))
    np.in1d = lambda a, b: np.isin(a.ravel(), b.ravel())
    import Sparse_DAE
    from other_classes import MSE, Linear, Sigmoid
    from scipy import sparse

    Sparse_DAE.coo_matrix = lambda given, shape=None: sparse.coo_matrix(given, shape, copy=True)
    found = []

    class Watched(Sparse_DAE.Sparse_DAE):
        def watch(self):
            found.append(np.asarray(abs(self.w[1]).sum(1)).ravel().tolist())

        def weightsEvolution_II(self):
            self.watch()
            return super().weightsEvolution_II()

    np.random.seed(seed)
    with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as folder, np.errstate(over="ignore"):
        net = Watched((X.shape[1], 1000, X.shape[1]), (Sigmoid, Linear), epsilon=13)
        net.watch()
        net.fit(X, np.zeros((len(X), 1)), None, None, loss=MSE, epochs=epochs, batch_size=100, learning_rate=0.01,
                momentum=0.9, weight_decay=1e-5, zeta=0.2, dropoutrate=dropout, testing=False,
                save_filename=folder + "/", noise_factor=0.2)  # fmt: skip
        net.watch()
    return found


def public(method, work: Work, clone: Path) -> pd.DataFrame:
    pixels, rows = Pixels(method), []
    (X,) = method.standardised(pixels.raw.double())
    cases = (("public backward", PUBLIC_SEEDS, 100, 0.2), ("dropout 0", PUBLIC_SEEDS[:1], 50, 0.0))
    for setting, seeds, epochs, dropout in cases:
        for seed in seeds:
            compute = partial(public_code, clone, X.numpy(), seed, epochs, dropout)
            strength = torch.tensor(work.once(f"public code {setting} seed {seed}", compute))
            rows += pixels.rows(strength, seed, setting=setting, zeta=0.2)
    return pd.DataFrame(rows)


# --- all selectors


class Bench:
    """One data set, split and standardised, and the selectors on it with the settings that tuning took."""

    def __init__(self, method, name: str, seed: int, *, tuning: bool = False):
        self.method, self.name, self.seed = method, name, seed
        self.k, self.clusters, self.step = (50, 10, {}) if name == "MNIST" else (20, 2, {"tanh": True})
        if name == "MNIST":
            data = datasets.load("mnist")
            parts = [data.x_train.flatten(1), data.x_test.flatten(1), data.y_train, data.y_test]
            if tuning:  # the last training images judge, the test images are not looked at
                parts = [parts[0][:8000], parts[0][8000:], parts[2][:8000], parts[2][8000:]]
        else:
            parts = list(madelon_like(seed))
        self.raw, raw_test, self.y, self.y_test = parts
        self.X, self.X_test = method.standardised(self.raw, raw_test)
        self.forms = {"raw": self.raw, "standardised": self.X}

    def judged(self, columns) -> float:
        return accuracy(columns, self.X, self.y, self.X_test, self.y_test, self.seed)

    def rival(self, selector: str, form: str, options: dict) -> list[int]:
        """The columns that a rival chooses."""
        X, seed = self.forms[form], self.seed
        if selector == "concrete autoencoder":
            return concrete(X, self.k, seed, **options)
        score = {
            "Laplacian score": lambda: laplacian(X),
            "MCFS": lambda: mcfs(X, self.k, self.clusters),
            "AEFS": lambda: aefs(X, seed, **options),
            "dense": lambda: dense(self.method, X, seed, **options, **self.step)[-1],
            "variance": lambda: self.raw.var(0),
        }[selector]()
        return self.method.select(score, self.k).tolist()

    def tried(self, selector: str, form: str, options: dict) -> float:
        return self.judged(self.rival(selector, form, options))

    def row(self, group: str, selector: str, columns, seconds: float = 0.0, draw: int | None = None) -> dict:
        columns = torch.as_tensor(columns)
        clusters = None if group == "other rules" else clustering(columns, self.X, self.y)
        row = {"data": self.name, "group": group, "selector": selector, "seed": self.seed if draw is None else draw,
               "accuracy": self.judged(columns), "clustering": clusters, "seconds": seconds,
               "chosen": len(columns)}  # fmt: skip
        if self.name == "MNIST":
            return {**row, "few": int(((self.raw[:, columns] > 0).float().mean(0) <= RARE).sum())}
        return {**row, "relevant": (columns < 20).float().mean().item()}

    def timed(self, selector: str, form: str, options: dict) -> dict:
        began = time.process_time()
        columns = self.rival(selector, form, options)
        group = "its ablations" if selector == "dense" else "rivals"
        return self.row(group, selector, columns, time.process_time() - began)

    def ours(self, work: Work, name: str, epochs: int, **options) -> list[dict]:
        """A row of node strength, and for the method itself one of each other rule."""
        label, paper = f"{self.name} {name} zeta {options.get('zeta', 0.2)}", name == "public backward" and not options
        found = learned(self.method, work, label, self.X, self.seed, epochs, **self.step, **options)

        def row(group: str, selector: str, score: list[float]) -> dict:
            columns = self.method.select(torch.tensor(score), self.k)
            return self.row(group, f"{selector} {epochs}", columns, found["seconds"])

        if not paper:
            return [row("its ablations", name if options.get("zeta", 1) else "static links", found["strength"][-1])]
        others = [row("other rules", rule, score) for rule, score in found["rules"].items()]
        return [row("this paper", "QuickSelection", found["strength"][-1]), *others]


def other_rules(method, layers) -> dict[str, torch.Tensor]:
    """Scores [d] by the other rules of the public code: the strength it saves (after a last cut), the number of links,
    the same of outputs, and two that count links of the stronger half of the hidden units alone.

    Its two-stage rules of degrees are left out: they look up hidden units by the numbers of inputs.
    """
    first, second = layers
    d, h = first.n_in, first.n_out
    row, hidden, size = first.place % d, first.place // d, first.weight.abs()
    out, back, weight = second.place // h, second.place % h, second.weight.abs()
    strong = torch.zeros(h).index_add(0, hidden, size).argsort(descending=True)[: h // 2]

    def total(index, values):
        return torch.zeros(d).index_add(0, index, values.float())

    return {
        "strength, weakest cut": total(row, size * method.survivors(first.weight, 0.2)),
        "links": total(row, torch.ones_like(size)), "output strength": total(out, weight),
        "output links": total(out, torch.ones_like(weight)),
        "strength, strong half": total(row, size * torch.isin(hidden, strong)),
        "output strength, strong half": total(out, weight * torch.isin(back, strong)),
    }  # fmt: skip


GRID = {
    "Laplacian score": [{}],
    "MCFS": [{}],
    "AEFS": [{"lr": lr, "alpha": alpha} for lr in (3e-4, 1e-3) for alpha in (0.03, 0.1, 0.3, 1.0)],
    "concrete autoencoder": [{"lr": lr} for lr in (1e-2, 3e-2)],
    "dense": [{"h": 100, "lr": lr, "decay": decay, "epochs": epochs} for lr in (0.003, 0.01)
              for decay in (1e-5, 1e-3) for epochs in (1, 3)]
             + [{"h": 1000, "lr": 0.001, "epochs": 3}],
}  # fmt: skip


def tune(method, work: Work) -> pd.DataFrame:
    rows = []
    for name in ("MNIST", "Madelon-like"):
        bench = Bench(method, name, 9, tuning=True)
        for selector, grid in GRID.items():
            for form in ("standardised",) if selector == "dense" else ("standardised", "raw"):
                for options in grid:
                    label = " ".join(f"{key}={value:g}" for key, value in options.items())
                    judge = partial(bench.tried, selector, form, options)
                    found = work.once(f"tune {name} {selector} {form} {label}", judge)
                    rows.append({"data": name, "selector": selector, "form": form, "setting": label, "accuracy": found})
    table = pd.DataFrame(rows)
    best = table.groupby(["data", "selector"])["accuracy"].transform("max")
    taken = (table["accuracy"] == best) & ~table[table["accuracy"] == best].duplicated(["data", "selector"])
    return table.assign(taken=taken.fillna(False))


def selectors(method, work: Work, tuning: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for name in ("MNIST", "Madelon-like"):
        taken = tuning[tuning["taken"] & (tuning["data"] == name)].set_index("selector")
        for seed in SEEDS:
            rows += work.once(f"selectors {name} {seed}", partial(one_bench, method, work, name, seed, taken))
    return pd.DataFrame(rows)


def one_bench(method, work: Work, name: str, seed: int, taken: pd.DataFrame) -> list[dict]:
    bench = Bench(method, name, seed)
    rows = [bench.timed("variance", "raw", {})]
    for selector, row in taken.iterrows():
        pairs = [pair.split("=") for pair in str(row["setting"]).split() if "=" in pair]
        options = {key: int(value) if key in ("h", "epochs") else float(value) for key, value in pairs}
        rows.append(bench.timed(selector, row["form"], options))
    for draw in [d for d in DRAWS if d % len(SEEDS) == SEEDS.index(seed)]:
        columns = np.random.default_rng(draw).choice(bench.X.shape[1], bench.k, replace=False)
        rows.append(bench.row("chance", "random", columns, draw=draw))
    untrained = bench.ours(work, "public backward", 0)[0]
    rows.append({**untrained, "group": "its ablations", "selector": "untrained"})
    for epochs in (10, 100):
        rows += bench.ours(work, "public backward", epochs)
        if name != "MNIST" or epochs == 10:  # settings.csv has the static links of MNIST
            rows += bench.ours(work, "public backward", epochs, zeta=0)
    if name != "MNIST":
        rows += bench.ours(work, "masked backward", 100, exact=True)
    return rows


# --- cost against width


def seconds(job, repeats: int = 2) -> float:
    """Processor seconds of the fastest of several runs."""
    found = []
    for _ in range(repeats):
        began = time.process_time()
        job()
        found.append(time.process_time() - began)
    return min(found)


def allocated(job) -> tuple[int, int]:
    """(peak, largest piece) in bytes that torch's allocator held during job(): exact, the same in every run."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as record:
        job()
    events = sorted(record.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    sizes = torch.tensor([event.nbytes() for event in events if event.name() == "[memory]"])
    return int(sizes.cumsum(0).max()), int(sizes.max())


def one_width(method, kind, d: int, h: int) -> dict:
    g = torch.Generator().manual_seed(0)
    X = torch.randn(300, d, generator=g)
    layers = [method.random_layer(kind, a, b, EPS, X, g) for a, b in ((d, h), (h, d))]
    step = seconds(lambda: method.one_epoch(layers, X, X, g)) / 3
    rewiring = seconds(lambda: [method.evolve(layer, 0.2, g) for layer in layers])
    links = sum(len(layer.place) for layer in layers)
    layers.clear()  # so that the two versions of the network are never held at once
    peak, _ = allocated(lambda: method.quick_selection(X[:100], h=h, epochs=2, kind=kind))
    return {"links": links, "seconds": 100 * step + rewiring, "bytes": peak}


def width(method, work: Work) -> pd.DataFrame:
    """A row a width and kind of layer: seconds an epoch of 10,000 rows, and peak bytes."""
    kinds, rows = {"links": method.SparseLinear, "dense matrix": method.MaskedLinear}, []
    for series, widths in WIDTHS.items():
        for d in widths:
            h = 1000 if series == "h = 1000" else d
            for name, kind in kinds.items():
                found = work.once(f"width {series} {d} {name}", partial(one_width, method, kind, d, h))
                rows.append({"series": series, "kind": name, "d": d, "h": h, **found})
    return pd.DataFrame(rows).assign(processor=runtime.processor(), torch=torch.__version__)


def build(out: Path, part: str, clone: Path | None, work: Path) -> list[Path]:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler that counts bytes writes a log
    runtime.deterministic(seed=0)
    method, work, tables, paths = papers.method("quick-selection"), Work(work), {}, []
    if part in ("all", "settings"):
        tables["settings"], strength = trajectories(method, work)
        paths.append(out / "strength.safetensors")
        write_tensors(paths[-1], strength)
    if part in ("all", "selectors"):
        tables["tuning"] = tune(method, work)
        tables["selectors"] = selectors(method, work, tables["tuning"])
    if part in ("all", "width"):
        tables["width"] = width(method, work)
    if part == "public":
        if clone is None:
            raise SystemExit("public.csv needs a clone of the public code: --clone FOLDER")
        tables["public"] = public(method, work, clone)
    for name, table in tables.items():
        paths.append(out / f"{name}.csv")
        write_table(paths[-1], table, float_format="%.5g")
    return paths


if __name__ == "__main__":
    clone = {"type": Path, "default": None, "help": "a clone of zahraatashgahi/QuickSelection, for --part public"}
    run(build, __doc__, part=part_option("settings", "selectors", "width", "public"), clone=clone,
        work=work_option("quick-selection"))  # fmt: skip
