"""small-cnn-<narrow, robust>-seed0.safetensors: twins, one of which was trained on attacked pictures.

    python data/models/robust_twins.py                   # both, two minutes
    python data/models/robust_twins.py --steps 20 --out /tmp/trial --work /tmp/trial     # to see it work

Both start from the same weights and see the same 10,000 shipped images of Fashion-MNIST in the same order. ``robust``
sees each batch after projected gradient ascent of the loss (PGD, 5 steps, L_inf), within a radius that grows from 0 to
0.1 during the first half of the training and then stays. Other seeds than 0 are not shipped: ``twins(seed, work)``
trains them, two minutes a pair on one core, and keeps them in the folder ``work``. The learning rate was chosen on
seed 9, of three for ``narrow`` and two for ``robust``: the highest, which was the most accurate for both.

The facts in a file's metadata, of the weights as stored, rounded to float16, on the 2,000 shipped test images:
``test_accuracy``; ``mean_confidence``, of the class that is called; on the first 1,000 ``attacked_accuracy``, under
PGD with 20 steps from a random place, radius 0.1.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from nbkit import datasets, models, recipes, training

CONFIG = {"widths": [16, 32, 64]}
VARIANTS = ("narrow", "robust")
SHIPPED = 0
STEPS = 600
EPS = 0.1
ASCENT = 5
SETTINGS = {"batch": 64, "lr": 8e-3, "optimizer": "adamw", "weight_decay": 1e-4}


def attacks(steps: int, eps: float = EPS) -> Callable:
    """What ``training.fit`` takes as ``adversary``; for one training of ``steps`` steps."""
    done = itertools.count()

    def attack(model, x, y, generator):
        radius = eps * min(1.0, 2 * next(done) / steps)
        return training.pgd(model, x, y, eps=radius, steps=ASCENT, generator=generator)

    return attack


def measured(model: torch.nn.Module, tested: int = 1000) -> dict[str, float]:
    data = datasets.load("fashion-mnist")
    x, y = data.x_test[:tested], data.y_test[:tested]
    attacked = training.pgd(model, x, y, eps=EPS, steps=20, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        called = model(data.x_test).softmax(1).amax(1)
    found = {
        "test_accuracy": training.accuracy(model, data.x_test, data.y_test),
        "attacked_accuracy": training.accuracy(model, attacked, y),
        "mean_confidence": called.mean().item(),
    }
    return {name: round(value, 4) for name, value in found.items()}


def train(variant: str, seed: int, steps: int = STEPS) -> tuple[torch.nn.Module, dict]:
    """The network, its weights exact in float16, and the facts about it."""
    data = datasets.load("fashion-mnist")
    model = models.build("small-cnn", seed=seed, **CONFIG)
    began = time.process_time()
    training.fit(
        model,
        (data.x_train, data.y_train),
        steps=steps,
        schedule=training.cosine(warmup=0.1),
        adversary=attacks(steps) if variant == "robust" else None,
        seed=seed,
        **SETTINGS,
    )
    seconds = time.process_time() - began
    recipes.round_to_half(model)
    facts = {
        "recipe": "data/models/robust_twins.py",
        "dataset": "fashion-mnist",
        "classes": list(datasets.about("fashion-mnist").classes),
        "seed": seed,
        "variant": variant,
        "settings": SETTINGS | ({"eps": EPS, "ascent": ASCENT} if variant == "robust" else {}),
        "train_examples": len(data.y_train),
        "steps": steps,
        "test_examples": len(data.y_test),
        **measured(model.eval()),
        "seconds": round(seconds),
        "torch": torch.__version__,
    }
    return model, facts


def checkpoint(variant: str, seed: int, folder: Path, steps: int = STEPS) -> Path:
    """The file of a twin in ``folder``, trained where it is not there yet."""
    path = folder / f"small-cnn-{variant}-seed{seed}.safetensors"
    if not path.is_file():
        model, facts = train(variant, seed, steps)
        models.save_checkpoint(path, model.half(), "small-cnn", CONFIG, **facts)
        print(json.dumps({"file": path.name} | facts), flush=True)
    return path


def twins(seed: int, work: Path) -> dict[str, tuple[torch.nn.Module, dict]]:
    """{variant: (network in evaluation mode, its facts)}; the shipped ones for the seed that is shipped."""
    folder = Path(__file__).parent if seed == SHIPPED else work
    return {variant: models.load_checkpoint(checkpoint(variant, seed, folder)) for variant in VARIANTS}


def build(out: Path, steps: int, work: Path) -> list[Path]:
    torch.set_num_threads(1)
    paths = []
    for variant in VARIANTS:
        kept = checkpoint(variant, SHIPPED, work, steps)
        paths.append(out / kept.name)
        recipes.write_bytes(paths[-1], kept.read_bytes())
    return paths


if __name__ == "__main__":
    recipes.run(
        build,
        __doc__,
        steps={"type": int, "default": STEPS, "help": f"fewer, for a trial (default: {STEPS})"},
        work=recipes.work_option("robust-twins"),
    )
