"""results.csv, ranks.csv, layers.csv, rates.csv: LeNet-300-100 on Fashion-MNIST and MNIST, five seeds each, dense, by
Maestro and by its rivals, truncated to a share of the dense network's multiply-adds.

All train for ten epochs on 9,000 images under one cosine schedule, dense (also tuned) and Maestro on Fashion-MNIST also
for 30. 1,000 images validate: learning rates (one pilot seed), lambda (the first seeds) and greedy cuts. The
functions are the notebook's own method cells. About 12 minutes on one core; a run that was stopped goes on where it was
(delete the folder --work for a fresh start).
"""

from __future__ import annotations

import copy
import functools
from functools import partial
from pathlib import Path

import pandas as pd
import torch

from nbkit.recipes import Work, part_option, run, seeds_option, work_option, write_table

SETS = ("fashion-mnist", "mnist")
SHARES = (0.5, 0.35, 0.25, 0.15, 0.1, 0.07, 0.05)  # of the dense multiply-adds, for truncation
BUDGETS = (0.25, 0.1)  # those for which a network is fine-tuned
LAMBDAS = (0.0, 5e-4, 1e-3, 2e-3, 4e-3)
GRID = {"fashion-mnist": 3, "mnist": 2}  # seeds in which every lambda is trained
ALONE = (1e-3, 2e-3, 4e-3)  # of the lasso without sampling
EPOCHS, WARM, LATE = 10, 3, 7  # Pufferfish factorises after WARM epochs, fine-tuning begins after LATE
LONG, LONG_SEEDS = 30, 5  # epochs of a longer training, and its seeds
LOSS = 0.01  # of validation accuracy, that lambda may cost
PILOT = 100
RATES = {
    "dense": (0.01, 0.02, 0.05, 0.1),
    "Maestro": (0.01, 0.02, 0.04),
    "lasso": (0.01, 0.02, 0.04, 0.08),
    "low rank": (0.01, 0.02, 0.05, 0.1, 0.2),
    "Pufferfish": (0.02, 0.05, 0.1),
}
FIRST = {"low rank": LATE, "Pufferfish": WARM}  # the epoch they begin with, factorised
WIDTHS = {
    "fc1": (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 80, 120, 200, 300),
    "fc2": (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 100),
    "fc3": tuple(range(1, 11)),
}
DRAWS = 3


@functools.cache
def method():
    from nbkit import papers

    return papers.method("maestro")


@functools.cache
def data(name: str) -> dict:
    """Pairs of images and classes: 9,000 to train on, 1,000 to validate, 2,000 to test."""
    from nbkit import datasets

    d = datasets.load(name)
    order = torch.randperm(len(d.x_train), generator=torch.Generator().manual_seed(0))
    train, valid = order[:9000], order[9000:]
    return {
        "train": (d.x_train[train], d.y_train[train]),
        "valid": (d.x_train[valid], d.y_train[valid]),
        "test": (d.x_test, d.y_test),
    }


def lenet(seed: int):
    from nbkit import models

    return models.build("lenet-300-100", seed=seed)


def dense(name: str, seed: int, lr: float, epochs: int = EPOCHS) -> dict:
    """{epochs done: network} at WARM and LATE (of EPOCHS, or as large a part of more) and the end."""
    from nbkit import training

    model, kept = lenet(seed), {}
    wanted = [part * epochs // EPOCHS for part in (WARM, LATE, EPOCHS)]

    def keep(epoch, history):
        if epoch in wanted:
            kept[epoch] = copy.deepcopy(model)

    training.fit(model, data(name)["train"], epochs=epochs, lr=lr, batch=100, optimizer="sgd",
                 schedule=training.cosine(), on_epoch=keep, seed=seed)  # fmt: skip
    return kept


def factorised(name: str, seed: int, lr: float, lam: float, *, sample: bool = True, epochs: int = EPOCHS) -> dict:
    """{LATE, epochs: network; "ranks": before training and after every epoch}."""
    model, kept = method().decompose(lenet(seed)), {"ranks": []}
    steps = method().train(model, *data(name)["train"], lam=lam, lr=lr, epochs=epochs, sample=sample, seed=seed)
    for epoch, ranks in enumerate(steps):
        kept["ranks"].append(ranks)
        if epoch in (LATE, epochs):
            kept[epoch] = copy.deepcopy(model)
    return kept


def tuned(model, ranks: dict, name: str, seed: int, lr: float, first: int, epochs: int = EPOCHS):
    """The network cut to ``ranks`` by SVD and trained, without lasso or sampling, for the epochs that are left.

    Should it diverge, it starts again at half the rate.
    """
    from nbkit.errors import NotFinite

    small = method().decompose(model, ranks)
    settings = {"lam": 0.0, "lr": lr, "epochs": epochs, "first": first, "sample": False, "seed": seed}
    try:
        list(method().train(small, *data(name)["train"], **settings))
    except NotFinite:
        print(f"{name}, seed {seed}: diverged at {lr} from epoch {first} on")
        return tuned(model, ranks, name, seed, lr / 2, first, epochs)
    return small


class Networks:
    """Trained networks, each kept in a file so that none is trained twice."""

    def __init__(self, work: Work):
        self.work = work

    def once(self, key: str, compute) -> dict:
        path = self.work.folder / f"{key}.pt"
        if not path.is_file():
            found = []
            self.work.once(f"trained-{key}", lambda: found.append(compute()))
            torch.save(found[0] if found else compute(), path)
        return torch.load(path, weights_only=False)


def judged(model, name: str, ranks: dict | None = None) -> dict:
    """Multiply-adds (a share), and validation and test accuracy in percent, with the first components of ``ranks``."""
    from nbkit import training

    m = method()
    if ranks is None and not any(isinstance(part, m.LowRank) for part in model.modules()):
        valid, test = (training.accuracy(model, *data(name)[part]) for part in ("valid", "test"))
        return {"macs": 1.0, "valid": round(100 * valid, 2), "test": round(100 * test, 2)}
    ranks = m.ranks_of(model) if ranks is None else ranks
    with m.using(model, ranks):
        valid, test = (training.accuracy(model, *data(name)[part]) for part in ("valid", "test"))
    found = {"macs": round(m.cost(model, ranks), 4), "valid": round(100 * valid, 2), "test": round(100 * test, 2)}
    return found | ranks


# learning rates and lambda, by validation


def pilot(arm: str, lr: float) -> dict:
    """Validation loss on Fashion-MNIST of a seed that is used for nothing else; inf where training diverges."""
    from nbkit import training
    from nbkit.errors import NotFinite

    name, m = "fashion-mnist", method()
    try:
        if arm == "dense":
            model = dense(name, PILOT, lr)[EPOCHS]
        elif arm in FIRST:
            start = dense(name, PILOT, rate("dense"))[FIRST[arm]]
            model = tuned(start, m.proportional(m.decompose(start), 0.1), name, PILOT, lr, FIRST[arm])
        else:
            model = factorised(name, PILOT, lr, 5e-4, sample=arm == "Maestro")[EPOCHS]
        loss, right = training.evaluate(model, *data(name)["valid"])
        return {"arm": arm, "lr": lr, "loss": round(loss, 4), "accuracy": round(100 * right, 1)}
    except NotFinite:
        return {"arm": arm, "lr": lr, "loss": None, "accuracy": None}


_rates: list[dict] = []  # filled by build before anything else


def rate(arm: str) -> float:
    """The learning rate of least validation loss."""
    return min((row for row in _rates if row["arm"] == arm and row["loss"]), key=lambda row: row["loss"])["lr"]


def chosen(rows: list[dict], name: str, arm: str) -> float:
    """The largest lambda whose validation accuracy, in the mean, is at most LOSS below the dense network's.

    Without one, the lambda of best validation accuracy.
    """
    table = pd.DataFrame([r for r in rows if r["set"] == name and r["arm"] in (arm, "dense")])
    table = table[table["seed"] < (GRID[name] if arm == "Maestro" else 1)]
    level = table[table["arm"] == "dense"]["valid"].mean() - 100 * LOSS
    means = table[(table["arm"] == arm) & (table["lam"] > 0)].groupby("lam")["valid"].mean()
    good = means[means >= level]
    return float(good.index.max() if len(good) else means.idxmax())


# truncation


def greedy(model, x, y, share: float, start: dict | None = None, block: float = 0.2) -> dict[str, int]:
    """Cut, until ``share`` is reached, the block of a layer that adds least loss for each multiply-add saved.

    A block is the last fifth of a layer's components, at least one. start: ranks to go on from.
    """
    from nbkit import training

    if not (share > 0 and 0 < block <= 1):
        raise ValueError(f"share and block must be above 0, block at most 1: {share}, {block}")
    m = method()
    shapes = {name: (len(layer.U), len(layer.V)) for name, layer in m.layers(model).items()}
    ranks = start or m.ranks_of(model)

    def loss_at(some: dict[str, int]) -> float:
        with m.using(model, some):
            return training.evaluate(model, x, y)[0]

    while (before := m.cost(model, ranks)) > share:
        loss, price = loss_at(ranks), {}
        for name, (outputs, inputs) in shapes.items():
            r = min(ranks[name], outputs * inputs // (outputs + inputs))  # with more components it is kept dense
            fewer = ranks | {name: min(int((1 - block) * r), r - 1)}
            if r > 1:
                price[name] = (loss_at(fewer) - loss) / (before - m.cost(model, fewer)), fewer
        if not price:
            raise ValueError(f"one component a layer costs more than a share of {share}")
        ranks = min(price.values(), key=lambda option: option[0])[1]
    return ranks


def truncations(kind: str, order: str, model, name: str) -> list[dict]:
    """Rows of one network in one order of its components, at every share that it can be cut to, by both rules."""
    m, rows, ranks = method(), [], None
    for share in SHARES:
        common = {"arm": kind, "order": order, "share": share}
        rows.append(common | {"rule": "proportional"} | judged(model, name, m.proportional(model, share)))
        ranks = greedy(model, *data(name)["valid"], share, start=ranks)
        rows.append(common | {"rule": "greedy"} | judged(model, name, ranks))
    return rows


def dealt(model, draw: int):
    """The network with the components of every layer in a random order."""
    made = copy.deepcopy(model)
    for place, layer in enumerate(method().layers(made).values()):
        order = torch.randperm(layer.rank, generator=torch.Generator().manual_seed(100 * draw + place))
        order = torch.cat([order, torch.arange(layer.rank, layer.U.shape[1])])
        layer.U.data, layer.V.data = layer.U.data[:, order], layer.V.data[:, order]
    return made


def seed_rows(nets: Networks, name: str, seed: int, lam: float, alone: float) -> list[dict]:
    """All rows of one data set and seed."""
    m = method()
    whole = nets.once(f"{name}-{seed}-dense", partial(dense, name, seed, rate("dense")))
    maestro = nets.once(f"{name}-{seed}-Maestro-{lam}", partial(factorised, name, seed, rate("Maestro"), lam))
    lod = nets.once(f"{name}-{seed}-Maestro-0.0", partial(factorised, name, seed, rate("Maestro"), 0.0))
    lasso = nets.once(
        f"{name}-{seed}-lasso-{alone}", partial(factorised, name, seed, rate("lasso"), alone, sample=False)
    )
    finished = {"dense": whole, "Maestro": maestro, "LoD, no lasso": lod, "lasso, no sampling": lasso}
    rows = [
        {"arm": kind, "order": "own", "rule": "none", "share": 1.0} | judged(net[EPOCHS], name)
        for kind, net in finished.items()
    ]
    svd, own = m.decompose(whole[EPOCHS]), maestro[EPOCHS]
    rows += truncations("dense", "SVD", svd, name)
    rows += truncations("Maestro", "own", own, name)
    rows += truncations("LoD, no lasso", "own", lod[EPOCHS], name)
    rows += truncations("lasso, no sampling", "own", lasso[EPOCHS], name)
    for kind, net in (("Maestro", own), ("lasso, no sampling", lasso[EPOCHS])):
        again = m.decompose(net)
        for share in SHARES:
            found = judged(again, name, m.proportional(again, share))
            rows.append({"arm": kind, "order": "SVD", "share": share, "rule": "proportional"} | found)
    for share in SHARES:
        ranks = m.proportional(own, share)
        for draw in range(DRAWS):
            found = judged(dealt(own, draw), name, ranks)
            rows.append({"arm": "Maestro", "order": f"lot {draw}", "share": share, "rule": "proportional"} | found)
        # the dense network, cut to Maestro's ranks
        for rule in ("proportional", "greedy"):
            wanted = {"arm": "Maestro", "order": "own", "rule": rule, "share": share}
            theirs = next(row for row in rows if wanted.items() <= row.items())
            found = judged(svd, name, {layer: theirs[layer] for layer in m.layers(svd)})
            rows.append({"arm": "dense", "order": "SVD", "share": share, "rule": f"Maestro's ranks, {rule}"} | found)
    for share in BUDGETS:
        starts = {"dense": (whole[LATE], LATE, "greedy"), "Maestro": (maestro[LATE], LATE, "greedy")}
        starts["Pufferfish"] = (whole[WARM], WARM, "proportional")
        for kind, (net, first, rule) in starts.items():
            parts = m.decompose(net)
            ranks = greedy(parts, *data(name)["valid"], share) if rule == "greedy" else m.proportional(parts, share)
            lr = rate("Pufferfish" if kind == "Pufferfish" else "low rank")
            found = judged(tuned(parts, ranks, name, seed, lr, first), name)
            rows.append({"arm": kind, "order": "SVD", "share": share, "rule": f"{rule}, tuned"} | found)
    return [{"set": name, "seed": seed} | row for row in rows]


TUNED = {"dense": "dense SVD, tuned", "Maestro": "Maestro, tuned", "Pufferfish": "Pufferfish"}
SHORT = {"dense": "dense SVD", "LoD, no lasso": "LoD alone", "lasso, no sampling": "lasso alone"}


def label(row: dict) -> str:
    """What was measured, in words: ``Maestro, greedy``, ``dense SVD, Maestro's ranks, greedy``, ``dense, uncut``."""
    arm, order, rule = row["arm"], row["order"], row["rule"]
    if rule == "none":
        return ("dense" if arm == "dense" else SHORT.get(arm, arm)) + ", uncut"
    if rule.endswith("tuned"):
        return TUNED[arm]
    words = [SHORT.get(arm, arm)]
    words += ["SVD"] if order == "SVD" and arm != "dense" else ["by lot"] if order.startswith("lot") else []
    words += [] if rule == "proportional" else [rule.removesuffix(", proportional")]
    return ", ".join(words)


def labelled(row: dict) -> dict:
    """The row with its label, ``arm`` (the label, but for the rule greedy) and ``cut`` (that rule) in front."""
    who = label(row)
    words = {"who": who, "arm": who.removesuffix(", greedy"), "cut": row["rule"].removesuffix(", tuned")}
    return words | {k: v for k, v in row.items() if k not in ("arm", "order", "rule")}


def one_layer(nets: Networks, name: str, seed: int) -> list[dict]:
    """Test loss and accuracy where one layer alone is cut to its first b components, by lambda; size of the b-th."""
    from nbkit import training

    m, rows = method(), []
    for lam in LAMBDAS:
        net = nets.once(f"{name}-{seed}-Maestro-{lam}", partial(factorised, name, seed, rate("Maestro"), lam))[EPOCHS]
        for order, model in (("own", net), ("SVD", m.decompose(net)), ("by lot", dealt(net, 0))):
            for layer, widths in WIDTHS.items():
                part = m.layers(model)[layer]
                sizes = (part.U.square().sum(0) * part.V.square().sum(0)).sqrt()
                for b in [b for b in widths if b < part.rank] + [part.rank]:
                    with m.using(model, {layer: b}):
                        loss, right = training.evaluate(model, *data(name)["test"])
                    row = {"lam": lam, "order": order, "layer": layer, "b": b, "rank": part.rank}
                    row["strength"] = float(f"{sizes[b - 1].item():.3g}") if b else 0.0
                    rows.append(row | {"loss": round(loss, 4), "accuracy": round(100 * right, 2)})
    return rows


def longer(nets: Networks, seed: int, lam: float) -> list[dict]:
    """Dense, tuned too, and Maestro with LONG epochs on Fashion-MNIST: does time to learn the order change anything?"""
    name, m = "fashion-mnist", method()
    key = f"{name}-{seed}-{LONG}-epochs"
    stages = nets.once(f"{key}-dense-stages", partial(dense, name, seed, rate("dense"), LONG))
    whole = stages[LONG]
    make = partial(factorised, name, seed, rate("Maestro"), lam, epochs=LONG)
    own = nets.once(f"{key}-Maestro-{lam}", make)[LONG]
    common = {"order": "own", "rule": "none", "share": 1.0}
    rows = [{"arm": arm} | common | judged(net, name) for arm, net in (("dense", whole), ("Maestro", own))]
    rows += truncations("dense", "SVD", m.decompose(whole), name) + truncations("Maestro", "own", own, name)
    again = m.decompose(own)
    for share in SHARES:
        found = judged(again, name, m.proportional(again, share))
        rows.append({"arm": "Maestro", "order": "SVD", "share": share, "rule": "proportional"} | found)
    first = LATE * LONG // EPOCHS
    for share in BUDGETS:
        parts = m.decompose(stages[first])
        ranks = greedy(parts, *data(name)["valid"], share)
        small = tuned(parts, ranks, name, seed, rate("low rank"), first, LONG)
        rows.append({"arm": "dense", "order": "SVD", "share": share, "rule": "greedy, tuned"} | judged(small, name))
    return [{"set": f"{name}, {LONG} epochs", "seed": seed} | row for row in rows]


def grid(nets: Networks, kept: Work) -> list[dict]:
    """Rows, an epoch each, of dense networks and of every lambda."""
    rows = []
    for name in SETS:
        for seed in range(GRID[name]):
            cases = [("dense", 0.0)] + [("Maestro", lam) for lam in LAMBDAS]
            cases += [("lasso", lam) for lam in ALONE] if seed == 0 else []
            for arm, lam in cases:
                if arm == "dense":
                    net = nets.once(f"{name}-{seed}-dense", partial(dense, name, seed, rate("dense")))
                else:
                    make = partial(factorised, name, seed, rate(arm), lam, sample=arm == "Maestro")
                    net = nets.once(f"{name}-{seed}-{arm}-{lam}", make)
                found = kept.once(f"grid-{name}-{seed}-{arm}-{lam}", partial(judged, net[EPOCHS], name))
                row = {"set": name, "seed": seed, "arm": arm, "lam": lam}
                row |= {figure: found[figure] for figure in ("macs", "valid", "test")}
                rows += [row | {"epoch": epoch} | ranks for epoch, ranks in enumerate(net.get("ranks", [{}]))]
    return rows


def build(out: Path, work: Path, seeds: int = 5, part: str = "all") -> list[Path]:
    from nbkit import runtime

    runtime.deterministic(seed=0)
    kept, nets = Work(work), Networks(Work(work))
    _rates.clear()
    for arm, lrs in RATES.items():
        _rates.extend([kept.once(f"rate-{arm}-{lr}", partial(pilot, arm, lr)) for lr in lrs])
    rows = grid(nets, kept)
    lam = {name: (chosen(rows, name, "Maestro"), chosen(rows, name, "lasso")) for name in SETS}
    print({name: dict(zip(("Maestro", "lasso"), pair, strict=True)) for name, pair in lam.items()})
    if part == "grid":
        return []
    results = []
    for name in SETS:
        for seed in range(seeds):
            results += kept.once(f"{name}-{seed}", partial(seed_rows, nets, name, seed, *lam[name]))
    for seed in range(min(seeds, LONG_SEEDS)):
        results += kept.once(f"long-{seed}", partial(longer, nets, seed, lam["fashion-mnist"][0]))
    for row in rows:
        row["chosen"] = row["lam"] == lam[row["set"]][row["arm"] != "Maestro"] and row["arm"] != "dense"
    layers = kept.once("layers", partial(one_layer, nets, "fashion-mnist", 0))
    results = [labelled(row) for row in results]
    tables = {"results": results, "ranks": rows, "layers": layers, "rates": _rates}
    for name, table in tables.items():
        frame = pd.DataFrame(table)
        whole = [c for c in ("fc1", "fc2", "fc3") if c in frame]
        write_table(out / f"{name}.csv", frame.astype(dict.fromkeys(whole, "Int64")))
    return [out / f"{name}.csv" for name in tables]


if __name__ == "__main__":
    run(build, __doc__, work=work_option("maestro"), seeds=seeds_option(5), part=part_option("grid"))
