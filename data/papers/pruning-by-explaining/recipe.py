"""toys.csv, filters.csv, tuned.csv, chance.csv: what notebooks/06-pruning/06-pruning-by-explaining compares.

Toys: five networks for each of three simulated sets, a share of the hidden units removed at once, by every criterion,
with reference sets of 1 to 50 examples a class; test accuracies, mean and deviation over the draws. Filters: three
networks on three sub-tasks of Fashion-MNIST, filters removed in steps of 5 %, nothing trained (thin: all criteria;
wide: seven). Tuned: half of the
filters removed, before and after one epoch, each criterion at its own learning rate. Chance: how often noise passes the
rule on retraining. The functions are the notebook's own method cells. About 6 minutes on one core; a run that was
stopped goes on where it was (delete the folder --work for a fresh start).
"""

from __future__ import annotations

import copy
import itertools
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.datasets import make_circles, make_moons
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from nbkit.recipes import Work, part_option, run, seeds_option, work_option, write_table

SLUG = "pruning-by-explaining"
NETS = 5  # networks a toy set
DRAWS = 5  # reference sets for a toy network
SIZES = (1, 5, 20, 50)  # reference examples a class
DATA_FREE = ("weight", "random")
THIN, WIDE = "thin", "wide"  # 96 filters with BatchNorm, 352 without
FILTERS = {THIN: {1: 2, 5: 2, 20: 1}, WIDE: {5: 1}}  # reference images a class -> draws
PUBLISHED = ("relevance", "Taylor", "gradient", "activation")  # at 1 and at 20 images
COMPARED = ("relevance", "weight", "Taylor", "gradient", "random", "logit sensitivity", "relevance of f(x)")  # wide
LEVELS = {THIN: (12, 24, 48), WIDE: (88, 176)}  # filters that are gone: eighths, quarters
TEST = {THIN: 100, WIDE: 50}  # test images a class
RATES = (1e-3, 3e-3, 1e-2)
TOYS = {"moons": 2, "circles": 2, "spiral": 4}  # classes
TASKS = {
    "tops": (0, 2, 6),  # t-shirt, pullover, shirt
    "shoes": (5, 7, 9),  # sandal, sneaker, ankle boot
    "mixed": (3, 4, 8),  # dress, coat, bag
}


def toy(name: str, per_class: int, seed: int) -> tuple[Tensor, Tensor]:
    """Points [N, 2] and classes of a toy set, as in the public code: noise 0.1, or 0.2 rad."""
    k = TOYS[name]
    if name == "moons":
        x, y = make_moons(k * per_class, noise=0.1, random_state=seed)
    elif name == "circles":
        x, y = make_circles(k * per_class, noise=0.1, factor=0.3, random_state=seed)
    else:
        y = np.repeat(np.arange(k), per_class)
        r = np.tile(np.linspace(0, 1, per_class), k)
        angle = 4 * (y + r) + 0.2 * np.random.default_rng(seed).standard_normal(len(y))
        x = np.column_stack([r * np.sin(angle), r * np.cos(angle)])
    return torch.tensor(x).float(), torch.tensor(y).long()


def mlp(name: str, seed: int, h: int = 200) -> nn.Sequential:
    """A network 2-h-h-h-classes trained on the toy set ``name``."""
    from nbkit import training

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first = [nn.Linear(2, h), nn.ReLU(), nn.Linear(h, h), nn.ReLU()]
        model = nn.Sequential(*first, nn.Linear(h, h), nn.ReLU(), nn.Linear(h, TOYS[name]))
    training.fit(model, toy(name, 200, seed), steps=400, batch=200, lr=3e-3, seed=seed)
    return model.eval()


def references(x: Tensor, y: Tensor, per_class: int, seed: int) -> tuple[Tensor, Tensor]:
    """A reference set: ``per_class`` examples of every class, drawn from ``seed``."""
    chance = torch.Generator().manual_seed(seed)
    if not 0 < per_class <= y.bincount().min():
        raise ValueError(f"{per_class} examples a class; there are 1 to {y.bincount().min()}")
    groups = [(y == c).nonzero()[:, 0] for c in y.unique()]
    rows = torch.cat([g[torch.randperm(len(g), generator=chance)[:per_class]] for g in groups])
    return x[rows], y[rows]


def subtask(x: Tensor, y: Tensor, classes: tuple, most: int) -> tuple[Tensor, Tensor]:
    """The first ``most`` images of each of the ``classes``, which are numbered anew from 0."""
    rows = torch.cat([(y == c).nonzero()[:most, 0] for c in classes])
    label = torch.full((10,), -1)
    label[list(classes)] = torch.arange(len(classes))
    return x[rows], label[y[rows]]


def fold(model: nn.Sequential) -> nn.Sequential:
    """A copy in evaluation mode without BatchNorms: each is part of the convolution before it."""
    layers = OrderedDict()
    for name, layer in copy.deepcopy(model).eval().named_children():
        if isinstance(layer, nn.BatchNorm2d):
            before = next(reversed(layers))
            layers[before] = fuse_conv_bn_eval(layers[before], layer)
        else:
            layers[name] = layer
    return nn.Sequential(layers)


def on_subtask(model: nn.Sequential, classes: tuple) -> nn.Sequential:
    """A copy without BatchNorms whose last layer has the rows of ``classes`` only."""
    small = fold(model)
    with torch.no_grad():
        small.head.weight = nn.Parameter(small.head.weight[list(classes)])
        small.head.bias = nn.Parameter(small.head.bias[list(classes)])
    small.head.out_features = len(classes)
    return small


def pruned(prune, net: nn.Module, name: str, criterion: str, *, n: int = 5, share: float = 1 / 3, seed: int = 0):
    """The toy network of seed 0 without ``share`` of its units, its test accuracy [%], and the reference set."""
    from nbkit import sparsity, training

    reference = references(*toy(name, 200, 0), n, seed)
    keep = prune(net, *reference, criterion, remove=share, step=share, seed=seed)[-1]
    small = sparsity.structured(net, keep, example=reference[0])
    return small, 100 * training.accuracy(small, *toy(name, 250, 100)), reference


def toy_cell(method, name: str, seed: int) -> list[dict]:
    """One toy network, all criteria and reference sizes: a row each."""
    from nbkit import sparsity, training

    net, (x, y) = mlp(name, seed), toy(name, 200, seed)
    test = toy(name, 250, 100 + seed)
    whole = training.accuracy(net, *test)
    rows = [{"set": name, "seed": seed, "criterion": "whole", "n": 0, "gone": 0, "accuracy": whole, "deviation": 0}]
    for criterion, n, share in itertools.product(method.CRITERIA, SIZES, (1 / 3, 2 / 3)):
        if n != 5 and (share > 0.34 or criterion in DATA_FREE):
            continue
        found = []
        for draw in range(1 if criterion == "weight" else DRAWS):
            reference = references(x, y, n, draw)
            (keep,) = method.prune(net, *reference, criterion, remove=share, step=share, seed=draw)
            found.append(training.accuracy(sparsity.structured(net, keep, example=x[:2]), *test))
        found = np.array(found)
        row = {"set": name, "seed": seed, "criterion": criterion, "n": n, "gone": share}
        rows.append(row | {"accuracy": found.mean(), "deviation": found.std()})
    return rows


class Cell:
    """One network on one sub-task, with what is needed to prune and to judge it."""

    def __init__(self, method, data, task: str, seed: int, network: str = THIN):
        from nbkit import models

        self.method, self.task, self.seed, self.network = method, task, seed, network
        classes, variant = TASKS[task], {"variant": "thin"} if network == THIN else {}
        self.net = on_subtask(models.load("small-cnn", seed=seed, **variant), classes)
        self.units = sum(len(self.net.get_submodule(name).weight) for name in method.hidden(self.net))
        x, y = subtask(data.x_train, data.y_train, classes, 1000)
        held = np.arange(len(y)) % 10 == 9  # nothing is drawn or trained on these
        self.pool, self.held = (x[~held], y[~held]), (x[held], y[held])
        self.test = subtask(data.x_test, data.y_test, classes, TEST[network])

    def smaller(self, keep):
        from nbkit import sparsity

        return sparsity.structured(self.net, keep, example=self.test[0][:2])

    def head(self) -> dict:
        return {"network": self.network, "task": self.task, "seed": self.seed}

    def rows(self, criterion: str, n: int, draw: int) -> list[dict]:
        from nbkit import training

        head = self.head() | {"criterion": criterion, "n": n, "draw": draw}
        levels = LEVELS[self.network]
        reference = references(*self.pool, n, draw)
        history = self.method.prune(self.net, *reference, criterion, remove=0.5, seed=draw)
        left = {self.units - sum(int(m.sum()) for m in keep.values()): keep for keep in history}
        near = {level: left[min(left, key=lambda gone: abs(gone - level))] for level in levels}
        return [
            head | {"gone": gone / self.units, "accuracy": round(training.accuracy(self.smaller(keep), *self.test), 4)}
            for gone, keep in near.items()
            if n == 5 or gone in (24, 48)
        ]

    def all(self) -> list[dict]:
        from nbkit import training

        whole = round(training.accuracy(self.net, *self.test), 4)
        rows = [self.head() | {"criterion": "whole", "n": 0, "draw": 0, "gone": 0, "accuracy": whole}]
        for n, draws in FILTERS[self.network].items():
            criteria = COMPARED if self.network == WIDE else self.method.CRITERIA if n == 5 else PUBLISHED
            for criterion, draw in itertools.product(criteria, range(draws)):
                if criterion != "weight" or draw == 0:
                    rows += self.rows(criterion, n, draw)
        return rows

    def tuned(self) -> list[dict]:
        """Half of the filters removed with the first reference set; before and after an epoch."""
        from nbkit import training

        rows = []
        epoch = references(*self.pool, 100, 1000 + self.seed)
        reference = references(*self.pool, 5, 0)
        for criterion in self.method.CRITERIA:
            if criterion == "relevance of f(x)":
                continue
            keep = self.method.prune(self.net, *reference, criterion, remove=0.5, seed=0)[-1]
            found = []
            for lr in RATES:
                small = self.smaller(keep)
                before = training.accuracy(small, *self.test)
                training.fit(small, epoch, epochs=1, batch=32, lr=lr, seed=self.seed)
                loss = training.evaluate(small, *self.held)[0]
                found.append((loss, lr, training.accuracy(small.eval(), *self.test)))
            loss, lr, after = min(found)
            row = self.head() | {"criterion": criterion, "lr": lr}
            rows.append(row | {"before": round(before, 4), "after": round(after, 4)})
        return rows


def competitive(values: np.ndarray, method: int) -> bool:
    """The rule on retraining: [cells, criteria] in percent, the method within half a point of its best rival."""
    mean = values.mean(axis=0)
    return bool(mean[method] >= np.delete(mean, method).max() - 0.5)


def chances(tuned: pd.DataFrame, draws: int = 10_000) -> pd.DataFrame:
    """How often the rule on retraining is passed when the criteria's names are dealt anew in every cell."""
    wide = 100 * tuned.pivot_table("after", ["task", "seed"], "criterion")
    method, generator = list(wide).index("relevance"), np.random.default_rng(0)
    passed = [competitive(generator.permuted(wide.to_numpy(), axis=1), method) for _ in range(draws)]
    return pd.DataFrame([{"claim": "retraining", "by_chance": np.mean(passed)}])


def build(out: Path, work: Path, seeds: int, part: str) -> list[Path]:
    from nbkit import datasets, papers, runtime

    runtime.deterministic(seed=0)
    method, done = papers.method(SLUG), Work(work)
    files = {name: out / f"{name}.csv" for name in ("toys", "filters", "tuned", "chance")}
    if part in ("all", "toys"):
        cells = itertools.product(TOYS, range(NETS))
        rows = [done.once(f"toy-{name}-{seed}", lambda n=name, s=seed: toy_cell(method, n, s)) for name, seed in cells]
        write_table(files["toys"], pd.DataFrame(itertools.chain(*rows)), float_format="%.5f")
    if part in ("all", "filters"):
        data = datasets.load("fashion-mnist")
        thin, wide = (
            [Cell(method, data, task, seed, network) for seed in range(seeds) for task in TASKS]
            for network in (THIN, WIDE)
        )
        for name, measure, cells in (("filters", Cell.all, thin + wide), ("tuned", Cell.tuned, thin)):
            rows = [done.once(f"{name}-{c.network}-{c.task}-{c.seed}", lambda c=c, m=measure: m(c)) for c in cells]
            write_table(files[name], pd.DataFrame(itertools.chain(*rows)))
        write_table(files["chance"], chances(pd.read_csv(files["tuned"])))
    return [path for path in files.values() if path.is_file()]


if __name__ == "__main__":
    run(build, __doc__, work=work_option(SLUG), seeds=seeds_option(3), part=part_option("toys", "filters"))
