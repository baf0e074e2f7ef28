"""Every measurement of notebooks/06-pruning/03-global-magnitude-pruning, with its method cells.

results.csv: accuracy at once after pruning, with BatchNorm measured afresh, after a short fine-tuning, and after
gradual pruning, of the dense networks in data/models. About 15 minutes on one core; a stopped run goes on where it was
(delete the folder --work for a fresh start). The same machine and torch give the same figures; another processor may
differ in the last digits.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterable
from pathlib import Path

import pandas as pd
import torch

from nbkit import models
from nbkit.recipes import Work, run, seeds_option, work_option, write_table

NETWORKS = ("mobilenet-small", "vgg-small")
ONE_SHOT = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
FINE_TUNED = (0.8, 0.95, 0.99)
RECALIBRATED = (0.8, 0.9, 0.95, 0.98)
MT_LEVELS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
MT_FINE_TUNED = (0.8, 0.95)  # and the level of collapse
TRAIN, BATCH, SNIP = 1500, 512, 256  # images to fine-tune on, for BatchNorm, for SNIP
TEST = 1000  # images, without fine-tuning; all 2,000 with it


class Measurements:
    """The rows of one network and seed."""

    def __init__(self, method, name: str, seed: int, data, work: Work):
        from nbkit import sparsity

        self.method, self.name, self.seed, self.data, self.work = method, name, seed, data, work
        self.model = models.load(name, seed=seed).to(memory_format=torch.channels_last)
        self.cost, self.rows = sparsity.flops(self.model, data.x_test[:1]), []
        self.few = data.x_train[:TRAIN], data.y_train[:TRAIN]
        self.masks: dict = {}

    def mask(self, criterion: str, kappa: float):
        if (criterion, kappa) not in self.masks:
            few = self.data.x_train[:SNIP], self.data.y_train[:SNIP]
            self.masks[criterion, kappa] = self.method.prune(
                self.model, criterion, kappa, few, seed=self.seed
            )
        return self.masks[criterion, kappa]

    def accuracy(self, model, images: int) -> float:
        from nbkit import training

        return training.accuracy(model, self.data.x_test[:images], self.data.y_test[:images], batch=128)

    def measure(self, phase: str, criteria: Iterable[str], levels: Iterable[float], way: Callable) -> None:
        """A row for each criterion and level; ``way`` gives a model, its masks and how many test images it sees."""

        def compute(criterion: str, kappa: float) -> dict:
            model, masks, images = way(criterion, kappa)
            kept = masks.kept()
            return {
                "accuracy": round(self.accuracy(model, images), 4),
                "images": images,
                "kept": sum(kept.values()),
                "work": round(self.method.work_kept(masks, self.cost), 5),
                "least": min(kept.values()),
                "short": len(self.method.below_minimum(masks)),
            }

        for criterion, kappa in itertools.product(criteria, levels):
            key = {"model": self.name, "seed": self.seed, "phase": phase, "criterion": criterion, "kappa": kappa}
            name = "-".join(map(str, key.values()))
            self.rows.append(key | self.work.once(name, functools.partial(compute, criterion, kappa)))

    def one_shot(self, criterion: str, kappa: float):
        masks = self.mask(criterion, kappa)
        return masks.apply(copy.deepcopy(self.model), keep_original=False), masks, TEST

    def recalibrated(self, criterion: str, kappa: float):
        model, masks, images = self.one_shot(criterion, kappa)
        return self.method.recalibrate(model, self.data.x_train[:BATCH]), masks, images

    def fine_tuned(self, criterion: str, kappa: float):
        masks = self.mask(criterion, kappa)
        model = self.method.fine_tune(self.model, masks, self.few, seed=self.seed)
        return model, masks, len(self.data.y_test)

    def gradual(self, _, kappa: float):
        return *self.method.gradual(self.model, kappa, self.few, seed=self.seed), len(self.data.y_test)

    def collapse_level(self) -> float:
        """The lowest of MT_LEVELS at which Global MP leaves some layer below the minimum of the script."""
        return next(k for k in MT_LEVELS if self.method.below_minimum(self.mask("global", k)))


def vgg(m: Measurements) -> None:
    criteria = m.method.CRITERIA
    m.measure("fine-tuned", criteria, FINE_TUNED, m.fine_tuned)
    m.measure("fine-tuned", m.method.REPAIRS, FINE_TUNED[-1:], m.fine_tuned)
    m.measure("fine-tuned", ["gradual"], FINE_TUNED, m.gradual)
    m.measure("one-shot", criteria, ONE_SHOT, m.one_shot)
    m.measure("recalibrated", criteria, RECALIBRATED, m.recalibrated)


def mobilenet(m: Measurements, collapsed: float) -> None:
    criteria = ("global", *m.method.REPAIRS, "uniform")
    m.measure("one-shot", criteria, MT_LEVELS, m.one_shot)
    m.measure("recalibrated", criteria, MT_LEVELS, m.recalibrated)
    m.measure("fine-tuned", criteria, sorted({collapsed, *MT_FINE_TUNED}), m.fine_tuned)


def build(out: Path, work: Path, seeds: int) -> list[Path]:
    from nbkit import datasets, papers, runtime

    runtime.deterministic(seed=0)
    method, data = papers.method("global-magnitude-pruning"), datasets.load("fashion-mnist")
    finished = Work(work)
    keys = [(name, k) for name in NETWORKS for k in range(seeds)]
    found = {key: Measurements(method, *key, data, finished) for key in keys}
    collapsed = max(m.collapse_level() for (name, _), m in found.items() if name == "mobilenet-small")
    for (name, _), m in found.items():
        vgg(m) if name == "vgg-small" else mobilenet(m, collapsed)
    table = out / "results.csv"
    write_table(table, pd.DataFrame([row for m in found.values() for row in m.rows]))
    return [table]


if __name__ == "__main__":
    run(build, __doc__, work=work_option("global-magnitude-pruning"), seeds=seeds_option(3))
