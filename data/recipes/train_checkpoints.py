"""checkpoints/<name>-seed<k>.safetensors: the small networks that notebooks load instead of training.

    python data/recipes/train_checkpoints.py                     # all of them, one after another (under an hour)
    python data/recipes/train_checkpoints.py tiny-vit-seed0      # one
    python data/recipes/train_checkpoints.py --steps 50 ...      # a short run, to see it work

One thread on the CPU. The Fashion-MNIST networks see all 60,000 training images (Debian's dataset-fashion-mnist). The
facts in a file's metadata: ``test_accuracy`` of the weights as stored, rounded to float16, on the 10,000 test images,
``shipped_test_accuracy`` on the 2,000 of them that are shipped, ``seconds`` of processor time. The same machine and
torch give the same weights; another processor may differ in the last digits.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from _recipe import ROOT, round_to_half, sha256
from fashion_mnist import full

from nbkit import datasets, training
from nbkit.models import _zoo


class Split(NamedTuple):
    train: tuple[torch.Tensor, torch.Tensor]
    test: tuple[torch.Tensor, torch.Tensor]
    shipped_test: tuple[torch.Tensor, torch.Tensor]


class Plan(NamedTuple):
    architecture: str
    config: dict
    dataset: str
    data: Callable[[], Split]
    fit: dict
    """Settings of nbkit.training.fit."""


def fashion() -> Split:
    x_train, y_train, x_test, y_test = (torch.tensor(a) for a in full())
    shipped = datasets.load("fashion-mnist")
    return Split(
        (x_train[:, None].float() / 255, y_train.long()),
        (x_test[:, None].float() / 255, y_test.long()),
        (shipped.x_test, shipped.y_test),
    )


COSINE = {"optimizer": "adamw", "batch": 64, "schedule": training.cosine(warmup=0.1)}
TINY_VIT = Plan(
    "tiny-vit", {}, "fashion-mnist", fashion, {"epochs": 2, "lr": 2e-3, "weight_decay": 0.05, **COSINE}
)
SMALL_CNN = Plan(
    "small-cnn", {}, "fashion-mnist", fashion, {"epochs": 3, "lr": 2e-3, "weight_decay": 1e-4, **COSINE}
)
PLANS = {f"{plan.architecture}-seed{k}": (plan, k) for plan in (TINY_VIT, SMALL_CNN) for k in range(3)}


def train(name: str, steps: int | None = None) -> tuple[torch.nn.Module, dict]:
    """The trained network and the facts about it. Its weights are exact in float16."""
    plan, seed = PLANS[name]
    split = plan.data()
    settings = dict(plan.fit) if steps is None else {k: v for k, v in plan.fit.items() if k != "epochs"}
    model = _zoo.build(plan.architecture, seed=seed, **plan.config)
    started = time.process_time()
    history = training.fit(model, split.train, steps=steps, seed=seed, desc=name, **settings)
    seconds = time.process_time() - started
    round_to_half(model)
    facts = {
        "recipe": "data/recipes/train_checkpoints.py",
        "dataset": plan.dataset,
        "classes": list(datasets.about(plan.dataset).classes),
        "seed": seed,
        "settings": {k: v for k, v in settings.items() if isinstance(v, (int, float, str))},
        "train_examples": len(split.train[1]),
        "steps": len(history.loss),
        "test_examples": len(split.test[1]),
        "test_accuracy": round(training.accuracy(model, *split.test), 4),
        "shipped_test_accuracy": round(training.accuracy(model, *split.shipped_test), 4),
        "seconds": round(seconds),
        "torch": torch.__version__,
    }
    return model, facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(PLANS)}")
    parser.add_argument("--out", type=Path, default=ROOT / "data", help="folder to write to (default: data/)")
    parser.add_argument("--steps", type=int, help="stop early, for a trial")
    args = parser.parse_args()
    if unknown := set(args.names) - set(PLANS):
        parser.error(f"no plan for {', '.join(sorted(unknown))}; there is {', '.join(PLANS)}")
    torch.set_num_threads(1)
    for name in args.names or PLANS:
        plan, _ = PLANS[name]
        model, facts = train(name, args.steps)
        path = args.out / "checkpoints" / f"{name}.safetensors"
        _zoo.save_checkpoint(path, model.half(), plan.architecture, plan.config, **facts)
        file = {
            "file": f"checkpoints/{path.name}",
            "sha256": sha256(path.read_bytes()),
            "bytes": path.stat().st_size,
        }
        print(json.dumps(file | facts), flush=True)


if __name__ == "__main__":
    main()
