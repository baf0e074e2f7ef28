"""<name>-seed<k>.safetensors: the small networks that notebooks load instead of training.

    python data/models/train.py                     # all of them, one after another (under an hour)
    python data/models/train.py tiny-vit-seed0      # one
    python data/models/train.py --steps 50 ...      # a short run, to see it work

One thread on the CPU. tiny-vit and small-cnn see all 60,000 training images of Fashion-MNIST (Debian's
dataset-fashion-mnist), the others the 10,000 shipped ones. lenet-300-100-mnist, 196-64-64-10 or with the width of
its variant, sees those of MNIST at 14 x 14, the means over squares of 2 x 2 pixels. The facts in a file's metadata:
``test_accuracy`` of the weights as stored, rounded to float16, on the test images, ``shipped_test_accuracy`` on the
2,000 of them that are shipped, ``seconds`` of processor time. The same machine and torch give the same weights; another
processor may differ in the last digits.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from nbkit import datasets, models, recipes, training


class Split(NamedTuple):
    train: tuple[torch.Tensor, torch.Tensor]
    test: tuple[torch.Tensor, torch.Tensor]
    shipped_test: tuple[torch.Tensor, torch.Tensor] | None = None
    """Where that is a part of ``test``."""


class Plan(NamedTuple):
    name: str
    data: Callable[[], Split]
    fit: dict
    """Settings of nbkit.training.fit."""
    config: dict = {}
    variant: str | None = None
    layout: torch.memory_format = torch.contiguous_format
    dataset: str = "fashion-mnist"
    inputs: str | None = None
    """What was done to the pictures of the data set; None where they are taken as they are."""
    seeds: tuple[int, ...] = (0, 1, 2)


@functools.cache
def whole() -> Split:
    x_train, y_train, x_test, y_test = map(torch.tensor, recipes.load("sets/fashion_mnist.py").full())
    return Split(
        (x_train[:, None].float() / 255, y_train.long()),
        (x_test[:, None].float() / 255, y_test.long()),
        shipped().test,
    )


@functools.cache
def shipped() -> Split:
    data = datasets.load("fashion-mnist")
    return Split((data.x_train, data.y_train), (data.x_test, data.y_test))


@functools.cache
def mnist() -> Split:
    data = datasets.load("mnist")
    return Split((data.x_train, data.y_train), (data.x_test, data.y_test))


@functools.cache
def pooled() -> Split:
    data = datasets.load("mnist")
    half = torch.nn.AvgPool2d(2)
    return Split((half(data.x_train), data.y_train), (half(data.x_test), data.y_test))


ADAMW = {"optimizer": "adamw", "batch": 64, "lr": 2e-3, "schedule": training.cosine(warmup=0.1)}
THREE = {"epochs": 3, "weight_decay": 1e-4, **ADAMW}
POOLED = "14 x 14: means over 2 x 2 pixels"
THIN = {"widths": [16, 16, 32, 32], "pool": [1, 3], "batch_norm": True}
NARROW = {"widths": [8, 16, 16, 16], "pool": [1, 2]}
PLANS = (
    Plan("tiny-vit", whole, {"epochs": 2, "weight_decay": 0.05, **ADAMW}),
    Plan("small-cnn", whole, THREE),
    Plan("small-cnn", shipped, THREE | {"epochs": 12}, THIN, "thin"),
    Plan("small-cnn", mnist, THREE | {"epochs": 20, "lr": 5e-3}, NARROW, dataset="mnist", seeds=tuple(range(10))),
    Plan("vgg-small", shipped, THREE, layout=torch.channels_last),
    Plan("mobilenet-small", shipped, THREE, {"width": 0.5}, layout=torch.channels_last),
    Plan("resnet-small", shipped, THREE | {"epochs": 6}, layout=torch.channels_last),
    Plan("tiny-swin", shipped, {"epochs": 8, "weight_decay": 0.05, **ADAMW}),
    *(
        Plan(
            "lenet-300-100", pooled, THREE | {"epochs": 12}, {"inputs": 196, "hidden": [width, width]}, variant,
            dataset="mnist", inputs=POOLED, seeds=seeds,
        )
        for width, variant, seeds in ((64, None, (0, 1, 2)), (32, "w32", (0,)), (128, "w128", (0,)))
    ),
)  # fmt: skip


def stem(plan: Plan, seed: int) -> str:
    """The name of a checkpoint's file; Fashion-MNIST, the usual data set, is left out."""
    dataset = None if plan.dataset == "fashion-mnist" else plan.dataset
    return "-".join(filter(None, (plan.name, dataset, plan.variant, f"seed{seed}")))


NAMES = {stem(plan, seed): (plan, seed) for plan in PLANS for seed in plan.seeds}


def train(plan: Plan, seed: int, steps: int | None = None) -> tuple[torch.nn.Module, dict]:
    """The trained network and the facts about it. Its weights are exact in float16."""
    split = plan.data()
    settings = dict(plan.fit) if steps is None else {k: v for k, v in plan.fit.items() if k != "epochs"}
    model = models.build(plan.name, seed=seed, **plan.config).to(memory_format=plan.layout)
    started = time.process_time()
    history = training.fit(model, split.train, steps=steps, seed=seed, desc=f"{plan.name}-seed{seed}", **settings)
    seconds = time.process_time() - started
    recipes.round_to_half(model)
    facts = {
        "recipe": "data/models/train.py",
        "dataset": plan.dataset,
        **({"inputs": plan.inputs} if plan.inputs else {}),
        "classes": list(datasets.about(plan.dataset).classes),
        "seed": seed,
        **({"variant": plan.variant} if plan.variant else {}),
        "settings": {k: v for k, v in settings.items() if isinstance(v, (int, float, str))},
        "train_examples": len(split.train[1]),
        "steps": len(history.loss),
        "test_examples": len(split.test[1]),
        "test_accuracy": round(training.accuracy(model, *split.test, batch=128), 4),
        "seconds": round(seconds),
        "torch": torch.__version__,
    }
    if split.shipped_test:
        facts["shipped_test_accuracy"] = round(training.accuracy(model, *split.shipped_test, batch=128), 4)
    return model, facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(NAMES)}")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder (default: the recipe's)")
    parser.add_argument("--steps", type=int, help="stop early, for a trial")
    args = parser.parse_args()
    if unknown := set(args.names) - set(NAMES):
        parser.error(f"no plan for {', '.join(sorted(unknown))}; there is {', '.join(NAMES)}")
    torch.set_num_threads(1)
    for chosen in args.names or NAMES:
        plan, seed = NAMES[chosen]
        model, facts = train(plan, seed, args.steps)
        path = args.out / f"{chosen}.safetensors"
        models.save_checkpoint(path, model.half(), plan.name, plan.config, **facts)
        data = path.read_bytes()
        print(json.dumps({"file": path.name, "sha256": recipes.sha256(data), "bytes": len(data)} | facts), flush=True)


if __name__ == "__main__":
    main()
