"""results/global-magnitude-pruning.csv and the checkpoints of vgg-small and mobilenet-small, three seeds each.

Dense training on the 10,000 shipped Fashion-MNIST images (three epochs), then every measurement of
notebooks/06-pruning/03-global-magnitude-pruning, whose method cells this uses: accuracy at once after pruning, with
BatchNorm measured afresh, after a short fine-tuning, and after gradual pruning. About 20 minutes on one core; a run
that was stopped goes on where it was (delete the folder --work for a fresh start). The same machine and torch give
the same figures; another processor may differ in the last digits.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pandas as pd
import torch
from _recipe import Work, round_to_half, run, seeds_option, work_option, write_bytes, write_table

PLANS = {"mobilenet-small": {"width": 0.5}, "vgg-small": {}}
FIT = {"epochs": 3, "batch": 64, "lr": 2e-3, "optimizer": "adamw", "weight_decay": 1e-4}
ONE_SHOT = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
FINE_TUNED = (0.8, 0.95, 0.99)
RECALIBRATED = (0.8, 0.9, 0.95, 0.98)
MT_LEVELS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
MT_FINE_TUNED = (0.8, 0.95)  # and the level of collapse
TRAIN, BATCH, SNIP = 1500, 512, 256  # images to fine-tune on, for BatchNorm, for SNIP
TEST = 1000  # images, without fine-tuning; all 2,000 with it


def train(name: str, seed: int, data, path: Path) -> None:
    """A dense network, stored in float16 and measured as stored."""
    from nbkit import training
    from nbkit.models import _zoo

    model = _zoo.build(name, seed=seed, **PLANS[name]).to(memory_format=torch.channels_last)
    began = time.process_time()
    schedule = training.cosine(warmup=0.1)
    history = training.fit(model, (data.x_train, data.y_train), schedule=schedule, seed=seed, **FIT)
    seconds = time.process_time() - began
    round_to_half(model)
    facts = {
        "recipe": "data/recipes/global_magnitude_pruning.py",
        "dataset": "fashion-mnist",
        "classes": list(data.classes),
        "seed": seed,
        "settings": FIT,
        "train_examples": len(data.y_train),
        "steps": len(history.loss),
        "test_examples": len(data.y_test),
        "test_accuracy": round(training.accuracy(model, data.x_test, data.y_test, batch=128), 4),
        "seconds": round(seconds),
        "torch": torch.__version__,
    }
    _zoo.save_checkpoint(path, model.half(), name, PLANS[name], **facts)
    print(json.dumps({"file": path.name, **facts}), flush=True)


class Measurements:
    """The rows of one network and seed."""

    def __init__(self, method, name: str, seed: int, path: Path, data, work: Work):
        from nbkit import sparsity
        from nbkit.models import _zoo

        self.method, self.name, self.seed, self.data, self.work = method, name, seed, data, work
        self.model = _zoo.load_checkpoint(path)[0].to(memory_format=torch.channels_last)
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
    paths = {(name, k): out / "checkpoints" / f"{name}-seed{k}.safetensors" for name in PLANS for k in range(seeds)}
    for (name, seed), path in paths.items():
        trained = work / path.name
        if not trained.is_file():
            train(name, seed, data, trained)
        write_bytes(path, trained.read_bytes())
    found = {key: Measurements(method, *key, path, data, finished) for key, path in paths.items()}
    collapsed = max(m.collapse_level() for (name, _), m in found.items() if name == "mobilenet-small")
    for (name, _), m in found.items():
        vgg(m) if name == "vgg-small" else mobilenet(m, collapsed)
    table = out / "results" / "global-magnitude-pruning.csv"
    write_table(table, pd.DataFrame([row for m in found.values() for row in m.rows]))
    return [table, *paths.values()]


if __name__ == "__main__":
    run(build, __doc__, work=work_option("global-magnitude-pruning"), seeds=seeds_option(3))
