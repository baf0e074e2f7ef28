"""results.csv and rates.csv: every measurement of notebooks/06-pruning/03-global-magnitude-pruning.

By its method cells, for vgg-small and mobilenet-small, three seeds each: accuracy at once after pruning, with BatchNorm
measured afresh, after a short fine-tuning, at equal multiply-adds, and after a longer fine-tuning. Each method's
learning rate at each level is the one that is best on 500 held-back training images with seed 0 (RATES). A run that
was stopped goes on where it was (delete the folder --work for a fresh start). The same machine and torch give the same
figures; another processor may differ in the last digits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from nbkit.recipes import Work, run, seeds_option, work_option, write_table

TUNED = {  # (criterion, mt) -> levels; gradual is no criterion of its own, but a way to train
    "vgg-small": {
        ("global", 0.0): (0.8, 0.95, 0.99),
        ("uniform", 0.0): (0.8, 0.95, 0.99),
        ("ERK", 0.0): (0.8, 0.95, 0.99),
        ("LAMP", 0.0): (0.8, 0.95, 0.99),
        ("SNIP", 0.0): (0.8, 0.95, 0.99),
        ("random in global's layers", 0.0): (0.95,),
        ("gradual", 0.0): (0.8, 0.95),
    },
    "mobilenet-small": {
        ("global", 0.0): (0.7, 0.8, 0.95),
        ("uniform", 0.0): (0.7, 0.8, 0.95),
        ("MT", 0.05): (0.7, 0.8, 0.95),
        ("MT", 0.2): (0.7, 0.8, 0.95),
        ("MT by min_keep", 0.05): (0.8,),
    },
}
SAME_WORK = {0.2: (0.8, 0.95), 0.05: (0.95, 0.99)}  # share of multiply-adds -> the levels whose rates are tried
LONGER = "global", "uniform", "ERK", "gradual"  # at 95 %, three epochs, at the rate of one
RATES = 0.0002, 0.0006, 0.0017, 0.005, 0.015, 0.045, 0.135, 0.4
FIRST = 3  # where the search for a rate begins
NO_HELP = 0.15  # an accuracy near chance, 0.1: it points in no direction
TRAIN, HELD_BACK, BATCH, SNIP = 1000, 500, 512, 256  # training images: to fine-tune, for the rate, for BatchNorm, SNIP
UPDATES = 40  # in one epoch, 25 images a batch
TEST = 500  # test images without fine-tuning; all 2,000 with it


def climb(value: Callable[[float], float]) -> dict[float, float]:
    """What RATES give, tried from FIRST in the direction that helps until it no longer does; all if nothing does."""
    tried = {RATES[k]: value(RATES[k]) for k in (FIRST, FIRST + 1)}
    if max(tried.values()) < NO_HELP:
        return tried | {lr: value(lr) for lr in RATES if lr not in tried}
    up = tried[RATES[FIRST + 1]] > tried[RATES[FIRST]]
    at, step = (FIRST + 1, 1) if up else (FIRST, -1)
    while 0 <= at + step < len(RATES):
        tried[RATES[at + step]] = value(RATES[at + step])
        if tried[RATES[at + step]] <= tried[RATES[at]]:
            break
        at += step
    return tried


def only_first(value: Callable[[float], float]) -> dict[float, float]:
    return {RATES[FIRST]: value(RATES[FIRST])}


class Measurements:
    """The rows of one network and seed; seed 0 chooses the rates of all."""

    def __init__(self, method, name: str, seed: int, data, work: Work, rates: dict):
        from nbkit import models, sparsity

        self.method, self.name, self.seed, self.data = method, name, seed, data
        self.work, self.rates = work, rates
        self.model = models.load(name, seed=seed).to(memory_format=torch.channels_last)
        self.few = data.x_train[:TRAIN], data.y_train[:TRAIN]
        held_back = slice(TRAIN, TRAIN + HELD_BACK)
        self.held_back = data.x_train[held_back], data.y_train[held_back]
        self.macs = sparsity.flops(self.model, data.x_test[:1])["macs"]
        self.rows: list[dict[str, Any]] = []
        self.tried: list[dict[str, Any]] = []

    def mask(self, criterion: str, kappa: float, mt: float = 0.0):
        from nbkit import sparsity

        if criterion == "random in global's layers":
            return self.method.prune(self.model, "global", kappa).shuffled(self.seed)
        if criterion == "MT by min_keep":
            T = max(self.method.minimum(self.method.prune(self.model, "global", kappa), mt).values())
            return sparsity.magnitude_mask(self.model, kappa, min_keep=T)
        few = self.data.x_train[:SNIP], self.data.y_train[:SNIP]
        return self.method.prune(self.model, criterion, kappa, few, mt=mt)

    def accuracy(self, model, images: int = 2000) -> float:
        from nbkit import training

        return round(training.accuracy(model, self.data.x_test[:images], self.data.y_test[:images], batch=128), 4)

    def on_held_back(self, model) -> float:
        from nbkit import training

        return round(training.accuracy(model, *self.held_back, batch=128), 4)

    def facts(self, masks) -> dict[str, Any]:
        kept = masks.kept()
        return {
            "kept": sum(kept.values()),
            "work": round(self.method.work_kept(self.model, masks, self.data.x_test[:1]), 5),
            "least": min(kept.values()),
        }

    def add(self, phase: str, criterion: str, mt: float, level: float, kappa: float, compute: Callable) -> dict:
        """A row, computed once. ``level`` is what was asked for, a sparsity or a share of multiply-adds."""
        method = f"{criterion}, {mt:g} %" if mt else criterion
        key = {"model": self.name, "seed": self.seed, "phase": phase, "method": method, "level": level}
        found = self.work.once("-".join(map(str, key.values())), compute)
        tried = found.pop("tried", {})
        self.tried += [{**key, "lr": float(lr), "accuracy": right} for lr, right in tried.items()]
        self.rows.append({**key, "criterion": criterion, "mt": mt, "kappa": kappa, **found})
        return found

    # --- without training

    def at_once(self, criterion: str, kappa: float, mt: float) -> None:
        from nbkit import training

        def measure(again: bool) -> dict[str, Any]:
            masks = self.mask(criterion, kappa, mt)
            model = masks.apply(copy.deepcopy(self.model), keep_original=False)
            if again:
                model = training.recalibrate(model, self.data.x_train[:BATCH])
            return {"accuracy": self.accuracy(model, TEST), "images": TEST, **self.facts(masks)}

        self.add("one-shot", criterion, mt, kappa, kappa, lambda: measure(False))
        self.add("recalibrated", criterion, mt, kappa, kappa, lambda: measure(True))

    # --- with training

    def trained(self, criterion: str, kappa: float, mt: float, lr: float, epochs: int = 1):
        """A fine-tuned model and its masks."""
        how = {"lr": lr, "epochs": epochs, "seed": self.seed}
        if criterion == "gradual":
            return self.method.gradual(self.model, kappa, self.few, every=3 * epochs, **how)
        masks = self.mask(criterion, kappa, mt)
        return self.method.fine_tune(self.model, masks, self.few, **how), masks

    def best_of(self, criterion: str, kappa: float, mt: float, search: Callable) -> dict[str, Any]:
        """Fine-tuned at the rate that is best on the images held back."""
        runs: dict[float, Any] = {}

        def right(lr: float) -> float:
            runs[lr] = self.trained(criterion, kappa, mt, lr)
            return self.on_held_back(runs[lr][0])

        tried = search(right)
        lr = max(tried, key=tried.get)
        model, masks = runs[lr]
        found = {"lr": lr, "updates": UPDATES, "accuracy": self.accuracy(model), "images": 2000}
        return {"tried": tried, **found, **self.facts(masks)}

    def at_rate(self, criterion: str, kappa: float, mt: float, lr: float, epochs: int = 1) -> dict[str, Any]:
        model, masks = self.trained(criterion, kappa, mt, lr, epochs)
        found = {"lr": lr, "updates": UPDATES * epochs, "accuracy": self.accuracy(model), "images": 2000}
        return {**found, **self.facts(masks)}

    def fine_tuned(self, criterion: str, kappa: float, mt: float) -> None:
        key = self.name, criterion, mt, kappa

        def compute() -> dict[str, Any]:
            if self.seed:
                return self.at_rate(criterion, kappa, mt, self.rates[key])
            if criterion != "gradual" and not min(self.mask(criterion, kappa, mt).kept().values()):
                return self.best_of(criterion, kappa, mt, only_first)  # a layer is empty: no rate helps
            return self.best_of(criterion, kappa, mt, climb)

        found = self.add("fine-tuned", criterion, mt, kappa, kappa, compute)
        self.rates.setdefault(key, found["lr"])

    def same_work(self, criterion: str, work: float) -> None:
        kappa = self.sparsity_at(criterion, work)
        ends = sorted(self.rates[self.name, criterion, 0.0, level] for level in SAME_WORK[work])
        candidates = [lr for lr in RATES if ends[0] <= lr <= ends[1]]
        key = self.name, criterion, "work", work

        def compute() -> dict[str, Any]:
            if self.seed:
                return self.at_rate(criterion, kappa, 0.0, self.rates[key])
            return self.best_of(criterion, kappa, 0.0, lambda right: {lr: right(lr) for lr in candidates})

        found = self.add("same work", criterion, 0.0, work, kappa, compute)
        self.rates.setdefault(key, found["lr"])

    def uniform_again(self) -> None:
        """Uniform keeps as much work as weights: two of its rows are at the same work as the others'."""
        tuned = [row for row in self.rows if (row["phase"], row["method"]) == ("fine-tuned", "uniform")]
        for row in tuned:
            if (work := round(1 - row["level"], 2)) in SAME_WORK:
                self.rows.append({**row, "phase": "same work", "level": work})

    def sparsity_at(self, criterion: str, work: float) -> float:
        """The sparsity at which a criterion keeps this share of the multiply-adds, by halving."""
        macs = self.macs.rename(lambda layer: f"{layer}.weight")
        low, high = 0.0, 1.0
        for _ in range(12):
            kappa = (low + high) / 2
            density = self.mask(criterion, kappa).densities()
            if (pd.Series(density) * macs).sum() > work * macs.sum():
                low = kappa
            else:
                high = kappa
        return round(high, 5)

    def longer(self, criterion: str) -> None:
        lr = self.rates[self.name, criterion, 0.0, 0.95]
        self.add("longer", criterion, 0.0, 0.95, 0.95, lambda: self.at_rate(criterion, 0.95, 0.0, lr, epochs=3))


def measure(m: Measurements) -> None:
    for (criterion, mt), levels in TUNED[m.name].items():
        for kappa in levels:
            m.fine_tuned(criterion, kappa, mt)
            if criterion != "gradual":
                m.at_once(criterion, kappa, mt)
    if m.name == "vgg-small":
        for work in SAME_WORK:
            for criterion in ("global", "ERK", "LAMP"):
                m.same_work(criterion, work)
        m.uniform_again()
        for criterion in LONGER:
            m.longer(criterion)


def build(out: Path, work: Path, seeds: int) -> list[Path]:
    from nbkit import datasets, papers, runtime

    runtime.deterministic(seed=0)
    method, data = papers.method("global-magnitude-pruning"), datasets.load("fashion-mnist")
    finished, rates = Work(work), {}
    found = [Measurements(method, name, k, data, finished, rates) for name in TUNED for k in range(seeds)]
    for m in found:
        measure(m)
    tables = {
        "results.csv": [row for m in found for row in m.rows],
        "rates.csv": [row for m in found for row in m.tried],
    }
    for name, rows in tables.items():
        write_table(out / name, pd.DataFrame(rows))
    return [out / name for name in tables]


if __name__ == "__main__":
    run(build, __doc__, work=work_option("global-magnitude-pruning"), seeds=seeds_option(3))
