"""results.csv, steps.csv: pruning LeNet-300-100 block by block, beside other solvers and one-shot pruning.

Five networks of 10,000 MNIST images (seeds 10 to 14), kept at 5 and 10 % of the weights of every layer. The functions
are the method cells of notebooks/06-pruning/09-combinatorial-brain-surgeon. About 6 minutes on one core; a run that
was stopped goes on where it was (delete the folder --work for a fresh start).
"""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from nbkit.recipes import Work, run, seeds_option, work_option, write_table

FIRST = 10  # the first seed
DENSITIES = (0.05, 0.1)
EVERY = 5  # steps between two looks at the held-out images
LONG = 180  # steps
LOGGED = ("full Q", "truncated Q", "diagonal H", "no tabu")  # in steps.csv, at 5 %


def swap_all(Q, x):
    """No optimisation: the two sides of the block trade places."""
    k = int(x.sum())
    swaps = min(k, len(x) - k)
    best = x.clone()
    best[:swaps] = 0
    best[k : k + swaps] = 1
    return Q, best


def arms(method, density: float, seed: int) -> dict[str, dict]:
    """Name -> options: of ``icbs``, and start, tabu of ``begin``, images (a number of them)."""
    diagonal = {"solver": method.diagonal, "hessian": False}
    found = {
        "full Q": {},
        "truncated Q": {"solver": method.truncated},
        "diagonal Q": {"solver": method.diagonal},
        "diagonal H": diagonal,
        "swap all": {"solver": swap_all},
        "random block": {"random": True},
        "Wanda start": {"start": "Wanda"},
        "no tabu": {"tabu": 0},
        "no tabu, diagonal H": {"tabu": 0, **diagonal},
    }
    if density == 0.05:
        found["one batch"] = {"images": 200}
    if density == 0.05 and seed < FIRST + 3:
        found["long"] = {"steps": LONG}
        found["b = 512"] = {"b": 512, "solver": partial(method.full, tries=128)}
        found["b = 512, diagonal H"] = {"b": 512, **diagonal}
    return found


def dense(mnist, seed: int):
    """A trained LeNet-300-100."""
    from nbkit import models, training

    net = models.build("lenet-300-100", seed=seed)
    training.fit(net, (mnist.x_train, mnist.y_train), steps=600, lr=1e-3, batch=100, seed=seed)
    return net


def one_shot(net, mnist, seed: int) -> dict[str, dict]:
    """Name -> scores of every layer, from all images to train on."""
    from nbkit import sparsity

    plain = {name: wanda(net, mnist.x_train, name) for name in sparsity.prunable(net)}
    return {
        "magnitude": sparsity.magnitude(net),
        "Wanda": {name: by_row(score) for name, score in plain.items()},
        "Wanda, by layer": plain,
        "gradient": sparsity.snip(net, mnist.x_train, mnist.y_train, batch=1000),
        "random": sparsity.random(net, seed=seed),
    }


def wanda(net, x, name: str):
    """|w| times the norm of the input it meets."""
    from nbkit import forward, hooks

    layer = name.removesuffix(".weight")
    with forward.evaluating(net), torch.no_grad(), hooks.record(net, layer, at="input") as a:
        net(x)
    return net.get_parameter(name).detach().abs().cpu() * a[layer].norm(dim=0)


def by_row(score):
    """Ranks within each row, so that every unit keeps as many; rows share what is left over by score."""
    return score.argsort(1).argsort(1) + score / (1.01 * score.max())


class Prunings:
    """All prunings of one network, each kept in a file of ``work`` so that none is done twice."""

    def __init__(self, method, mnist, seed: int, work: Work):
        self.method, self.mnist, self.seed, self.work = method, mnist, seed, work
        self.net = dense(mnist, seed)
        self.scores = one_shot(self.net, mnist, seed)

    def seen(self, net) -> dict[str, float]:
        from nbkit import training

        loss, accuracy = training.evaluate(net, self.mnist.x_test, self.mnist.y_test)
        batch = training.evaluate(net, self.mnist.x_train[:200], self.mnist.y_train[:200])[0]
        return {"loss": loss, "accuracy": accuracy, "batch_loss": batch}

    def pruned(self, density: float, start: str, **options):
        """A copy of the network at its first mask, and its layers."""
        net = copy.deepcopy(self.net)
        return net, self.method.begin(net, self.scores[start], density, **options)

    def search(self, density: float, arm: str) -> list[dict]:
        options = dict(arms(self.method, density, self.seed)[arm])
        begun = {key: options.pop(key) for key in ("tabu",) if key in options}
        net, layers = self.pruned(density, options.pop("start", "magnitude"), b=options.get("b", 256), **begun)
        images = options.pop("images", 10_000)
        if options.pop("random", False):
            chance = np.random.default_rng(self.seed)
            options["score"] = lambda layer, g: torch.as_tensor(chance.random(len(g)))
        table = self.method.icbs(
            net, layers, self.mnist.x_train[:images], self.mnist.y_train[:images], seed=self.seed, watch=self.seen,
            every=EVERY, **options
        )  # fmt: skip
        return table.to_dict("records")

    def rows(self) -> list[dict]:
        """Of both tables, told apart by their columns."""
        found = [{"density": 1.0, "arm": "dense", "step": 0, **self.seen(self.net)}]
        for density in DENSITIES:
            for start in self.scores:
                found.append({"density": density, "arm": start, "step": 0, **self.seen(self.pruned(density, start)[0])})
            for arm in arms(self.method, density, self.seed):
                key = f"{self.seed}-{density}-{arm}".replace("=", "")
                done = self.work.once(key, partial(self.search, density, arm))
                found += [{"density": density, "arm": arm, **row} for row in done]
        return [{"seed": self.seed, **row} for row in found]


def build(out: Path, work: Path, seeds: int) -> list[Path]:
    from nbkit import datasets, papers, runtime

    runtime.deterministic(seed=0)
    method, mnist = papers.method("combinatorial-brain-surgeon"), datasets.load("mnist")
    rows = [Prunings(method, mnist, seed, Work(work)).rows() for seed in range(FIRST, FIRST + seeds)]
    table = pd.DataFrame(sum(rows, []))
    keys = ["density", "arm", "seed", "step"]
    results = table.dropna(subset="loss")[[*keys, "loss", "accuracy", "batch_loss"]]
    steps = table[table["density"].eq(0.05) & table["arm"].isin(LOGGED) & table["step"].gt(0)]
    steps = steps[[*keys, "layer", "predicted", "true", "swaps"]]
    steps["swaps"] = steps["swaps"].astype(int)
    paths = [out / "results.csv", out / "steps.csv"]
    for path, part in zip(paths, (results, steps), strict=True):
        write_table(path, part.round(5), float_format="%.5g")
    return paths


if __name__ == "__main__":
    run(build, __doc__, work=work_option("combinatorial-brain-surgeon"), seeds=seeds_option(5, "seeds 10 and on"))
