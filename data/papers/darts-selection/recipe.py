"""All tables of this folder: what notebooks/12-search-and-proof/02-darts-selection measures beforehand.

Supernets on 1,000 digits (six seeds; all five operations, skip and conv3x3 alone, or all with alpha never trained),
what every operation is worth to them at three moments, and the cells selected from them. About 9 minutes on one core;
a run that was stopped goes on where it was (delete the folder --work for a fresh start). The functions are the
notebook's method cells; how good each cell is stands in the tables of nas-evaluation.
"""

from __future__ import annotations

import functools
import itertools
from functools import partial
from pathlib import Path

import pandas as pd

from nbkit.recipes import Work, run, seeds_option, work_option, write_table, write_tensors

EPOCHS = 50
MOMENTS = (10, 25, 50)  # epochs at which cells are selected
RATE = 0.3  # of 0.025, 0.1, 0.3 and 1, the best on the search half after 20 epochs of another seed
ALPHA_RATE = 3e-3
TUNING = 2  # epochs of the network after an operation has become its edge's only one
SHIPPED = (0, 1)  # seeds whose supernets are stored
SPACES = {
    "five": ("none", "skip", "conv1x1", "conv3x3", "avgpool3x3"),
    "two": ("skip", "conv3x3"),
    "fixed": ("none", "skip", "conv1x1", "conv3x3", "avgpool3x3"),
}


@functools.cache
def parts():
    """The notebook's method cells; the digits: one half trains the network, one alpha; 300 judge."""
    import torch

    from nbkit import papers, recipes

    digits = recipes.load("papers/nas-evaluation/recipe.py").split()
    x, y = digits["train"]
    x = x.to(memory_format=torch.channels_last)
    return papers.method("darts-selection"), (x[:500], y[:500]), (x[500:], y[500:]), digits["val"]


def trained(space: str, seed: int, folder: Path) -> list[dict]:
    """Train a supernet, keep its states at MOMENTS in the folder; the weights of all operations now and then."""
    import torch

    method, train, search, _ = parts()
    torch.manual_seed(seed)
    net = method.Supernet(SPACES[space]).to(memory_format=torch.channels_last)
    by = method.optimizers(net, RATE, 0 if space == "fixed" else ALPHA_RATE)
    if space == "fixed":
        with torch.no_grad():
            net.alpha.zero_()
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(by[0], EPOCHS, eta_min=RATE / 25)
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for done in range(1, EPOCHS + 1):
        method.epoch(net, train, search, *by, generator)
        decay.step()
        if done in MOMENTS:
            state = {k: v.half() if v.is_floating_point() else v for k, v in net.state_dict().items()}
            torch.save(state, folder / f"{space}-{seed}-{done}.pt")
        if done == 1 or done % 5 == 0:
            right = round(100 * method.probe(net, search)["acc"], 1)
            w = method.weights(net).detach()
            rows += [
                {"space": space, "seed": seed, "epoch": done, "edge": edge, "op": op, "w": round(w[e, o].item(), 4),
                 "search": right}
                for e, edge in enumerate(method.EDGES) for o, op in enumerate(SPACES[space])
            ]  # fmt: skip
    return rows


def supernet(space: str, seed: int, moment: int, folder: Path):
    """A supernet as stored, in half precision."""
    import torch

    net = parts()[0].Supernet(SPACES[space])
    net.load_state_dict(torch.load(folder / f"{space}-{seed}-{moment}.pt"))
    return net.to(memory_format=torch.channels_last)


def strengths(space: str, seed: int, moment: int, judged: bool, folder: Path) -> list[dict]:
    """Of every operation: its weight, the damage its removal does, how well it does alone, and (judged) how well
    after TUNING epochs of the network, on the 300 digits that no search saw."""
    import torch

    method, train, search, val = parts()
    rows = []
    net = supernet(space, seed, moment, folder)
    for e, edge in enumerate(method.EDGES):
        hurt, w = method.damage(net, search, e), method.weights(net).detach()
        for o, op in enumerate(SPACES[space]):
            row = {"space": space, "seed": seed, "epoch": moment, "edge": edge, "op": op}
            row |= {"w": round(w[e, o].item(), 4)}
            row |= {"acc": round(100 * hurt["acc"][o].item(), 1), "loss": round(hurt["loss"][o].item(), 4)}
            if judged:
                alone = supernet(space, seed, moment, folder)
                alone.decided[e] = o
                row["alone"] = round(100 * method.probe(alone, search)["acc"], 1)
                by, generator = method.optimizers(alone, RATE / 10, 0), torch.Generator().manual_seed(seed)
                for _ in range(TUNING):
                    method.epoch(alone, train, search, *by, generator)
                found = method.probe(alone, val)
                row |= {"tuned": round(100 * found["acc"], 2), "tuned loss": round(found["loss"], 4)}
            rows.append(row)
    return rows


def selected(space: str, seed: int, moment: int, name: str, folder: Path) -> dict:
    """The cell that a rule selects."""
    method, train, search, _ = parts()
    net = supernet(space, seed, moment, folder)
    rule, interval = {
        "magnitude": (method.largest, 0),
        "magnitude, tuned": (method.largest, 5),
        "PT": (lambda n, e: method.strongest(n, search, e), 5),
        "PT, loss": (lambda n, e: method.strongest(n, search, e, "loss"), 5),
        "PT, interval 0": (lambda n, e: method.strongest(n, search, e), 0),
    }[name]
    rates = {"lr": RATE / 10, "alpha_lr": 0 if space == "fixed" else ALPHA_RATE}
    ops = method.decide(net, train, search, rule, interval=interval, seed=seed, **rates)
    labels = {"space": space, "seed": seed, "epoch": moment, "rule": name}
    return labels | dict(zip(("e01", "e02", "e12"), ops, strict=True))


def jobs(moment: int):
    """(space, rule) of a seed's selections at a moment, and (space, judged) of its tables of strengths."""
    rules = [
        ("five", "magnitude"),
        ("five", "PT"),
        ("two", "magnitude"),
        ("two", "PT"),
        ("five", "PT, interval 0"),
    ]
    if moment < EPOCHS:
        return rules, [("five", moment == MOMENTS[0])]
    rules += [(space, "magnitude, tuned") for space in ("five", "two")] + [("five", "PT, loss")]
    rules += [("fixed", "PT"), ("fixed", "PT, interval 0")]
    return rules, [("five", True), ("two", True), ("fixed", False)]


def build(out: Path, work: Path, seeds: int = 6) -> list[Path]:
    import torch

    from nbkit import runtime

    runtime.deterministic(seed=0)
    kept = Work(work)
    found: dict[str, list[dict]] = {"alphas": [], "strengths": [], "choices": []}
    for moment, seed in itertools.product(reversed(MOMENTS), range(seeds)):
        for space in SPACES if moment == EPOCHS else ():
            found["alphas"] += kept.once(f"train-{space}-{seed}", partial(trained, space, seed, work))
        rules, tables = jobs(moment)
        for space, name in rules:
            key = f"select-{space}-{seed}-{moment}-{name}"
            found["choices"].append(kept.once(key, partial(selected, space, seed, moment, name, work)))
        for space, judged in tables:
            key = f"strengths-{space}-{seed}-{moment}"
            found["strengths"] += kept.once(key, partial(strengths, space, seed, moment, judged, work))
    paths = []
    for name, rows in found.items():
        table = pd.DataFrame(rows).query(
            "space != 'fixed'" if name == "alphas" else "seed >= 0"
        )  # fixed: 0.2 each
        floats = table.select_dtypes("float").columns
        table = table.assign(**{column: table[column] + 0.0 for column in floats})  # -0.0 becomes 0.0
        write_table(paths.append(out / f"{name}.csv") or paths[-1], table)
    stored = {}
    whose = [("five", moment) for moment in MOMENTS] + [("fixed", MOMENTS[-1])]
    for seed, (space, moment) in itertools.product(SHIPPED[:seeds], whose):
        net = supernet(
            space, seed, moment, work
        )  # all but BatchNorm's running statistics, which no probe reads
        vector = torch.cat([p.detach().flatten() for p in net.parameters()])
        stored[f"{space} {moment} {seed}"] = vector.half()
    write_tensors(paths.append(out / "supernets.safetensors") or paths[-1], stored)
    return paths


if __name__ == "__main__":
    run(build, __doc__, work=work_option("darts-selection"), seeds=seeds_option(6))
