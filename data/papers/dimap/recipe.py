"""All tables of this folder: what notebooks/06-pruning/08-dimap measures beforehand.

Test accuracy on 1,000 images of three tiny-swin, 70 and 80 % of their weights removed by every grouping and its rivals,
without training; DIMAP and global magnitude also at nine other sparsities; of three tiny-vit, which have no stages, by
three groupings; of tiny-swin with the same matrices dealt at random to three groups; what three groupings take from
each module; how the modules' weights differ in scale; and what the same scores would keep of DINOv2. About 5 minutes on
one core; a run that was stopped goes on where it was (delete the folder --work for a fresh start). The functions are
the notebook's method cells.
"""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from nbkit.recipes import Work, run, seeds_option, work_option, write_table

SPARSITIES = (0.7, 0.8)
AROUND = (0.5, 0.6, 0.65, 0.68, 0.69, 0.71, 0.72, 0.74, 0.75)  # module and net alone
DRAWS = 2  # random masks a network and sparsity
DEALT = 10  # dealings of the matrices to three groups, a network
NETWORKS = ("tiny-swin", "tiny-vit")
TESTED = 1000  # test images
DATA = 256  # training images that the data-driven criteria see


DINOV2 = {
    "QKV-M": [f"attention.{letter}_proj" for letter in "qkv"],
    "PRJ-M": ["attention.o_proj"],
    "MLP-M": ["mlp"],
    "AUX-M": ["embeddings"],
}


def method_and_data():
    from nbkit import datasets, papers

    return papers.method("dimap"), datasets.load("fashion-mnist")


def rival(method, model, share: float, kind: str):
    """Masks as sparse as DIMAP's over the same weights: the largest of each layer by ``uniform`` or ``erk`` densities,
    or the largest of all after dividing by the RMS of their module, ``rms``."""
    from nbkit import sparsity

    module = method.modules(model)
    aux = [name for name, m in module.items() if m == method.AUX]
    size = sparsity.magnitude(model, exclude=aux)
    if kind != "rms":
        densities = {"uniform": sparsity.uniform, "erk": sparsity.erk}[kind](model, share, exclude=aux)
        return sparsity.mask_from_densities(size, densities)
    rms = {}
    for m in set(module.values()):
        squares = [t.double().square() for name, t in size.items() if module[name] == m]
        if squares:
            rms[m] = (sum(s.sum() for s in squares) / sum(s.numel() for s in squares)).sqrt()
    return sparsity.mask_from_scores({name: t / rms[module[name]] for name, t in size.items()}, share)


def masks_of(method, model, share: float, seed: int, data) -> dict:
    """{arm: masks}: the groupings and their rivals, all over the same weights."""
    from nbkit import sparsity

    arms = {granularity: method.dimap(model, share, granularity) for granularity in method.GRANULARITIES}
    arms |= {kind: rival(method, model, share, kind) for kind in ("uniform", "erk", "rms")}
    aux = [n for n, module in method.modules(model).items() if module == method.AUX]
    seen = (data.x_train[:DATA], data.y_train[:DATA])
    for criterion in (sparsity.snip, sparsity.taylor):
        arms[criterion.__name__] = sparsity.mask_from_scores(criterion(model, *seen, exclude=aux), share)
    return arms | {f"random {k}": arms["module"].shuffled(100 * seed + k) for k in range(DRAWS)}


def accuracy(model, masks, data) -> float:
    from nbkit import training

    masks.apply(model, keep_original=False)
    return round(training.accuracy(model, data.x_test[:TESTED], data.y_test[:TESTED], batch=100), 4)


def oneshot(seed: int, share: float) -> list[dict]:
    """A row an arm; at the highest sparsity also of global magnitude on the rescaled network, the same function."""
    from nbkit import models

    method, data = method_and_data()

    def load():
        return models.load("tiny-swin", seed=seed)

    arms = masks_of(method, load(), share, seed, data)
    found = {arm: accuracy(load(), masks, data) for arm, masks in arms.items()}
    for c in (0.25, 4) if share == max(SPARSITIES) else ():
        scaled = method.rescale(load(), c)
        found[f"net, c = {c}"] = accuracy(scaled, method.dimap(scaled, share, "net"), data)
    return [{"seed": seed, "sparsity": share, "arm": arm, "accuracy": a} for arm, a in found.items()]


def window(seed: int) -> list[dict]:
    """A row a sparsity: accuracy of tiny-swin by net and by module, and the lead of module in points."""
    from nbkit import models

    method, data = method_and_data()
    rows = []
    for share in AROUND:
        found = {}
        for granularity in ("net", "module"):
            model = models.load("tiny-swin", seed=seed)
            found[granularity] = accuracy(model, method.dimap(model, share, granularity), data)
        lead = round(100 * (found["module"] - found["net"]), 2)
        rows.append({"seed": seed, "sparsity": share, **found, "lead": lead})
    return rows


def plain(seed: int, share: float) -> list[dict]:
    """A row a grouping of tiny-vit, whose modules differ most in scale."""
    from nbkit import models

    method, data = method_and_data()
    rows = []
    for granularity in ("net", "module", "layer"):
        model = models.load("tiny-vit", seed=seed)
        reached = accuracy(model, method.dimap(model, share, granularity), data)
        rows.append({"seed": seed, "sparsity": share, "arm": granularity, "accuracy": reached})
    return rows


def dealt(group: dict[str, str], seed: int) -> dict[str, str]:
    """The groups dealt anew among the weights: as many matrices in each as before."""
    order = np.random.default_rng(seed).permutation(list(group.values()))
    return dict(zip(group, order.tolist(), strict=True))


def dealings(seed: int, share: float) -> list[dict]:
    """A row a dealing of the matrices of tiny-swin, scored like modules; no dealing in two networks."""
    from nbkit import models

    method, data = method_and_data()
    rows = []
    for deal in range(DEALT * seed, DEALT * (seed + 1)):
        model = models.load("tiny-swin", seed=seed)
        masks = method.grouped_mask(model, share, dealt(method.groups(model), deal))
        rows.append({"seed": seed, "sparsity": share, "dealing": deal, "accuracy": accuracy(model, masks, data)})
    return rows


def budget(seed: int, share: float = max(SPARSITIES)) -> list[dict]:
    """Of every module of tiny-swin the share of weights kept and of squares removed."""
    import torch

    from nbkit import models

    method, _ = method_and_data()
    model, rows = models.load("tiny-swin", seed=seed), []
    module = method.groups(model)
    squares = {name: model.get_parameter(name).detach().double().square() for name in module}
    for granularity in ("net", "module", "layer"):
        masks = method.dimap(model, share, granularity)
        for m in dict.fromkeys(module.values()):
            names = [name for name in module if module[name] == m]
            mask = torch.cat([masks[n].flatten() for n in names])
            square = torch.cat([squares[n].flatten() for n in names])
            gone = (square[~mask].sum() / square.sum()).item()
            row = {"seed": seed, "granularity": granularity, "module": m, "density": mask.double().mean().item()}
            rows.append(row | {"relative distortion": gone})
    return rows


def spread(rows: pd.DataFrame, labels: np.ndarray) -> np.ndarray:
    """Largest over smallest RMS of three groups of matrices; ``labels``: a row a dealing."""
    count = rows["weights"].to_numpy()
    energy = count * rows["rms"].to_numpy() ** 2
    squares = np.stack([(labels == k) @ energy / ((labels == k) @ count) for k in range(3)])
    return np.sqrt(squares.max(0) / squares.min(0))


def premise(tables: dict[tuple[str, int], pd.DataFrame], deals: int = 10_000) -> pd.DataFrame:
    """RMS of the modules, their spread, what a twentieth of the dealings reach, and how many reach it in all networks
    of a kind at once."""
    rows, beyond = [], {}
    for (name, seed), table in tables.items():
        label, modules = pd.factorize(table["module"])
        dealings = np.random.default_rng(0).permuted(np.tile(label, (deals, 1)), axis=1)
        random = spread(table, dealings)
        limit = np.quantile(random, 0.95)
        beyond.setdefault(name, []).append(random >= limit)
        energy = (table["weights"] * table["rms"] ** 2).groupby(label).sum() / table["weights"].groupby(label).sum()
        row = {"model": name, "seed": seed} | dict(zip(modules, np.sqrt(energy), strict=True))
        rows.append(row | {"spread": spread(table, label[None])[0], "of dealings": limit})
    chance = {name: np.all(hits, axis=0).mean() for name, hits in beyond.items()}
    return pd.DataFrame([row | {"chance": chance[row["model"]]} for row in rows])


def sizes(name: str, seed: int) -> pd.DataFrame:
    """A row a pruned matrix: module, number of weights, RMS."""
    from nbkit import models

    method, _ = method_and_data()
    model = models.load(name, seed=seed)
    weights = {n: (m, model.get_parameter(n).detach()) for n, m in method.groups(model).items()}
    rows = [(m, w.numel(), w.square().mean().sqrt().item()) for m, w in weights.values()]
    return pd.DataFrame(rows, columns=["module", "weights", "rms"])


def dinov2(share: float = 0.5) -> list[dict]:
    """A row a tensor: its size, and under each grouping how many weights stay and how small the smallest is."""
    from nbkit import models

    method, _ = method_and_data()
    model = models.load("dinov2-small")
    module = {n: m for n, m in method.modules(model, DINOV2).items() if m != method.AUX}
    weights = {n: w.detach().abs() for n, w in model.named_parameters() if n in module}
    rows = {
        n: {"weight": n, "module": module[n], "weights": w.numel(), "rms": float(f"{w.square().mean().sqrt():.5g}")}
        for n, w in weights.items()
    }
    for granularity in ("net", "module", "layer"):
        masks = method.dimap(model, share, granularity, DINOV2)
        for n, w in weights.items():
            rows[n][f"kept {granularity}"] = masks.kept()[n]
            rows[n][f"smallest {granularity}"] = float(f"{w[masks[n]].min():.5g}")
    return list(rows.values())


def build(out: Path, work: Path, seeds: int) -> list[Path]:
    from nbkit import runtime

    runtime.deterministic(seed=0)
    kept, measured = Work(work), {"oneshot": oneshot, "plain": plain, "dealt": dealings}
    rows = {name: [] for name in measured}
    for (name, measure), seed, share in itertools.product(measured.items(), range(seeds), SPARSITIES):
        rows[name] += kept.once(f"{name}-{seed}-{share}", partial(measure, seed, share))
    around = [row for seed in range(seeds) for row in kept.once(f"window-{seed}", partial(window, seed))]
    of_dino = pd.DataFrame(kept.once("dinov2", dinov2))
    scales = {(name, seed): sizes(name, seed) for name in NETWORKS for seed in range(seeds)} | {("DINOv2", 0): of_dino}
    tables = {
        **{name: pd.DataFrame(found) for name, found in rows.items()},
        "window": pd.DataFrame(around),
        "budget": pd.DataFrame([row for seed in range(seeds) for row in budget(seed)]).round(5),
        "premise": premise(scales).round(5),
        "dinov2": of_dino,
    }
    for name, table in tables.items():
        write_table(out / f"{name}.csv", table)
    return [out / f"{name}.csv" for name in tables]


if __name__ == "__main__":
    run(build, __doc__, work=work_option("dimap"), seeds=seeds_option(3))
