"""The full measurement of notebooks/05-data/01-data-diet.

Two networks of the kit, Fashion-MNIST: the kit's 10,000 training images; accuracy on all 10,000 test images of the
Debian package (``accuracy``) and on the 2,000 of them that the kit ships (``accuracy_2000``).

- results.csv: retrainings, a row a seed: network, selector (arm), share kept, share skipped at the top, steps, learning
  rate, whether the labels were noisy.
- flips.csv: area under the ROC curve for "the label was changed", by network and detector: the mean of three runs,
  and one run.
- agreement.csv: Spearman correlations between scores: all examples, and the mean within classes.
- runs.csv: Spearman correlation of the mean EL2N of R runs with the mean of five other runs.
- scores.safetensors: mean scores over the runs [10000] by "network, score, epoch"; float16 for EL2N at epoch 5 (also of
  run 0 alone, and with wrong labels), else the root of the score on 256 levels from 0 to its largest.

    python data/papers/data-diet/recipe.py

The functions are the notebook's own method cells. Runs that score have seeds 0 to 9 (the convolutional network: 0 to
4; noisy labels: 0 to 2), retrainings 100 to 104; pilots, which set the learning rate and the epoch on 2,000 training
images held back, had 900 to 902. One thread. A run that was stopped goes on where it was (--work).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from nbkit import datasets, forward, models, papers, recipes, runtime, training
from nbkit.recipes import Work, run, work_option, write_table, write_tensors

MLP, CONV = "lenet-300-100", "lenet-conv"
EPOCHS, EPOCH = {MLP: (0, 1, 2, 5, 10), CONV: (0, 1, 2, 5)}, 5
RUNS = {MLP: range(10), CONV: range(5)}
SEEDS = range(100, 105)
NOISE_SEED, CHANGED = 7, 1 / 9  # a permuted share of 1/9 changes about a tenth of the labels


class Forgetting:
    """How often each of n examples was right at one visit and wrong at its next."""

    def __init__(self, n: int):
        self.before = torch.zeros(n, dtype=torch.bool)
        self.ever = torch.zeros(n, dtype=torch.bool)
        self.events = torch.zeros(n)

    def visit(self, seen: tuple[torch.Tensor, torch.Tensor]) -> None:
        rows, right = seen
        self.events[rows] += (self.before[rows] & ~right).float()
        self.before[rows] = right
        self.ever[rows] |= right

    def score(self, never: float = torch.inf) -> torch.Tensor:
        """[n]: the events; ``never`` where an example was right at no visit."""
        return self.events.masked_fill(~self.ever, never)

class Bench:
    """The images, and every score of them as [10000], larger is kept first."""

    def __init__(self, method, work: Work):
        self.method, self.work, self.means = method, work, {}
        data = datasets.load("fashion-mnist")
        self.x, self.y = data.x_train, data.y_train
        _, _, x, y = recipes.load("sets/fashion_mnist.py").full()
        self.test = torch.tensor(x).float()[:, None] / 255, torch.tensor(y).long()
        self.shipped = torch.tensor(recipes.stratified(y, 200))
        self.noisy, self.changed = method.permute_labels(self.y, CHANGED, NOISE_SEED)

    # --- scores

    def measured(self, net: str, seed: int, noisy: bool) -> dict[str, list]:
        """Scores of one run: {name: [E][N]}, GraNd at epochs 0 and 5 only, forgetting at the end only."""
        y = self.noisy if noisy else self.y
        epochs = (EPOCH,) if noisy else EPOCHS[net]
        forgetting, found, reached = Forgetting(len(y)), {}, iter(epochs)

        def score(model, x, y):
            epoch = next(reached)
            with forward.evaluating(model), torch.no_grad():
                logits = model(x)
            errors = self.method.errors(logits, y)
            right = F.one_hot(y, 10).bool()
            found[f"EL2N, {epoch}"] = self.method.el2n(logits, y)
            found[f"loss, {epoch}"] = F.cross_entropy(logits, y, reduction="none")
            p = errors + right
            found[f"margin, {epoch}"] = p.masked_fill(right, -1).max(1).values - p[right]
            if epoch in (0, EPOCH) and net == MLP and not noisy:
                found[f"GraNd, {epoch}"] = by_layers(model, x, y)
            if epoch == 0 and net == CONV:
                found[f"GraNd, {epoch}"] = training.gradient_norms(model, x, y)
            return y

        self.method.early_scores(net, self.x, y, runs=[seed], epochs=epochs, score=score, visited=forgetting.visit)
        found["forgetting"] = forgetting.score(never=max(epochs))
        return found

    def run_scores(self, net: str, noisy: bool = False) -> dict[str, torch.Tensor]:
        """{name: [R, N]}, kept in files of the work folder."""
        every = []
        for seed in RUNS[net][: 3 if noisy else None]:
            path = self.work.folder / f"scores-{net}-{seed}-{noisy}.pt"
            if not path.is_file():
                torch.save(self.measured(net, seed, noisy), path.with_suffix(".part"))
                path.with_suffix(".part").rename(path)
                print(path.name, flush=True)
            every.append(torch.load(path))
        return {name: torch.stack([one[name] for one in every]) for name in every[0]}

    def scores(self, net: str, noisy: bool = False) -> dict[str, torch.Tensor]:
        """{name: mean over runs [N]}, and the scores that train nothing."""
        if (net, noisy) not in self.means:
            self.means[net, noisy] = self.mean_scores(net, noisy)
        return self.means[net, noisy]

    def mean_scores(self, net: str, noisy: bool) -> dict[str, torch.Tensor]:
        found = {name: values.mean(0) for name, values in self.run_scores(net, noisy).items()}
        found[f"EL2N, {EPOCH}"] = found[f"EL2N, {EPOCH}"].half().float()  # as it is stored
        y = self.noisy if noisy else self.y
        found["input norm"] = self.x.flatten(1).norm(dim=1)
        found["centroid"] = centroid(self.x.flatten(1), y)
        found["neighbours"] = neighbours(self.x.flatten(1), y)
        return found

    # --- retraining

    def retrained(self, net: str, rows: list[torch.Tensor], seeds, *, steps: int, lr: float, noisy: bool):
        """A row a seed; rows: the examples that each seed trains on."""
        y, found = self.noisy if noisy else self.y, []
        for seed, kept in zip(seeds, rows, strict=True):
            model = models.build(net, seed=seed)
            self.method.train(model, self.x[kept], y[kept], steps=steps, lr=lr, seed=seed)
            with torch.no_grad():
                right = (model.eval()(self.test[0]).argmax(1) == self.test[1]).float()
            found.append({"seed": seed, "accuracy": right.mean().item(),
                          "accuracy_2000": right[self.shipped].mean().item()})  # fmt: skip
        return found

    def rows(self, scores: dict, arm: str, share: float, skip: float, seeds) -> list[torch.Tensor]:
        """The examples kept, for every seed: drawn anew where the choice is random."""
        n = round(share * len(self.y))
        if arm == "all":
            return [torch.arange(len(self.y)) for _ in seeds]
        if arm == "random":
            return [drawn(len(self.y), n, seed) for seed in seeds]
        if arm in MIXED:
            return [MIXED[arm](self.method.keep, scores[f"EL2N, {EPOCH}"], self.y, n, seed) for seed in seeds]
        score = -scores[f"EL2N, {EPOCH}"] if arm == "lowest EL2N" else scores[arm]
        return [self.method.keep(score, n, skip=round(skip * len(self.y)), seed=seed) for seed in seeds]

    def case(self, net, arm, share, *, skip=0.0, steps=600, lr=0.1, noisy=False):
        case = {"network": net, "arm": arm, "share": share, "skip": skip, "steps": steps, "lr": lr, "noisy": noisy}

        def compute() -> list[dict]:
            rows = self.rows(self.scores(net, noisy), arm, share, skip, SEEDS)
            return self.retrained(net, rows, SEEDS, steps=steps, lr=lr, noisy=noisy)

        return [case | row for row in self.work.once(" ".join(map(str, case.values())), compute)]


def by_layers(model: torch.nn.Sequential, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """GraNd of a chain of linear layers: an example's gradient is an outer product, its length a product.

    For z = W h + b it is (dL/dz) h^T, and dL/dz for b: squares |dL/dz|^2 (|h|^2 + 1).
    """
    seen, h = [], x
    for layer in model:
        z = layer(h)
        if isinstance(layer, torch.nn.Linear):
            z.retain_grad()
            seen.append((h.detach(), z))
        h = z
    F.cross_entropy(h, y, reduction="sum").backward()
    model.zero_grad()
    return sum(z.grad.square().sum(1) * (h.square().sum(1) + 1) for h, z in seen).sqrt()


def drawn(n: int, k: int, seed: int) -> torch.Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:k].sort().values


def and_random(keep, score: torch.Tensor, y: torch.Tensor, n: int, seed: int) -> torch.Tensor:
    """Nine tenths of the n by score, the last tenth drawn from what is left."""
    top = keep(score, round(0.9 * n), seed=seed)
    rest = torch.ones(len(y), dtype=torch.bool).index_fill(0, top, False).nonzero().flatten()
    return torch.cat([top, rest[drawn(len(rest), n - len(top), seed)]]).sort().values


def within_classes(keep, score: torch.Tensor, y: torch.Tensor, n: int, seed: int) -> torch.Tensor:
    """The highest of each class, equally many."""
    parts = [torch.nonzero(y == c).flatten() for c in y.unique()]
    return torch.cat([part[keep(score[part], n // len(parts), seed=seed)] for part in parts]).sort().values


MIXED = {"EL2N, 5, a tenth random": and_random, "EL2N, 5, by class": within_classes}


def centroid(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Distance to the mean image of the own class less that to the nearest other class."""
    means = torch.stack([x[y == c].mean(0) for c in y.unique()])
    apart = torch.cdist(x, means)
    own = F.one_hot(y, len(means)).bool()
    return apart[own] - apart.masked_fill(own, torch.inf).min(1).values


def neighbours(x: torch.Tensor, y: torch.Tensor, k: int = 10) -> torch.Tensor:
    """Share of the ten nearest other images that have another label."""
    near = torch.cat([torch.cdist(part, x).topk(k + 1, largest=False).indices for part in x.split(1000)])
    other = near != torch.arange(len(x))[:, None]
    other[other.all(1), -1] = False  # an image with copies need not be its own nearest
    return (y[near] != y[:, None]).float().masked_fill(~other, 0).sum(1) / k


# --- what is retrained: network, arm, share kept, and what differs from 600 steps at rate 0.1 on clean labels


HALF = 0.5
CASES = [
    *((MLP, arm, HALF, {}) for arm in ("random", "EL2N, 5", "loss, 5", "forgetting", "GraNd, 0", "lowest EL2N")),
    (MLP, "all", 1.0, {}),
    *((CONV, arm, HALF, {}) for arm in ("random", "EL2N, 5")),
    (CONV, "all", 1.0, {}),
    *((MLP, arm, HALF, {}) for arm in MIXED),
    *((MLP, arm, HALF, {"lr": 0.05}) for arm in ("EL2N, 5", "random")),
    *((CONV, arm, share, {"lr": 0.05}) for arm, share in (("EL2N, 5", HALF), ("all", 1.0), ("random", HALF))),
    (MLP, "all", 1.0, {"lr": 0.05}),
    *((MLP, arm, share, {"steps": 1200}) for arm, share in (("all", 1.0), ("random", HALF), ("EL2N, 5", HALF))),
    *((MLP, "EL2N, 5", 0.2, {"skip": skip, "noisy": True}) for skip in (0.0, 0.15)),
    (MLP, "random", 0.2, {"noisy": True}),
    *((MLP, arm, 0.1, {}) for arm in ("random", "EL2N, 5")),
    *((MLP, arm, HALF, {"steps": 2400}) for arm in ("EL2N, 5", "random")),
]


# --- tables about the scores


def flips(bench: Bench) -> pd.DataFrame:
    from sklearn.metrics import roc_auc_score

    rows = []
    for net in (MLP, CONV):
        runs = bench.run_scores(net, noisy=True)
        for name, score in bench.scores(net, noisy=True).items():
            if net == CONV and name not in runs:
                continue  # what trains nothing is the same for both
            one = [roc_auc_score(bench.changed, run) for run in runs.get(name, [score])]
            rows.append({"network": net, "detector": name, "runs": len(one),
                         "auc": roc_auc_score(bench.changed, score), "one_run": np.mean(one),
                         "changed": bench.changed.float().mean().item()})  # fmt: skip
    return pd.DataFrame(rows)


def spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(a.numpy(), b.numpy()).statistic)


def agreement(bench: Bench) -> pd.DataFrame:
    named = {f"{net}, {name}": score for net in (MLP, CONV) for name, score in bench.scores(net).items()
             if net == MLP or name not in ("input norm", "centroid", "neighbours")}  # fmt: skip
    rows, names = [], list(named)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            within = [spearman(named[a][bench.y == c], named[b][bench.y == c]) for c in range(10)]
            rows.append({"a": a, "b": b, "spearman": spearman(named[a], named[b]), "within": np.mean(within)})
    return pd.DataFrame(rows)


def averaged(bench: Bench) -> pd.DataFrame:
    rows = []
    runs_of = bench.run_scores(MLP)
    for name in KEPT[MLP]:
        for R in range(1, 6):
            alike = spearman(runs_of[name][:R].mean(0), runs_of[name][5:].mean(0))
            rows.append({"network": MLP, "score": name, "runs": R, "spearman": alike})
    return pd.DataFrame(rows)


KEPT = {
    MLP: ["EL2N, 0", "EL2N, 1", "EL2N, 2", "EL2N, 5", "EL2N, 10", "GraNd, 0", "GraNd, 5", "forgetting"],
    CONV: ["EL2N, 0", "EL2N, 1", "EL2N, 2", "EL2N, 5", "GraNd, 0", "forgetting"],
}


def stored(bench: Bench) -> dict[str, torch.Tensor]:
    found = {}
    for net, names in KEPT.items():
        for name in names:
            score = bench.scores(net)[name]
            levels = (255 * (score / score.max()).sqrt()).round().to(torch.uint8)
            found[f"{net}, {name}"] = score.half() if name == f"EL2N, {EPOCH}" else levels
            found[f"{net}, {name}, largest"] = score.max()
        found[f"{net}, EL2N, 5, one run"] = bench.run_scores(net)["EL2N, 5"][0].half()
        found[f"{net}, EL2N, 5, wrong labels"] = bench.scores(net, noisy=True)["EL2N, 5"].half()
    return found


def build(out: Path, work: Path) -> list[Path]:
    runtime.deterministic(seed=0)
    bench = Bench(papers.method("data-diet"), Work(work))
    results = pd.DataFrame([row for net, arm, share, more in CASES for row in bench.case(net, arm, share, **more)])
    order = ["network", "noisy", "steps", "lr", "share", "skip", "arm", "seed"]
    results = results[[*order, "accuracy", "accuracy_2000"]].sort_values(order)
    tables = {"results": results, "flips": flips(bench), "agreement": agreement(bench), "runs": averaged(bench)}
    paths = []
    for name, table in tables.items():
        paths.append(out / f"{name}.csv")
        write_table(paths[-1], table.round(4))
    write_tensors(out / "scores.safetensors", stored(bench))
    return [*paths, out / "scores.safetensors"]


if __name__ == "__main__":
    run(build, __doc__, work=work_option("data-diet"))
