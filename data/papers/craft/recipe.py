"""Everything notebooks/02-concepts/01-craft measures on Fashion-MNIST: rules of importance, banks, maps, recursion.

- results.csv: ten classes of three small-cnn networks, cut at two layers; areas under concept deletion and insertion
  (logit of the class, test images named correctly) for nine rules of importance. Every rule sees the same images.
- banks.csv: for the same banks, for larger ones and for banks fitted to places: relative errors, the share of the 200
  test images that the network names right, that h(UW) gives the class's name, and on which the two agree.
- convergence.csv: rank correlation of Sobol indices from 32 design rows, scrambled or not, with those from 128.
- maps.csv: what is left of a concept's code while pixels go in the order of nine maps, with two fillings.
- parts.csv: networks trained on three groups of garments; how well the parts of a concept tell the garments apart that
  the labels hid, for parts fitted at the concept's own layer and at two earlier ones.

    python data/papers/craft/recipe.py

The functions are the notebook's own method cells. One thread; about ten minutes of processor time.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import torch
from scipy.stats import spearmanr
from sklearn.metrics import adjusted_mutual_info_score

from nbkit import attribution, concepts, datasets, faithfulness, models, papers, training
from nbkit.recipes import run, write_table

SEEDS, CLASSES = (0, 1, 2), range(10)
EXPLAINED = {"relu3": 32, "pool2": 16}  # images a rule may look at; a pass behind pool2 costs eight times as much
JUDGED = {"relu3": 200, "pool2": 100}  # test images of the curves
PATCH, SIDE, CONCEPTS = 14, 28, 10
IMAGES = 128  # a bank
SHOWN = 8  # images a bank, for the maps
GROUPS = {"tops": (0, 2, 4, 6), "shoes": (5, 7, 9), "others": (1, 3, 8)}
PARTS = {"relu4": "same layer", "relu3": "relu3", "pool2": "pool2"}


def after(model, layer: str):
    """What follows a layer."""
    return model[place(model, layer) :]


def upto(model, layer: str):
    """A network up to a layer and with it: a Sequential of its own."""
    return model[: place(model, layer)]


def place(model, layer: str) -> int:
    return [name for name, _ in model.named_children()].index(layer) + 1


def draw_class(model, data, c: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images that the model calls c, of 2,000 training images that no other seed sees; all test images labelled c."""
    some = data.x_train[2000 * seed : 2000 * (seed + 1)]
    with torch.no_grad():
        called = torch.cat([model(part).argmax(1) for part in some.split(200)])
    return some[called == c][:IMAGES], data.x_test[data.y_test == c]


def measure_bank(method, model, x, held, layer: str, c: int, seed: int):
    """The rows of results.csv, banks.csv, convergence.csv and maps.csv for one bank; x and held from draw_class."""
    g, head = upto(model, layer), after(model, layer)
    crops, _ = method.extract_crops(x, PATCH, to=SIDE)
    bank = method.fit_bank(g, crops, CONCEPTS, seed=seed)
    maps, logits = method.latent(g, held), concepts.head_on_codes(head, bank)
    U, V = bank.encode(method.latent(g, x[: EXPLAINED[layer]])), bank.encode(maps)
    where = {"layer": layer, "seed": seed, "label": c}
    with torch.no_grad():
        named = model(held).argmax(1)
    banks = [where | {"bank": "crops"} | facts(bank, head, maps, named, c)]
    rules = method.importances(logits, U, c, seed=seed) | {"random": torch.zeros(CONCEPTS)}
    judged, found = V[named == c][: JUDGED[layer]], []
    for rule, importance in rules.items():
        curves = method.concept_curves(logits, judged, method.orders(importance, seed=seed), c)
        deletion, insertion = torch.trapezoid(curves, dx=1 / CONCEPTS).mean(1).tolist()
        found.append(where | {"rule": rule, "deletion": deletion, "insertion": insertion})
    if layer == "pool2":
        return found, banks, [], []
    larger = method.fit_bank(g, crops, 2 * CONCEPTS, seed=seed)
    some = method.latent(g, x[:32])
    places = concepts.factorize(some, CONCEPTS, seed=seed, init="random", max_iter=1000, tol=1e-3)
    for name, other in (("crops, 20 concepts", larger), ("places", places)):
        banks.append(where | {"bank": name} | facts(other, head, maps, named, c))
    left = pixel_deletion(g, bank, x, held, V, int(rules["Sobol"].argmax()), seed)
    return found, banks, convergence(method, logits, U[:16], where), [where | row for row in left]


def facts(bank, head, maps: torch.Tensor, named: torch.Tensor, c: int) -> dict:
    codes = bank.encode(maps)
    with torch.no_grad():
        again = concepts.head_on_codes(head, bank)(codes).argmax(1)
    error = (bank.decode(codes) - maps).norm() / maps.norm()
    return {
        "error_fit": bank.error, "error_maps": error.item(), "accuracy": share(named == c), "named": share(again == c),
        "agreement": share(again == named),
    }  # fmt: skip


def share(true: torch.Tensor) -> float:
    return true.float().mean().item()


def convergence(method, logits, U, where: dict) -> list[dict]:
    """32 rows against 128, independent scrambles; and the design of the public code, which is not scrambled."""

    def sobol(n: int, **options) -> torch.Tensor:
        with torch.no_grad():
            each = [
                method.total_sobol(lambda m, u=u: logits(u * m.float()[..., None, None])[:, c], CONCEPTS, n, **options)
                for u in U.split(1)
            ]
        return torch.stack(each).nanmean(0)

    seed, c = where["seed"], where["label"]
    many = sobol(128, seed=seed + 128)
    designs = {"scrambled": {"seed": seed + 32}, "as published": {"scramble": False}}
    return [
        where | {"design": design, "spearman": spearmanr(sobol(32, **options), many).statistic}
        for design, options in designs.items()
    ]


def attribution_maps(code, x: torch.Tensor, u: torch.Tensor, k: int, seed: int) -> dict[str, torch.Tensor]:
    """Maps [N, 28, 28] for concept k of images x: where it is present (u [N, 7, 7]), what its code rests on."""
    size = (SIDE, SIDE)
    path = attribution.integrated_gradients(code, x, k, steps=20).sum(1)
    return {
        "presence": attribution.upsample(u, size),
        "gradient": attribution.saliency(code, x, k).abs().sum(1),
        "SmoothGrad": attribution.smooth_grad(code, x, k, seed=seed).abs().sum(1),
        "gradient x input": attribution.input_x_gradient(code, x, k).sum(1),
        "integrated gradients": path,
        "|integrated gradients|": path.abs(),
        "Grad-CAM": attribution.grad_cam(code, x, k, layer="relu2", size=size),
        "occlusion": attribution.occlusion(code, x, k, window=4, stride=2).sum(1),
        "random": torch.rand(len(x), *size, generator=torch.Generator().manual_seed(seed)),
    }


def pixel_deletion(g, bank, x, held, V, k: int, seed: int) -> list[dict]:
    """On the test images where concept ``k`` shows most: its code, as a share of its start, while pixels go."""
    code = upto(g, "relu3").append(papers.method("craft").Codes(bank.dictionary))
    shown = V[:, k].flatten(1).sum(1).topk(SHOWN).indices
    rows = []
    for name, maps in attribution_maps(code, held[shown], V[shown, k], k, seed).items():
        for filling, fill in (("black", 0.0), ("mean image", x.mean(0))):
            curve = faithfulness.deletion(code, held[shown], maps, k, steps=14, fill=fill, probability=False)
            rows.append({"map": name, "filling": filling, "left": (curve.auc / curve.scores[:, 0]).mean().item()})
    return rows


def recursion(method, data, seed: int) -> list[dict]:
    """A network that was told groups of garments only: do the parts of a concept bring the garments back?"""
    garment = data.y_train
    group = torch.tensor([next(g for g, name in enumerate(GROUPS) if c in GROUPS[name]) for c in range(10)])[garment]
    net = models.build("small-cnn", seed=seed, widths=(16, 32, 64, 64), classes=len(GROUPS))
    training.fit(net, (data.x_train, group), epochs=4, lr=2e-3, batch=64, seed=seed)
    net.eval()
    right = training.accuracy(net, data.x_train, group)
    rows = []
    for g, name in enumerate(GROUPS):
        chosen = torch.randperm(len(group), generator=torch.Generator().manual_seed(seed))
        chosen = chosen[group[chosen] == g][:240]
        chosen = chosen[net(data.x_train[chosen]).argmax(1) == g]
        crops, source = method.extract_crops(data.x_train[chosen], PATCH, to=SIDE)
        bank = method.fit_bank(upto(net, "relu4"), crops, 5, seed=seed)
        for k in range(bank.k):
            for layer, label in PARTS.items():
                rows_k, parts = method.sub_concepts(upto(net, layer), crops, bank.codes[:, k], 3, seed=seed)
                hidden = garment[chosen[source[rows_k]]]
                strongest = (parts.codes / parts.codes.mean(0)).argmax(1)
                ami = adjusted_mutual_info_score(hidden, strongest)
                largest = hidden.bincount().max().item() / len(hidden)
                rows.append({"seed": seed, "group": name, "accuracy": right, "concept": k, "parts": label, "ami": ami,
                             "largest": largest})  # fmt: skip
    return rows


def build(out: Path) -> list[Path]:
    from nbkit import runtime

    runtime.deterministic(seed=0)
    method, data = papers.method("craft"), datasets.load("fashion-mnist")
    tables = {name: [] for name in ("results", "banks", "convergence", "maps", "parts")}
    for seed in SEEDS:
        model = models.load("small-cnn", seed=seed)
        for c in CLASSES:
            x, held = draw_class(model, data, c, seed)
            for layer in EXPLAINED:
                found = measure_bank(method, model, x, held, layer, c, seed)
                for name, rows in zip(tables, found, strict=False):
                    tables[name] += rows
        tables["parts"] += recursion(method, data, seed)
    paths = []
    for name, rows in tables.items():
        paths.append(out / f"{name}.csv")
        write_table(paths[-1], pd.DataFrame(rows), float_format="%.6g")
    return paths


if __name__ == "__main__":
    run(build, __doc__)
