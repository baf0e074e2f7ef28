"""The tables of this folder and the networks of seed 0, for notebooks/01-saliency/03-robust-cnn-explainability.

A small CNN on canvases of a digit and a garment, trained vanilla, robust and by AdvProp, three seeds each; accuracies;
on canvases that all networks of a seed get right, four scores of seven maps and of four maps that ask no network, and
how the areas of insertion and deletion follow the confidence. About 6 minutes on one core; a run that was stopped goes
on where it was (delete the folder --work for a fresh start). The functions are the notebook's method cells.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pandas as pd

from nbkit.recipes import Work, round_to_half, run, seeds_option, work_option, write_bytes, write_table

SLUG = "robust-cnn-explainability"
TRAINED, TESTED = 8000, 800  # canvases
EACH = 30  # black and as many noisy canvases, explained
HARDER = 150  # black and as many noisy canvases, for the other test sets


def method():
    from nbkit import papers

    return papers.method(SLUG)


def training_data():
    """Canvases of the first 9,000 training digits and garments; the others chose the learning rate."""
    from nbkit import datasets

    digits, garments = datasets.load("mnist"), datasets.load("fashion-mnist")
    pair = digits.x_train[:9000], digits.y_train[:9000]
    return method().compose(pair, garments.x_train[:9000], TRAINED, seed=0)[:2]


def test_data():
    from nbkit import datasets

    digits, garments = datasets.load("mnist"), datasets.load("fashion-mnist")
    return method().compose((digits.x_test, digits.y_test), garments.x_test, TESTED, seed=2)


def path_of(work: Path, kind: str, seed: int) -> Path:
    return work / f"{kind}-seed{seed}.safetensors"


def trained(work: Path, kind: str, seed: int):
    """The network, trained or as it was kept."""
    from nbkit import models

    path = path_of(work, kind, seed)
    if not path.is_file():
        net = method().train(kind, training_data(), seed=seed)
        round_to_half(net)
        facts = {"dataset": "canvases of mnist and fashion-mnist", "variant": kind, "seed": seed}
        config = {"widths": [12, 24, 32], "batch_norm": True}
        models.save_checkpoint(path, net.half(), "small-cnn", config, **facts)
    return models.load_checkpoint(path)[0]


def shifted(x) -> dict:
    """{name of a test set: its canvases}, which no training saw. A blur of 1 pixel leaves all networks at chance."""
    import torch
    from scipy import ndimage

    noise = 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    blurred = torch.from_numpy(ndimage.gaussian_filter(x.numpy(), (0, 0, 0.75, 0.75)))
    return {"blurred": blurred, "paler": 0.1 + 0.8 * x, "darker": x / 2, "more noise": (x + noise).clamp(0, 1)}


def accuracies(work: Path, kind: str, seed: int) -> list[dict]:
    """A row a test set: the accuracy of one network."""
    import torch

    from nbkit import training

    net = trained(work, kind, seed)
    x, y, _ = test_data()
    half = len(x) // 2
    sets = {"black": (x[:half], y[:half]), "noisy": (x[half:], y[half:])}
    part = torch.cat([torch.arange(HARDER), half + torch.arange(HARDER)])
    x, y = x[part], y[part]
    sets |= {name: (harder, y) for name, harder in shifted(x).items()}
    for eps in (0.05, 0.1):
        generator = torch.Generator().manual_seed(seed)
        sets[f"PGD {eps}"] = training.pgd(net, x, y, eps=eps, steps=5, generator=generator), y
    return [{"seed": seed, "training": kind, "set": name, "accuracy": round(training.accuracy(net, *pair), 4)}
            for name, pair in sets.items()]  # fmt: skip


def explained(work: Path, seed: int):
    """Canvases, labels and boxes that all networks of a seed get right: EACH black, then EACH noisy; the networks."""
    nets = {kind: trained(work, kind, seed) for kind in method().TRAININGS}
    x, y, boxes = test_data()
    chosen = method().common(nets.values(), x, y, EACH)
    return x[chosen], y[chosen], boxes[chosen], nets


def scored(work: Path, kind: str, seed: int) -> list[dict]:
    """A row a map and picture, all four scores and the network's probability of the class."""
    import torch

    m = method()
    x, c, boxes, nets = explained(work, seed)
    net, rows = nets[kind], []
    with torch.no_grad():
        sure = net(x).softmax(1).gather(1, c[:, None])[:, 0]
    for name in (*m.METHODS, *m.NO_MODEL):
        maps = m.attribute(net, x, c, name) if name in m.METHODS else m.no_model(x, name, seed=seed)
        table = pd.DataFrame({k: v.double().numpy() for k, v in m.scores(net, x, c, maps, boxes).items()}).round(5)
        table = table.assign(confidence=sure.double().numpy().round(5), picture=range(len(x)), method=name)
        rows += table.to_dict("records")
    for row in rows:
        row |= {"seed": seed, "training": kind, "background": "black" if row["picture"] < EACH else "noisy"}
    return rows


def correlations(table: pd.DataFrame) -> pd.DataFrame:
    """Spearman's correlation of both areas with the confidence: within each network, and with all of a seed pooled."""
    from scipy.stats import spearmanr

    pooled = table.assign(training="pooled")
    rows = []
    for key, part in pd.concat([table, pooled]).groupby(["seed", "training", "method"], sort=False):
        found = {curve: spearmanr(part[curve], part["confidence"]).statistic for curve in ("insertion", "deletion")}
        rows.append(dict(zip(("seed", "training", "method"), key, strict=True)) | found)
    return pd.DataFrame(rows).round(4)


def build(out: Path, work: Path, seeds: int) -> list[Path]:
    from nbkit import runtime

    runtime.deterministic(seed=0)
    kept, rows, accuracy = Work(work), [], []
    for seed in range(seeds):
        for kind in method().TRAININGS:
            trained(work, kind, seed)
            accuracy += kept.once(f"accuracy-{kind}-{seed}", partial(accuracies, work, kind, seed))
        for kind in method().TRAININGS:
            rows += kept.once(f"scores-{kind}-{seed}", partial(scored, work, kind, seed))
    table = pd.DataFrame(rows)
    columns = ["pointing", "energy", "insertion", "deletion", "confidence"]
    means = table.groupby(["seed", "training", "background", "method"], sort=False)[columns].mean().round(5)
    tables = {
        "accuracy": pd.DataFrame(accuracy),
        "scores": means.reset_index(),
        "correlations": correlations(table),
    }
    for name, one in tables.items():
        write_table(out / f"{name}.csv", one)
    for kind in method().TRAININGS:
        write_bytes(out / path_of(out, kind, 0).name, path_of(work, kind, 0).read_bytes())
    return [*(out / f"{name}.csv" for name in tables), *(path_of(out, kind, 0) for kind in method().TRAININGS)]


if __name__ == "__main__":
    run(build, __doc__, work=work_option(SLUG), seeds=seeds_option(3))
