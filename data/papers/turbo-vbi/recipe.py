"""results.csv, rates.csv, supports.safetensors: Turbo-VBI and its rivals on digits and on LeNet-300-100.

Five networks 64-50-10 of 1,000 digits (seeds 0 to 4), three LeNet-300-100 of 10,000 MNIST images (seeds 0 to 2).
rates.csv is the search for learning rates and for the i.i.d. lam, on other seeds and on held-back images. The
functions are the method cells of notebooks/06-pruning/10-turbo-vbi. About 8 minutes on one core; a run that was
stopped goes on where it was (delete the folder --work for a fresh start).
"""

from __future__ import annotations

import copy
import math
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from nbkit.recipes import Work, part_option, run, seeds_option, work_option, write_table, write_tensors

DIGITS, LENET = "digits", "LeNet-300-100"
SETTINGS = {
    DIGITS: {"rounds": 25, "epochs": 5, "batch": 64, "dense": 40, "lr": 0.003, "b_off": 1e-3, "lam": 0.25, "var": 1e-3},
    LENET: {"rounds": 12, "epochs": 1, "batch": 100, "dense": 6, "lr": 0.001, "b_off": 1e-5, "lam": 0.25, "var": 1e-4},
}
RATES = {  # chosen in rates.csv
    DIGITS: {"Markov": 0.01, "i.i.d.": 0.01, "ARD": 0.01, "magnitude": 0.003, "SNIP": 0.003},
    LENET: {"Markov": 0.003, "i.i.d.": 0.003, "ARD": 0.001, "magnitude": 0.01, "SNIP": 0.01},
}
ARMS = ("Markov", "i.i.d.", "ARD", "magnitude", "magnitude by layer", "SNIP", "random")
MORE = ("i.i.d., same lam", "Markov, tuned", "i.i.d., tuned")  # on digits
PILOTS = {DIGITS: (100, 101), LENET: (100,)}


def split(name: str) -> dict:
    """train, val, test: val is for choosing learning rates; LeNet trains on it, too, once they are chosen."""
    from nbkit import datasets

    if name == DIGITS:
        data = datasets.load("digits")
        order = torch.randperm(len(data.x), generator=torch.Generator().manual_seed(0))
        x, y = data.x[order], data.y[order]
        return {"train": (x[:1000], y[:1000]), "val": (x[1000:1297], y[1000:1297]), "test": (x[1297:], y[1297:])}
    data = datasets.load("mnist")
    return {
        "train": (data.x_train, data.y_train),
        "search": (data.x_train[:9000], data.y_train[:9000]),
        "val": (data.x_train[9000:], data.y_train[9000:]),
        "test": (data.x_test, data.y_test),
    }


def born(name: str, seed: int) -> nn.Module:
    from nbkit import models

    sizes = {"inputs": 64, "hidden": (50,)} if name == DIGITS else {}
    return models.build("lenet-300-100", seed=seed, **sizes)


def removed(masks) -> int:
    """Hidden neurons of a chain of Linear layers without a weight to the left or to the right."""
    layers = list(masks.values())
    return sum(int((~a.any(1) | ~b.any(0)).sum()) for a, b in zip(layers, layers[1:], strict=False))


def ard(e, active, prior):
    """No support: rho ~ Gamma(0.001, 0.000001) for every weight."""
    nothing = torch.zeros_like(e)
    return nothing, nothing, 0.501 / (1e-6 + e / 2)


class Network:
    """One dense network and all that is made of it."""

    def __init__(self, method, name: str, seed: int, *, searching: bool = False):
        from nbkit import training

        self.method, self.name, self.seed, self.set = method, name, seed, SETTINGS[name]
        data = split(name)
        self.train = data.get("search", data["train"]) if searching else data["train"]
        self.test = data["val" if searching else "test"]
        self.net = born(name, seed)
        self.fit = partial(training.fit, data=self.train, batch=self.set["batch"], seed=seed)
        self.fit(self.net, epochs=self.set["dense"], lr=self.set["lr"])

    def rate(self, arm: str) -> float:
        return RATES[self.name][{"random": "magnitude"}.get(arm, arm.split(",")[0].replace(" by layer", ""))]

    def prior(self, arm: str, **other):
        """Of the support: in the paper's manner, or independent."""
        kind = {"lam": 0.05, "p10": 0.5, "b_off": self.set["b_off"]}
        kind |= {"lam": self.set["lam"]} if arm.startswith("i.i.d.") and "same" not in arm else {}
        kind |= other
        return self.method.Prior(**kind | ({"p10": 1 - kind["lam"]} if arm.startswith("i.i.d.") else {}))

    def believe(self, arm: str, *, lr=None, rounds=None, update=None, **other):
        net = copy.deepcopy(self.net)
        beliefs, _ = self.method.turbo_vbi(
            net, *self.train, self.prior(arm, **other), update=update or self.method.structured,
            lr=lr or self.rate(arm),
            rounds=rounds or self.set["rounds"], seed=self.seed,
            **{key: self.set[key] for key in ("epochs", "batch", "var")},
        )  # fmt: skip
        return net, beliefs

    def bayes(self, arm: str, kept=None, **options):
        """Pruned where q(s = 1) < 0.5; ARD, which has no s, by mu^2 / sigma^2 to as many weights as ``kept`` holds."""
        from nbkit import sparsity

        if arm == "ARD":
            net, beliefs = self.believe(arm, update=ard, **options)
            mu = sparsity.prunable(net)
            ratio = {k: mu[k].detach() ** 2 / q.log_var.detach().exp().view_as(mu[k]) for k, q in beliefs.items()}
            masks = sparsity.mask_from_scores(ratio, kept.sparsity)
            masks.apply(net, keep_original=False)
        elif arm.endswith("tuned"):  # the last fifth of the epochs with a fixed support
            fifth = self.set["rounds"] // 5
            net, beliefs = self.believe(arm, rounds=self.set["rounds"] - fifth)
            masks = self.method.prune(net, beliefs)
            self.tune(net, masks, fifth * self.set["epochs"], self.rate("magnitude"))
        else:
            net, beliefs = self.believe(arm, **options)
            masks = self.method.prune(net, beliefs)
        return net, masks

    def tune(self, net, masks, epochs: int, lr: float):
        masks.apply(net, keep_original=False)
        self.fit(net, epochs=epochs, lr=lr, post_step=masks.post_step)
        return net, masks

    def rival(self, arm: str, kept, lr=None):
        """As many weights as ``kept``, as many epochs as Turbo-VBI."""
        from nbkit import sparsity

        epochs = self.set["rounds"] * self.set["epochs"]
        net, lr = copy.deepcopy(self.net), lr or self.rate(arm)
        if arm == "SNIP":
            net, epochs = born(self.name, self.seed), epochs + self.set["dense"]
            masks = sparsity.mask_from_scores(sparsity.snip(net, *self.train), kept.sparsity)
        elif arm == "magnitude by layer":
            masks = sparsity.mask_from_densities(sparsity.magnitude(net), kept.densities())
        elif arm == "random":
            masks = kept.shuffled(self.seed)
        else:
            masks = sparsity.magnitude_mask(net, kept.sparsity)
        return self.tune(net, masks, epochs, lr)

    def made(self, arm: str, kept=None, **options):
        bayesian = arm.startswith(("Markov", "i.i.d.", "ARD"))
        return self.bayes(arm, kept, **options) if bayesian else self.rival(arm, kept, **options)

    def row(self, arm: str, net, masks) -> dict:
        from nbkit import training

        about = {"network": self.name, "seed": self.seed, "arm": arm}
        about["accuracy"] = 100 * training.accuracy(net, *self.test)
        return about | self.structure(masks) if masks else about

    def structure(self, masks) -> dict:
        """How the support lies: pieces of rows, neurons gone, bits of the cheaper of two indices."""
        runs = {name: self.method.run_lengths(mask).double() for name, mask in masks.items()}
        every, first = torch.cat(list(runs.values())), next(iter(runs.values()))
        bits = {name: math.ceil(math.log2(mask.shape[1])) for name, mask in masks.items()}
        columns = sum(bits[name] * kept for name, kept in masks.kept().items())
        starts = sum(2 * bits[name] * len(length) for name, length in runs.items())
        return {
            "kept": 100 * (1 - masks.sparsity),
            "run": every.mean().item(),
            "run_first": first.mean().item(),
            "removed": removed(masks),
            "bits": min(columns, starts),
        }


def first_network(method, name: str, seed: int, work: Work, supports: Path) -> list[dict]:
    """All rows of one seed; Markov comes first, for its number of weights is everybody's."""
    key = f"{name}-{seed}"
    mask_file = work.folder / f"{key}.pt"
    one = Network(method, name, seed)

    def markov():
        net, masks = one.made("Markov")
        torch.save(dict(masks), mask_file)
        return one.row("Markov", net, masks)

    from nbkit import sparsity

    rows = [work.once(f"{key}-dense", lambda: one.row("dense", one.net, None)), work.once(f"{key}-Markov", markov)]
    kept = sparsity.Masks(torch.load(mask_file))
    stored = {"Markov": kept}
    for arm in (*ARMS[1:], *(MORE if name == DIGITS else ())):

        def other(arm=arm):
            net, masks = one.made(arm, kept)
            torch.save(dict(masks), work.folder / f"{key}-{arm}.pt")
            return one.row(arm, net, masks)

        rows.append(work.once(f"{key}-{arm}", other))
        stored[arm] = sparsity.Masks(torch.load(work.folder / f"{key}-{arm}.pt"))
    if (name, seed) == (LENET, 0):
        arms = ("Markov", "i.i.d.", "magnitude by layer")
        write_tensors(supports, {arm: packed(stored[arm]["fc1.weight"]) for arm in arms})
    return rows


def packed(mask) -> torch.Tensor:
    """Eight weights a byte."""
    return torch.from_numpy(np.packbits(mask.numpy(), axis=1))


def rates(method, work: Work) -> list[dict]:
    """Accuracy on held-back images of the pilot seeds, by learning rate, and the density of i.i.d. supports by lam."""
    rows = []
    for name, seeds in PILOTS.items():
        for seed in seeds:
            one = Network(method, name, seed, searching=True)
            kept = one.made("Markov")[1]
            grid = (0.003, 0.01, 0.03) if name == DIGITS else (0.001, 0.003)
            tries = [(arm, {"lr": lr}) for arm in ("Markov", "i.i.d.", "ARD") for lr in grid]
            tries += [(arm, {"lr": lr}) for arm in ("magnitude", "SNIP") for lr in (0.001, 0.003, 0.01)]
            if name == DIGITS:
                tries += [("i.i.d.", {"lr": 0.01, "lam": lam}) for lam in (0.35, 0.45)]
            for arm, options in tries:
                key = f"rates-{name}-{seed}-{arm}-{options}".replace("{", "").replace("}", "").replace(":", "")
                found = work.once(key, lambda: one.row(arm, *one.made(arm, kept, **options)))  # noqa: B023
                rows.append({**found, **options})
    return rows


def build(out: Path, work: Path, seeds: int, part: str) -> list[Path]:
    from nbkit import papers, runtime

    runtime.deterministic(seed=0)
    method, work = papers.method("turbo-vbi"), Work(work)
    paths = []
    if part in ("all", "rates"):
        paths.append(out / "rates.csv")
        table = pd.DataFrame(rates(method, work))[["network", "seed", "arm", "lr", "lam", "accuracy", "kept"]]
        write_table(paths[-1], table, float_format="%.4g")
    if part in ("all", "results"):
        paths += [out / "results.csv", out / "supports.safetensors"]
        rows = []
        for name, networks in ((DIGITS, 5), (LENET, seeds)):
            for seed in range(networks):
                rows += first_network(method, name, seed, work, paths[-1])
        table = pd.DataFrame(rows)
        table[["removed", "bits"]] = table[["removed", "bits"]].astype("Int64")
        write_table(paths[-2], table, float_format="%.5g")
    return paths


if __name__ == "__main__":
    run(build, __doc__, work=work_option("turbo-vbi"), seeds=seeds_option(3, "LeNet seeds"),
        part=part_option("rates", "results"))  # fmt: skip
