"""All tables of this folder: what notebooks/01-saliency/05-gaussian-adaptive-attention measures beforehand.

Frozen tiny-vit of three seeds, trained on Fashion-MNIST, see MNIST; on the mean tokens of their six blocks every
attention of the notebook and the same head are trained. Run 0 of every backbone tries four learning rates, the mean
validation accuracy chooses one an arm, run 1 (other images, other initial values) uses it; some arms are also trained
three times as long. Then a head on every layer alone, and the importance factors. About 4 minutes on one core; a run
that was stopped goes on where it was (delete the folder --work for a fresh start). The functions are the notebook's
method cells.
"""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path

import pandas as pd

from nbkit.recipes import Work, run, work_option, write_table

BACKBONES = 3
TRAIN, VAL, TEST = 1000, 500, 2000  # images a run
EPOCHS, LONG = 8, 24
LONGER = ("no attention", "layer weights", "MHA, published", "MHA", "MHA + input", "gate, 2 heads", "gate, 1 head")
GATES = ("gate, 2 heads", "gate, 1 head", "2 heads, untrained", "1 head, untrained")


@cache
def method():
    from nbkit import papers

    return papers.method("gaussian-adaptive-attention")


@cache
def split(backbone: int) -> dict[str, tuple]:
    """{"train 0", "val 0", "train 1", "val 1", "test": (X, y)}: X divided by its deviation over the images of run 0."""
    import torch

    from nbkit import datasets, models

    data, model = datasets.load("mnist"), models.load("tiny-vit", seed=backbone)
    order = torch.randperm(len(data.y_train), generator=torch.Generator().manual_seed(backbone))
    sets, at = {}, 0
    for run_ in range(2):
        for name, size in (("train", TRAIN), ("val", VAL)):
            index = order[at : at + size]
            sets[f"{name} {run_}"] = (data.x_train[index], data.y_train[index])
            at += size
    sets["test"] = (data.x_test[:TEST], data.y_test[:TEST])
    sets = {name: (torch.cat([method().features(model, b) for b in x.split(250)]), y) for name, (x, y) in sets.items()}
    scale = sets["train 0"][0].std()
    return {name: (x / scale, y) for name, (x, y) in sets.items()}


def trained(arm: str, lr: float, backbone: int, run_: int, epochs: int = EPOCHS, layer: int | None = None):
    """The trained model and its row; ``layer``: the others are 0, so that the head is as large (with a single channel
    its last ReLU died in some trainings)."""
    import torch

    from nbkit import training

    sets = split(backbone)
    keep = torch.ones(6, 1) if layer is None else torch.eye(6)[:, layer : layer + 1]
    x, y = sets[f"train {run_}"]
    model = method().train(arm, x * keep, y, lr=lr, seed=10 * backbone + run_, epochs=epochs)
    row = {"backbone": backbone, "run": run_, "arm": arm, "lr": lr, "epochs": epochs}
    for name, key in (("val", f"val {run_}"), ("test", "test")):
        x, y = sets[key]
        row[name] = round(training.accuracy(model, x * keep, y, batch=50), 4)
    return model, row


def gate_facts(arm: str, lr: float, backbone: int) -> dict:
    """What the gate of run 0 says: importance of each layer on its validation images, and what it learned."""
    model, _ = trained(arm, lr, backbone, 0)
    gate = model[0]
    _, share = method().importance_factor(gate.gates(split(backbone)["val 0"][0]))
    facts = {"backbone": backbone, "arm": arm} | {f"layer {i}": round(s, 4) for i, s in enumerate(share.tolist(), 1)}
    for name in ("delta", "c"):
        values = getattr(gate, name)
        facts |= {f"{name} min": round(values.min().item(), 4), f"{name} max": round(values.max().item(), 4)}
    return facts


def chosen(rows: pd.DataFrame) -> float:
    """The learning rate of the highest mean validation accuracy; the lowest of equals."""
    return float(rows.groupby("lr")["val"].mean().idxmax())


def build(out: Path, work: Path) -> list[Path]:
    from nbkit import runtime

    runtime.deterministic(seed=0)
    kept, rates = Work(work), method().CHOICES

    def row(arm, lr, backbone, run_, epochs=EPOCHS, layer=None) -> dict:
        key = f"{arm}-{lr}-{backbone}-{run_}-{epochs}-{'all' if layer is None else layer}"
        return kept.once(key, lambda: trained(arm, lr, backbone, run_, epochs, layer)[1])

    results, rate = [], {}
    for arm in method().ARMS:
        grid = [row(arm, lr, b, 0) for lr in rates for b in range(BACKBONES)]
        rate[arm] = chosen(pd.DataFrame(grid))
        results += grid + [row(arm, rate[arm], b, 1) for b in range(BACKBONES)]
        if arm in LONGER:
            results += [row(arm, rate[arm], b, 0, LONG) for b in range(BACKBONES)]
    layers = []
    for layer in range(6):
        grid = [row("no attention", lr, b, 0, EPOCHS, layer) for lr in rates for b in range(BACKBONES)]
        best = chosen(pd.DataFrame(grid))
        layers += [r | {"layer": layer + 1} for r in grid if r["lr"] == best]
    facts = [
        kept.once(f"facts-{arm}-{b}", partial(gate_facts, arm, rate[arm], b)) for arm in GATES for b in range(BACKBONES)
    ]
    table = pd.DataFrame(results)
    table["chosen"] = table["lr"] == table["arm"].map(rate)
    single = pd.DataFrame(layers).drop(columns=["run", "arm", "epochs"])
    tables = {"results": table, "layers": single, "gates": pd.DataFrame(facts)}
    for name, frame in tables.items():
        write_table(out / f"{name}.csv", frame)
    return [out / f"{name}.csv" for name in tables]


if __name__ == "__main__":
    run(build, __doc__, work=work_option("gaussian-adaptive-attention"))
