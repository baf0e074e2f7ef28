"""The full measurement of notebooks/02-concepts/01-craft on Fashion-MNIST.

- results.csv: ten classes of three small-cnn seeds, five rules of importance: area under the concept deletion and
  insertion curves (class logit) of held-out test images.
- banks.csv: for each of these banks the relative error on crops and on maps, the accuracy on held-out images with
  the maps and with their reconstruction, the same for a bank fitted to the places of 32 maps, and the rank correlation
  of Sobol indices from 32 and from 128 design rows.
- maps.csv: how far a concept's coefficient falls when pixels go in the order of its presence map or of a concept
  attribution map (area under the curve over its value at the start); eight held-out images, the concept with the
  largest Sobol index.

    python data/papers/craft/recipe.py

The functions are the notebook's own method cells. One thread; about six minutes of processor time.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import torch
from scipy.stats import spearmanr

from nbkit import attribution, concepts, faithfulness
from nbkit.recipes import run, write_table

SEEDS, CLASSES = (0, 1, 2), range(10)
LAYER, PATCH, CONCEPTS = "relu3", 14, 10
IMAGES = 8  # a bank, for the pixel deletion


def class_bank(method, model, x: torch.Tensor, seed: int):
    """The bank of a class from crops of its images, and the head on its codes."""
    bank = method.fit_bank(model, LAYER, method.extract_crops(x, PATCH, to=28)[0], CONCEPTS, seed=seed)
    return bank, method.head_on_codes(after(model), bank.dictionary)


def after(model):
    return model[[name for name, _ in model.named_children()].index(LAYER) + 1 :]


def measure(method, model, data, c: int, seed: int) -> tuple[list[dict], dict, list[dict]]:
    """The rows of craft.csv, craft-banks.csv and craft-maps.csv for one class of one network."""
    x, held = method.draw_class(model, data, c, seed)
    bank, logits = class_bank(method, model, x, seed)
    few_maps, maps = method.latent(model, LAYER, x[:32]), method.latent(model, LAYER, held)
    U, V = bank.encode(few_maps), bank.encode(maps)
    places = concepts.factorize(few_maps, CONCEPTS, seed=seed, init="random", max_iter=1000, tol=1e-3)
    decide = method.head_on_codes(after(model), places.dictionary)
    with torch.no_grad():
        full, kept = model(held).argmax(1) == c, logits(V).argmax(1) == c
        kept_places = decide(places.encode(maps)).argmax(1) == c
    found = []
    importances = method.importances(logits, U, c, seed=seed)
    for rule, importance in importances.items():
        curves = method.concept_curves(logits, V[full], method.orders(importance, seed=seed), c)
        areas = torch.trapezoid(curves, dx=1 / CONCEPTS).mean(1).tolist()
        found.append({"seed": seed, "label": c, "rule": rule, "deletion": areas[0], "insertion": areas[1]})
    few, many = (method.importances(logits, U, c, n=n, seed=seed + n)["sobol"] for n in (32, 128))
    facts = {"seed": seed, "label": c, "error_crops": bank.error, "error_maps": error(bank, V, maps),
             "error_places": error(places, places.encode(maps), maps), "accuracy": full.float().mean().item(),
             "kept": kept.float().mean().item(), "kept_places": kept_places.float().mean().item(),
             "spearman": spearmanr(few, many).statistic}  # fmt: skip
    code = method.ConceptCode(model, LAYER, bank.dictionary)
    left = pixel_deletion(code, held, V, int(importances["sobol"].argmax()), seed)
    return found, facts, [{"seed": seed, "label": c, **row} for row in left]


def error(bank, codes: torch.Tensor, maps: torch.Tensor) -> float:
    return ((bank.decode(codes) - maps).norm() / maps.norm()).item()


def attribution_maps(code, x: torch.Tensor, u: torch.Tensor, k: int, seed: int) -> dict[str, torch.Tensor]:
    """Maps [N, 28, 28] for concept k of images x: where it is present (u [N, 7, 7]), what its coefficient rests on."""
    cam = attribution.grad_cam(code, x, k, layer="model.relu2", size=(28, 28))
    return {
        "presence": attribution.upsample(u, (28, 28)),
        "gradient": attribution.saliency(code, x, k).abs().sum(1),
        "SmoothGrad": attribution.smooth_grad(code, x, k, seed=seed).abs().sum(1),
        "integrated gradients": attribution.integrated_gradients(code, x, k, steps=20).abs().sum(1),
        "Grad-CAM at relu2": cam,
        "random": torch.rand(len(x), 28, 28, generator=torch.Generator().manual_seed(seed)),
    }


def pixel_deletion(code, held: torch.Tensor, V: torch.Tensor, k: int, seed: int) -> list[dict]:
    """The images of ``held``, with codes ``V``, on which concept ``k`` shows most; one row for each kind of map."""
    presence = V[:, k]
    shown = presence.flatten(1).sum(1).topk(IMAGES).indices
    rows = []
    for name, maps in attribution_maps(code, held[shown], presence[shown], k, seed).items():
        curve = faithfulness.deletion(code, held[shown], maps, k, steps=14, probability=False)
        left = (curve.auc / curve.scores[:, 0]).mean().item()
        rows.append({"map": name, "deletion": left})
    return rows


def build(out: Path) -> list[Path]:
    from nbkit import datasets, models, papers, runtime

    runtime.deterministic(seed=0)
    method, data = papers.method("craft"), datasets.load("fashion-mnist")
    rules, banks, maps = [], [], []
    for seed in SEEDS:
        model = models.load("small-cnn", seed=seed)
        for c in CLASSES:
            found, facts, left = measure(method, model, data, c, seed)
            rules, banks, maps = rules + found, [*banks, facts], maps + left
    paths = []
    for name, rows in {"results": rules, "banks": banks, "maps": maps}.items():
        paths.append(out / f"{name}.csv")
        write_table(paths[-1], pd.DataFrame(rows), float_format="%.6g")
    return paths


if __name__ == "__main__":
    run(build, __doc__)
