"""Everything notebooks/02-concepts/02-holistic-concepts measures: dictionaries, and the importance of their concepts.

Three small-cnn networks, three classes (shirt, bag, ankle boot), the places of two layers, ten concepts; every network
has training images of its own, in two halves, and is judged on test images that it gives the class.

- extraction.csv: a dictionary's error, sparsity, FID and OOD on held-out places, its error on its own, and the cosines
  of two dictionaries of disjoint halves; for random ones the mean of 20 draws, for other starts the cosines alone, for
  real places FID and OOD of another half.
- importance.csv: a network and rule (mean of its classes): C-Deletion, C-Insertion, C-muFidelity of the logit; each
  image its own order, or one order a class; with the best and the mean order there is.
- signs.csv: in how many of a bank's 32 images a rule's area is better, and worse, than a rival's.
- again.csv: in how many test images dictionaries of the two halves name the same top concept, at relu4; by lot; the
  adjusted mutual information of the two groupings; the share of images that the first one's leading concept has, the
  share of its partner in the second, and the cosine of the two. Added after the rules; no claim rests on it.
- chance.csv: how often orders drawn by lot pass the rule of the claim on importance.

    python data/papers/holistic-concepts/recipe.py

The functions are the notebook's own method cells. One thread; about four minutes of processor time. A run that was
stopped goes on where it was (delete the folder --work for a fresh start).
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pandas as pd
import torch
from scipy.optimize import linear_sum_assignment
from scipy.stats import binom
from sklearn.metrics import adjusted_mutual_info_score

from nbkit import concepts, datasets, models, papers
from nbkit.recipes import Work, run, seeds_option, work_option, write_table

SLUG = "holistic-concepts"
CLASSES = (6, 8, 9)  # shirt, bag, ankle boot
CONCEPTS, JUDGED, DRAWS = 10, 32, 20
RULES, RIVALS = ("Sobol", "integrated gradients", "occlusion"), ("TCAV", "saliency")
WAYS, SCOPES = ("deletion", "insertion"), ("image", "class")
LOTS = 1000  # methods without knowledge


def called(model, x: torch.Tensor, c: int) -> torch.Tensor:
    """The images that a network gives class c."""
    with torch.no_grad():
        return x[torch.cat([model(part).argmax(1) for part in x.split(200)]) == c]


def images(model, data, c: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two halves of training images that no other network sees, and test images."""
    own = called(model, data.x_train[3333 * seed : 3333 * (seed + 1)], c)
    first, second = own[: len(own) // 2], own[len(own) // 2 :]
    return first, second, called(model, data.x_test, c)


def extraction(method, maps: tuple, where: dict, seed: int) -> list[dict]:
    first, second, held = (method.places(part, seed=seed) for part in maps)
    rows = []
    for kind in method.KINDS:
        one, two = (concepts.factorize(half, CONCEPTS, seed=seed, **method.KINDS[kind]) for half in (first, second))
        matched, others = method.cosines(one.dictionary, two.dictionary, signed=kind != "PCA")
        facts = {"kind": kind, "own error": one.error, "matched": matched, "others": others}
        rows.append(where | facts | method.quality(one, held, second))
        if kind == "PCA":  # the same spans, other axes
            turned = []
            for s in range(DRAWS):
                axes = turn(one.dictionary, s), turn(two.dictionary, s + DRAWS)
                turned.append(method.cosines(*axes, signed=False))
            rows.append(where | {"kind": "PCA, axes by lot"} | mean_pair(turned))
    drawn = []
    for s in range(DRAWS):
        generator = torch.Generator().manual_seed(s)
        one, two = (half[torch.randperm(len(half), generator=generator)[:CONCEPTS]] for half in (first, second))
        drawn.append(method.cosines(one, two))
    rows.append(where | {"kind": "places by lot"} | mean_pair(drawn))
    scale = held.var(0, correction=0).sum().item()
    real = {"FID": method.frechet(held, second) / scale, "OOD": method.ood(held, second)}
    return [*rows, where | {"kind": "real places"} | real]


def other_starts(method, data, seed: int) -> list[dict]:
    """Stability again where NMF starts at random, and where K-means has 20 starts in place of 4."""
    model, rows = models.load("small-cnn", seed=seed), []
    settings = {
        "NMF, random start": ("nmf", {"init": "random", "max_iter": 1000}),
        "K-means, 20 starts": ("kmeans", {"n_init": 20}),
    }
    for c in CLASSES:
        halves = images(model, data, c, seed)[:2]
        for layer, cut in method.CUT.items():
            with torch.no_grad():
                maps = [torch.cat([model[:cut](part) for part in half.split(200)]) for half in halves]
            pair = [method.places(half, seed=seed) for half in maps]
            for kind, (how, options) in settings.items():
                one, two = (concepts.factorize(half, CONCEPTS, how, seed=seed, **options).dictionary for half in pair)
                matched, others = method.cosines(one, two)
                where = {"layer": layer, "seed": seed, "label": c, "kind": kind}
                rows.append(where | {"matched": matched, "others": others})
    return rows


def strategies_again(method, data, seed: int) -> list[dict]:
    """At relu4: do dictionaries of two halves name the same top concept? Concepts are paired as for stability."""
    model, rows = models.load("small-cnn", seed=seed).requires_grad_(False), []
    for c, kind in product(CLASSES, ("NMF", "K-means")):
        tops, banks = [], []
        *halves, held = images(model, data, c, seed)
        for half in halves:
            half = method.places(torch.cat([model[:10](part) for part in half.split(200)]), seed=seed)
            bank = concepts.factorize(half, CONCEPTS, seed=seed, **method.KINDS[kind])
            codes = bank.encode(model[:10](held)).mean((2, 3))
            banks.append(bank.dictionary)
            tops.append((model.head.weight[c] @ bank.dictionary.T * codes).argmax(1))
        unit = [torch.nn.functional.normalize(bank.double(), dim=1) for bank in banks]
        cosine = unit[0] @ unit[1].T
        pairs = torch.as_tensor(linear_sum_assignment(cosine.numpy(), maximize=True)[1])
        same = (pairs[tops[0]] == tops[1]).float().mean().item()
        lot = (pairs[tops[0]][:, None] == tops[1]).float().mean().item()
        row = {"seed": seed, "label": c, "kind": kind, "same": same, "by lot": lot}
        lead = tops[0].mode().values  # the concept on top most often, and its partner
        row |= {"ami": adjusted_mutual_info_score(*tops), "lead": (tops[0] == lead).float().mean().item()}
        row["lead again"] = (tops[1] == pairs[lead]).float().mean().item()
        row["its cosine"] = cosine[lead, pairs[lead]].item()
        rows.append(row)
    return rows


def turn(axes: torch.Tensor, seed: int) -> torch.Tensor:
    square = torch.randn(len(axes), len(axes), generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(square).Q @ axes


def mean_pair(pairs: list[tuple[float, float]]) -> dict:
    matched, others = torch.tensor(pairs).mean(0).tolist()
    return {"matched": matched, "others": others}


def importance(method, head, bank, maps: torch.Tensor, c: int, seed: int) -> dict:
    """Areas of every rule and image {(scope, rule): [2, N]}, muFidelity {..: [N]}, and the table."""
    net, codes = method.Gains(concepts.head_on_codes(head, bank)), bank.encode(maps)
    table = method.score_table(net, codes, c)
    phi = method.importances(net, codes, c, table, seed=seed)
    areas, fidelity = {}, {}
    for rule, each in phi.items():
        for scope, values in zip(SCOPES, (each, each.mean(0).expand_as(each).clone()), strict=True):
            areas[scope, rule] = curve_areas(method, table, values, DRAWS if rule == "TCAV" else 1)
            fidelity[scope, rule] = method.mu_fidelity(table, values)
    areas["image", "best order"] = torch.stack([method.best_deletion(table), -method.best_deletion(-table)])
    lots = by_lot(table, LOTS, seed)  # [LOTS, 2, N], one order a bank
    areas["image", "random order"] = areas["class", "random order"] = lots.mean(0)
    each = torch.stack([by_lot(table[[i]], LOTS, 1000 * seed + i)[..., 0] for i in range(len(table))], 2)
    with torch.no_grad():
        agree = (head(maps).argmax(1) == net[0](codes).argmax(1)).float()
        error = (bank.decode(codes) - maps).norm() / maps.norm()
    return {"areas": areas, "fidelity": fidelity, "lots": {"class": lots, "image": each},
            "agreement": agree.mean().item(), "error": error.item()}  # fmt: skip


def curve_areas(method, table: torch.Tensor, phi: torch.Tensor, draws: int) -> torch.Tensor:
    """C-Deletion and C-Insertion [2, N], mean of ``draws`` ways to break ties."""
    curves = [method.concept_curves(table, phi, seed=s) for s in range(draws)]
    return torch.stack([torch.stack([curve.auc for curve in pair]) for pair in curves]).mean(0)


def by_lot(table: torch.Tensor, draws: int, seed: int) -> torch.Tensor:
    """Areas [draws, 2, N] of random orders, each the same for all images of the table."""
    k = table.shape[1].bit_length() - 1
    order = torch.rand(draws, k, generator=torch.Generator().manual_seed(seed)).argsort(1)
    gone = torch.cat([torch.zeros(draws, 1, dtype=torch.long), (1 << order).cumsum(1)], 1)
    paths = torch.stack([table[:, 2**k - 1 - gone], table[:, gone]])  # [2, N, draws, k + 1]
    return torch.trapezoid(paths, dx=1 / k).permute(2, 0, 1)


def measure(method, data, seed: int) -> dict:
    """One network: rows of extraction.csv, and what the other tables are made of, for its three classes."""
    model = models.load("small-cnn", seed=seed)
    rows, found = [], {}
    for c in CLASSES:
        parts = images(model, data, c, seed)
        for layer, cut in method.CUT.items():
            with torch.no_grad():
                maps = tuple(torch.cat([model[:cut](p) for p in part.split(200)]) for part in parts)
            rows += extraction(method, maps, {"layer": layer, "seed": seed, "label": c}, seed)
            bank = concepts.factorize(method.places(maps[0], seed=seed), CONCEPTS, seed=seed, **method.KINDS["NMF"])
            found[layer, c] = importance(method, model[cut:], bank, maps[2][:JUDGED], c, seed)
    return {"rows": rows, "found": found}


def importance_rows(found: dict, seed: int) -> list[dict]:
    rows = []
    for layer in dict.fromkeys(layer for layer, _ in found):
        banks = [found[layer, c] for c in CLASSES]
        for scope, rule in banks[0]["areas"]:
            deletion, insertion = torch.cat([bank["areas"][scope, rule] for bank in banks], 1).mean(1).tolist()
            row = {"layer": layer, "seed": seed, "scope": scope, "rule": rule}
            row |= {"deletion": deletion, "insertion": insertion}
            if (scope, rule) in banks[0]["fidelity"]:
                row["fidelity"] = torch.cat([bank["fidelity"][scope, rule] for bank in banks]).nanmean().item()
            rows.append(row)
        kept = torch.tensor([[bank["agreement"], bank["error"]] for bank in banks]).mean(0).tolist()
        rows.append({"layer": layer, "seed": seed, "scope": "reconstruction", "rule": "agreement", "deletion": kept[0]})
        rows.append({"layer": layer, "seed": seed, "scope": "reconstruction", "rule": "error", "deletion": kept[1]})
    return rows


def signs(areas: torch.Tensor, rival: torch.Tensor, way: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [..., N] in which the area is better, and worse, by more than rounding; counted."""
    gain = (rival - areas) * (1 - 2 * way)
    slack = 1e-5 * (1 + rival.abs())
    return (gain > slack).sum(-1), (gain < -slack).sum(-1)


def sign_rows(found: dict, seed: int) -> list[dict]:
    rows = []
    for (layer, c), bank in found.items():
        areas = bank["areas"]
        for scope, rule, rival in product(SCOPES, RULES, RIVALS):
            for w, way in enumerate(WAYS):
                better, worse = signs(areas[scope, rule][w], areas[scope, rival][w], w)
                where = {"layer": layer, "seed": seed, "label": c, "scope": scope, "rule": rule, "rival": rival}
                rows.append(where | {"way": way, "better": int(better), "worse": int(worse)})
    return rows


def chance_rows(done: list[dict]) -> list[dict]:
    """The rule of the claim for methods that order by lot: all networks, both rivals, a sign test at 5 %."""
    rows = []
    for layer in ("relu2", "relu4"):
        for scope in SCOPES:
            for w, way in enumerate(WAYS):
                passed = torch.ones(LOTS, dtype=torch.bool)
                for found in done:
                    lots = torch.cat([found[layer, c]["lots"][scope][:, w] for c in CLASSES], 1)
                    for rival in RIVALS:
                        areas = torch.cat([found[layer, c]["areas"][scope, rival][w] for c in CLASSES])
                        better, worse = signs(lots, areas, w)
                        passed &= torch.from_numpy(binom.sf(better - 1, better + worse, 0.5) <= 0.05)
                rows.append({"layer": layer, "scope": scope, "way": way, "draws": LOTS, "passed": int(passed.sum())})
    return rows


def build(out: Path, work: Path, seeds: int) -> list[Path]:
    from nbkit import runtime

    runtime.deterministic(seed=0)
    method, data = papers.method(SLUG), datasets.load("fashion-mnist")
    work.mkdir(parents=True, exist_ok=True)
    done = []
    for seed in range(seeds):
        file = work / f"seed{seed}.pt"
        if not file.exists():
            torch.save(measure(method, data, seed), file)
        done.append(torch.load(file, weights_only=False))
    kept, starts, again = Work(work), [], []
    for seed in range(seeds):
        again += kept.once(f"again{seed}", lambda s=seed: strategies_again(method, data, s))
        starts += kept.once(f"starts{seed}", lambda s=seed: other_starts(method, data, s))
    tables = {
        "extraction": [row for part in done for row in part["rows"]] + starts,
        "importance": [row for seed, part in enumerate(done) for row in importance_rows(part["found"], seed)],
        "signs": [row for seed, part in enumerate(done) for row in sign_rows(part["found"], seed)],
        "chance": chance_rows([part["found"] for part in done]),
    }
    tables["again"] = again
    for name, rows in tables.items():
        write_table(out / f"{name}.csv", pd.DataFrame(rows), float_format="%.5g")
    return [out / f"{name}.csv" for name in tables]


if __name__ == "__main__":
    run(build, __doc__, work=work_option(SLUG), seeds=seeds_option(3, "networks"))
