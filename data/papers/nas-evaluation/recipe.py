"""All tables of this folder: what notebooks/12-search-and-proof/01-nas-evaluation measures beforehand.

Every cell of the search space trained on digits at two depths; protocols of training on six cells; eight searches by
each of several methods, and the cells that they return trained once more. About 13 minutes on one
core; a run that was stopped goes on where it was (delete the folder --work for a fresh start). The functions are the
notebook's method cells.
"""

from __future__ import annotations

import functools
import itertools
from pathlib import Path

import numpy as np
import pandas as pd

from nbkit.recipes import Work, part_option, run, work_option, write_table

SEEDS = {2: 3, 4: 2}  # seeds of every cell, by the number of cells in the network
RATES = (0.03, 0.1, 0.3, 1.0)  # 0.3 is the best on the validation digits, on average over RATE_CELLS
RATE_CELLS = (("conv3x3", "skip", "conv1x1"), ("skip", "conv1x1", "avgpool3x3"), ("conv3x3", "conv3x3", "conv3x3"))
LADDER_SEEDS = 2
SEARCHES = 8
EPOCHS = 20  # of DARTS
TUNING = (100, 101)  # seeds of the searches that learning rates are chosen by
DARTS_RATES = tuple(itertools.product((0.1, 0.3), (3e-3, 3e-2)))  # of the weights, of alpha
SHARED_RATES = ((0.1, None), (0.3, None))


@functools.cache
def method():
    """The notebook's method cells."""
    from nbkit import papers

    return papers.method("nas-evaluation")


@functools.cache
def split():
    """{part: (x [N, 1, 8, 8], y [N])}: 1,000 digits to train on, 300 to choose with, 497 for the final test."""
    import torch

    from nbkit import datasets

    data = datasets.load("digits")
    order = torch.randperm(len(data.y), generator=torch.Generator().manual_seed(0))
    parts = zip(("train", "val", "test"), order.split([1000, 300, 497]), strict=True)
    return {part: (data.x[rows], data.y[rows]) for part, rows in parts}


def twin(cell: tuple[str, str, str]) -> tuple[str, str, str]:
    """The cell that computes the same: where 0-1 or 1-2 is "none", the other of the two is idle and made "none"."""
    return method().twin(cell)


def clipped(parameters, lr: float, weight_decay: float):
    """SGD of momentum 0.9 that first scales a gradient of norm above 1 down to 1."""
    import torch

    class ClippedSGD(torch.optim.SGD):
        def step(self, closure=None):
            torch.nn.utils.clip_grad_norm_(self.param_groups[0]["params"], 1.0)
            return super().step(closure)

    return ClippedSGD(parameters, lr=lr, momentum=0.9, weight_decay=weight_decay)


def trained(cell, cells: int, seed: int, *, epochs: int = 10, lr: float = 0.3, channels: int = 16, augment=None):
    """A cell-net after training: 16 steps of 64 digits an epoch, learning rate down to 0 by a cosine."""
    import torch

    from nbkit import models, training

    model = models.build("cell-net", ops=cell, cells=cells, channels=channels, seed=seed)
    model = model.to(memory_format=torch.channels_last)
    training.fit(
        model, split()["train"], epochs=epochs, batch=64, lr=lr, optimizer=clipped, weight_decay=3e-4,
        schedule=training.cosine(), augment=augment, seed=seed,
    )  # fmt: skip
    return model


def scores(model) -> dict:
    """Accuracy in percent on the validation and the test digits, and the number of parameters."""
    from nbkit import training

    found = {part: round(100 * training.accuracy(model, *split()[part]), 2) for part in ("val", "test")}
    return found | {"parameters": sum(p.numel() for p in model.parameters())}


def learning_rates(work: Work) -> pd.DataFrame:
    """Validation accuracy of three cells with a convolution at several learning rates."""

    def measure(cell, lr) -> dict:
        return {"cell": "|".join(cell), "lr": lr, "val": scores(trained(cell, 2, 0, lr=lr))["val"]}

    pairs = itertools.product(RATE_CELLS, RATES)
    return pd.DataFrame([work.once(f"rate {cell} {lr}", lambda c=cell, r=lr: measure(c, r)) for cell, lr in pairs])


def every_cell(work: Work) -> pd.DataFrame:
    """All 125 cells at every number of cells and seed: 85 are trained, the others repeat their twin's row."""
    from nbkit.models.zoo.cells import OPERATIONS

    def trained_rows(last: str, cells: int, seed: int) -> dict:
        distinct = {twin((a, last, b)) for a, b in itertools.product(OPERATIONS, repeat=2)}
        return {"|".join(cell): scores(trained(cell, cells, seed)) for cell in sorted(distinct)}

    rows = []
    for cells, seeds in SEEDS.items():
        for seed in range(seeds):
            found = {}
            for last in OPERATIONS:
                ask = functools.partial(trained_rows, last, cells, seed)
                found |= work.once(f"cells {cells} {seed} {last}", ask)
            for cell in itertools.product(OPERATIONS, repeat=3):
                name = "|".join(twin(cell))
                labels = dict(zip(("e01", "e02", "e12"), cell, strict=True)) | {"twin": name}
                rows.append(labels | {"cells": cells, "seed": seed, "protocol": "base"} | found[name])
    return pd.DataFrame(rows)


def shifted(x, generator):
    """Every image [N, 1, H, W] moved by up to a pixel each way, zeros coming in."""
    import torch

    n, _, height, width = x.shape
    by = torch.randint(3, (2, n, 1), generator=generator)
    rows, columns = by[0] + torch.arange(height), by[1] + torch.arange(width)
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1))[:, 0]
    return padded[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None]][:, None]


def cut_out(x, generator, size: int = 3):
    """A square of zeros somewhere in every image [N, 1, H, W], cut off at the edges (DeVries and Taylor, 2017)."""
    import torch

    n, _, height, width = x.shape
    centre = torch.stack([torch.randint(side, (n, 1), generator=generator) for side in (height, width)])
    near = [(torch.arange(side) - c).abs() <= size // 2 for side, c in zip((height, width), centre, strict=True)]
    return x.masked_fill((near[0][:, :, None] & near[1][:, None])[:, None], 0)


def protocols() -> dict[str, dict]:
    def both(x, generator):
        return cut_out(shifted(x, generator), generator)

    return {
        "cutout": {"augment": cut_out},
        "shifts": {"augment": shifted},
        "2x epochs": {"epochs": 20},
        "2x channels": {"channels": 32},
        "all": {"augment": both, "epochs": 20, "channels": 32},
    }


def ladder(work: Work, cells: pd.DataFrame) -> pd.DataFrame:
    """Eight cells without "none", drawn once (six functions), by several protocols; some are rows of cells.csv."""
    whole = method().WHOLE
    known = cells.set_index(["e01", "e02", "e12", "cells", "seed"])[["val", "test", "parameters"]].to_dict("index")
    rows = []
    drawn = sorted(np.random.default_rng(0).choice(len(whole), 8, replace=False))
    for i in {method().function(whole[i]): i for i in drawn}.values():
        for seed in range(LADDER_SEEDS):
            labels = dict(zip(("e01", "e02", "e12"), whole[i], strict=True)) | {"seed": seed}
            for protocol, count in (("base", 2), ("4 cells", 4)):
                rows.append(labels | {"protocol": protocol} | known[*whole[i], count, seed])
            for protocol, settings in protocols().items():
                key, ask = f"ladder {i} {protocol} {seed}", functools.partial(trained, whole[i], 2, seed, **settings)
                rows.append(labels | {"protocol": protocol} | work.once(key, lambda a=ask: scores(a())))
    return pd.DataFrame(rows)


def search_by_darts(seed: int, lr: float, alpha_lr: float) -> dict:
    """The cell, and alpha at the start and after every epoch."""
    import torch

    m = method()
    net = m.supernet(seed=seed)
    x, y = split()["train"]
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    alphas = [net.cell1.alpha.detach().clone()]
    alphas += m.darts(net, x[order], y[order], epochs=EPOCHS, lr=lr, alpha_lr=alpha_lr, seed=seed)
    steps = (len(alphas) - 1) // EPOCHS
    return {"cell": m.discretise(alphas[-1]), "alphas": [a.flatten().tolist() for a in alphas[::steps]]}


def walked(net, cell):
    """A cell-net of this cell whose layers are the supernet's own."""
    from nbkit import models

    m = method()
    one = models.build("cell-net", ops=cell, cells=2, channels=16, seed=0)
    for name in ("stem", "bn0", "head"):
        one.set_submodule(name, net.get_submodule(name))
    for name, (edge, op) in itertools.product(("cell1", "cell2"), zip(m.EDGES, cell, strict=True)):
        one.get_submodule(name).edges[edge] = net.get_submodule(name).edges[edge][m.OPERATIONS.index(op)]
    return one.train()


def search_by_sharing(seed: int, lr: float, _: None = None, epochs: int = 40) -> dict:
    """Random search with shared weights: every step trains a cell by lot inside the supernet.

    Returns the cell that is best on the validation digits, and every cell's accuracy there with the shared weights
    (BatchNorm by the statistics of the 300 images).
    """
    import torch

    m = method()
    net = m.supernet(seed=seed).train()
    optimizer, lot = m.optimizer_of(net), torch.Generator().manual_seed(seed)
    for factor, x, y in m.batches(*split()["train"], 64, epochs, seed):
        one = walked(net, m.random_cell(lot))
        m.descend(optimizer, lr * factor, torch.nn.functional.cross_entropy(one(x), y))
    x, y = split()["val"]
    with torch.no_grad():
        found = {cell: 100 * float((walked(net, cell)(x).argmax(1) == y).double().mean()) for cell in m.WHOLE}
    return {"cell": max(found, key=found.get), "scores": {"|".join(cell): score for cell, score in found.items()}}


def searches(work: Work, cells: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The cells that the methods return; learning rates are chosen by the table's validation accuracy of such cells."""
    val = cells[cells["cells"] == 2].groupby(["e01", "e02", "e12"])["val"].mean()
    rows, tuning, alphas, shared = [], [], [], {}
    for name, search, rates in (
        ("DARTS", search_by_darts, DARTS_RATES),
        ("shared weights", search_by_sharing, SHARED_RATES),
    ):

        def once(seed, rate, name=name, search=search):
            return work.once(f"{name} {seed} {rate}", lambda: search(seed, *rate))

        reached = {rate: np.mean([val[tuple(once(seed, rate)["cell"])] for seed in TUNING]) for rate in rates}
        best = max(reached, key=reached.get)
        tuning += [{"method": name, "lr": a, "alpha_lr": b, "val": round(v, 2)} for (a, b), v in reached.items()]
        for seed in range(SEARCHES):
            found = once(seed, best)
            rows.append({"method": name, "seed": seed} | dict(zip(("e01", "e02", "e12"), found["cell"], strict=True)))
            for epoch, alpha in enumerate(found.get("alphas", [])):
                labels = itertools.product(("0-1", "0-2", "1-2"), method().OPERATIONS)
                named = {f"{edge} {op}": round(a, 3) for (edge, op), a in zip(labels, alpha, strict=True)}
                alphas.append({"seed": seed, "epoch": epoch} | named)
            if "scores" in found:
                shared[f"seed {seed}"] = {cell: round(score, 2) for cell, score in found["scores"].items()}
    scores_table = pd.DataFrame(shared).rename_axis("cell").reset_index()
    tables = {"tuning": pd.DataFrame(tuning), "alphas": pd.DataFrame(alphas), "shared": scores_table}
    return tables | {"searches": finals(work, rows + by_table(cells))}


def evolve(score, space, rng, evaluations: int = 30, population: int = 10, sample: int = 3):
    """Regularised evolution (Real et al., 2019): mutate the best of a few, let the oldest die; the best ever seen.

    score: cell -> accuracy. Raises: ValueError.
    """
    if not 1 <= sample <= population <= evaluations:
        raise ValueError(f"not sample {sample} <= population {population} <= {evaluations}")
    seen = method().some(population, space, rng)
    while len(seen) < evaluations:
        alive = seen[-population:]
        parent = max((alive[i] for i in rng.choice(population, sample, False)), key=score)
        edge = rng.integers(3)
        other = method().some(1, [op for op in method().OPERATIONS if op != parent[edge]], rng)
        seen.append((*parent[:edge], *other, *parent[edge + 1 :]))
    return max(seen, key=score)


def by_table(cells: pd.DataFrame) -> list[dict]:
    """The cells that methods return which look a cell's score up: validation accuracy at seed 0 with two cells."""
    import torch

    m = method()
    first = cells[(cells["cells"] == 2) & (cells["seed"] == 0)]
    score = dict(zip(zip(first["e01"], first["e02"], first["e12"], strict=True), first["val"], strict=True)).get
    rows = []
    for seed in range(SEARCHES):
        found = {
            "random, 64": m.random_cell(torch.Generator().manual_seed(seed)),
            "best of 8, 64": max(m.some(8, m.WHOLE, np.random.default_rng(seed)), key=score),
            "random, 125": m.some(1, m.CELLS, np.random.default_rng(seed))[0],
            "best of 30, 125": max(m.some(30, m.CELLS, np.random.default_rng(seed)), key=score),
            "evolution": evolve(score, m.CELLS, np.random.default_rng(seed)),
        }
        for name, cell in found.items():
            rows.append({"method": name, "seed": seed} | dict(zip(("e01", "e02", "e12"), cell, strict=True)))
    return rows


def finals(work: Work, rows: list[dict]) -> pd.DataFrame:
    """Every returned cell trained once more from scratch, each run with a seed of its own."""
    found = []
    for row in rows:
        cell, seed = (row["e01"], row["e02"], row["e12"]), 10 + row["seed"]
        reached = work.once(f"final {cell} {seed}", lambda c=cell, s=seed: scores(trained(c, 2, s)))
        found.append(row | {"val": reached["val"], "test": reached["test"]})
    return pd.DataFrame(found)


def build(out: Path, work: Path, part: str = "all") -> list[Path]:
    from nbkit import runtime

    runtime.deterministic(seed=0)
    saved, tables = Work(work), {}
    if part in ("all", "cells"):
        tables |= {"rates": learning_rates(saved), "cells": every_cell(saved)}
    if part in ("all", "ladder"):
        tables |= {"ladder": ladder(saved, every_cell(saved))}
    if part in ("all", "searches"):
        tables |= searches(saved, every_cell(saved))
    for name, table in tables.items():
        write_table(out / f"{name}.csv", table)
    return [out / f"{name}.csv" for name in tables]


if __name__ == "__main__":
    run(build, __doc__, work=work_option("nas-evaluation"), part=part_option("cells", "ladder", "searches"))
