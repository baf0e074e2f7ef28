"""All tables of this folder: what notebooks/03-neurons/09-iterative-feature-merging measures beforehand.

Test accuracy of nine networks merged to a share of their parameters by iterative feature merging, and by its rivals at
the same widths and at even ones; how many units MLPs of four widths can spare; how merged units correlate on images;
what is left of each layer of vgg-small. About 9 minutes on one core; a run that was stopped goes on where it was
(delete the folder --work for a fresh start). The functions are the notebook's method cells.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
from functools import partial
from pathlib import Path

import pandas as pd
import torch

from nbkit.recipes import Work, load, round_to_half, run, seeds_option, work_option, write_table

KINDS = {"MLP": 2000, "small-cnn": 1000, "vgg-small": 1000}  # test images
LEAST = 0.23
BUDGETS = dict.fromkeys(KINDS, (0.9, 0.7, 0.5, 0.35, LEAST)) | {"vgg-small": (0.7, 0.5, LEAST)}  # of the parameters
FULL = (0.7, 0.5)  # with every rival; at the others only those of MAIN
MAIN = ("Srinivas & Babu", "L1 drop")
DRAWS = 3  # random merges and drops
WIDTHS = (32, 64, 128, 256)
GRID = [round(0.05 * 1.05**k, 4) for k in range(45)]  # beta, 0.05 to 0.43
LOSS = 0.01  # of accuracy
DEPTHS = (0.2, 0.3)  # beta
NULL = 1000  # draws of random pairs


@functools.cache
def method():
    from nbkit import papers

    return papers.method("iterative-feature-merging")


@functools.cache
def images(kind: str):
    """x_train, y_train, x_test, y_test of the networks of a kind."""
    from nbkit import datasets

    if kind == "MLP":
        split = load("models/train.py").pooled()
        return *split.train, *split.test
    data = datasets.load("fashion-mnist")
    n = KINDS[kind]
    return data.x_train, data.y_train, data.x_test[:n], data.y_test[:n]


def network(kind: str, seed: int) -> torch.nn.Sequential:
    from nbkit import models

    if kind == "MLP":
        return models.load("lenet-300-100", dataset="mnist", seed=seed)
    return method().fuse(models.load(kind, seed=seed))


def mlp(width: int, seed: int) -> torch.nn.Sequential:
    """As ``data/models/train.py`` trains those of widths 32, 64 and 128."""
    train = load("models/train.py")
    plan = next(plan for plan in train.PLANS if plan.variant == "w128")
    return train.train(plan._replace(config={"inputs": 196, "hidden": [width, width]}), seed)[0].eval()


def accuracy(model, chain, kind: str) -> float:
    from nbkit import training

    return round(training.accuracy(method().write(model, chain), *images(kind)[2:], batch=100), 4)


def to_budget(chain, share: float, steps: int = 10):
    """IFM's network at a share of the parameters and its beta: the smallest that gets there, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(steps):
        beta = (low + high) / 2
        reached = method().ifm(chain, beta, keep=share).size() <= share * chain.size()
        low, high = (low, beta) if reached else (beta, high)
    return method().ifm(chain, high, keep=share), round(high, 5)


def even(chain, share: float) -> list[int]:
    """Widths that leave the same share of every layer and at most this share of the parameters."""

    def size(widths: list[int]) -> int:
        before = [chain.W[0].shape[1], *widths]
        behind = [*widths, len(chain.b[-1])]
        layers = zip(behind, before, chain.W, strict=True)
        return sum(n * (m * w.shape[2] + 1) for n, m, w in layers)

    shares = (k / 200 for k in range(200, 0, -1))
    widths = ([max(1, round(s * n)) for n in chain.widths()] for s in shares)
    return next(w for w in widths if size(w) <= share * chain.size())


def budget(kind: str, seed: int, share: float) -> list[dict]:
    """A row an arm: the network at this share of the parameters, without training."""
    model = network(kind, seed)
    chain = method().read(model)
    merged, beta = to_budget(chain, share)
    level, level_beta = to_budget(method().balance(chain), share)
    widths, same = merged.widths(), even(chain, share)
    rules = [rule for rule in method().RULES if rule != "IFM" and (share in FULL or rule in MAIN)]
    draws = DRAWS if share in (*FULL, LEAST) else 1
    arms = {("IFM", 0): merged, ("IFM, balanced", 0): level, ("IFM, even", 0): to_widths(chain, same, "IFM")}
    for rule in dict.fromkeys([*rules, "random merge"]):
        for draw in range(draws if rule.startswith("random") else 1):
            arms[rule, draw] = to_widths(chain, widths, rule, seed=10 * seed + draw)
    for rule in [r for r in rules if r in ("L1 drop", "L2 drop")]:
        arms[f"{rule}, even", 0] = to_widths(chain, same, rule)
    return rows_of(kind, seed, share, model, arms, {"IFM": beta, "IFM, balanced": level_beta})


def evenly(kind: str, seed: int, share: float) -> list[dict]:
    """A row for each of the other rules at even widths."""
    model = network(kind, seed)
    chain = method().read(model)
    widths = even(chain, share)
    rules = ("Srinivas & Babu", "mean in, sum out", "closest, drop", "random merge", "random drop")
    arms = {
        (f"{rule}, even", draw): to_widths(chain, widths, rule, seed=10 * seed + draw)
        for rule in (rules if share in FULL else rules[:1])
        for draw in range(DRAWS if rule.startswith("random") else 1)
    }
    return rows_of(kind, seed, share, model, arms, {})


def to_widths(chain, widths: list[int], rule: str, seed: int = 0):
    return method().ifm(chain, 1.0, rule=rule, least=widths, seed=seed)


def rows_of(kind: str, seed: int, share: float, model, arms: dict, betas: dict) -> list[dict]:
    full = method().read(model).size()
    return [
        {
            "kind": kind,
            "seed": seed,
            "budget": share,
            "arm": arm,
            "draw": draw,
            "share": round(c.size() / full, 4),
            "accuracy": accuracy(model, c, kind),
            "widths": "-".join(map(str, c.widths())),
            "beta": betas.get(arm),
        }
        for (arm, draw), c in arms.items()
    ]


def dense(kind: str, seed: int) -> dict:
    model = network(kind, seed)
    reached = accuracy(model, method().read(model), kind)
    return {"kind": kind, "seed": seed, "budget": 1.0, "arm": "dense", "draw": 0, "share": 1.0, "accuracy": reached}


def retrained(seed: int, share: float, widths: str) -> dict:
    """An MLP with IFM's widths, trained from the start."""
    from nbkit import models, training

    train = load("models/train.py")
    plan = next(plan for plan in train.PLANS if plan.variant == "w128")
    hidden = tuple(map(int, widths.split("-")))
    model = models.build("lenet-300-100", inputs=196, hidden=hidden, seed=seed)
    training.fit(model, images("MLP")[:2], seed=seed, **plan.fit)
    round_to_half(model)
    reached = round(training.accuracy(model.eval(), *images("MLP")[2:]), 4)
    row = {"kind": "MLP", "seed": seed, "budget": share, "arm": "retrained", "draw": 0, "accuracy": reached}
    return row | {"widths": widths}


def activations(model, x) -> list[torch.Tensor]:
    """Of every hidden layer what its units give, [values, units]: values are images, or images x places."""
    from nbkit import hooks

    names = [n for n, layer in model.named_children() if isinstance(layer, torch.nn.ReLU)]
    with torch.no_grad(), hooks.record(model, names) as acts:
        for part in x.split(500):
            model(part)
    return [acts[n].transpose(0, 1).flatten(1).T for n in names]


def living(model, x) -> list[torch.Tensor]:
    """Of every hidden layer which units are ever above zero on these images."""
    alive = [torch.zeros(a.shape[1], dtype=torch.bool) for a in activations(model, x[:1])]
    for part in x.split(250):
        alive = [old | (a > 0).any(0) for old, a in zip(alive, activations(model, part), strict=True)]
    return alive


def without(chain, alive: list[torch.Tensor]):
    """The network without its dead units, which changes none of its outputs on those images."""
    chain = copy.deepcopy(chain)
    for at, alive_here in enumerate(alive):
        keep = alive_here.nonzero().flatten().tolist()
        chain.W[at], chain.b[at] = chain.W[at][keep], chain.b[at][keep]
        chain.W[at + 1] = chain.W[at + 1][:, keep]
        chain.members[at] = [[i] for i in range(len(keep))]
    return chain


def along_beta(chain):
    for beta in GRID:
        yield beta, method().ifm(chain, beta)


def along_max_ratio(chain):
    """The same networks as ``ifm(chain, 1.0, max_ratio)``, each merged on from the one before."""
    full, merged = chain.widths(), chain
    for ratio in (k / 100 for k in range(100)):
        merged = method().ifm(merged, 1.0, least=[n - math.ceil(ratio * n) or 1 for n in full])
        yield ratio, merged


def spare(model, chain) -> dict:
    """The share of the units that IFM merges away before more than a point is lost, and where on the way that is."""
    before, full, found = accuracy(model, chain, "MLP"), sum(chain.widths()), {}
    for along, way in {"beta": along_beta, "max_ratio": along_max_ratio}.items():
        found |= {along: 0.0, f"at {along}": None}
        for setting, merged in way(chain):
            if accuracy(model, merged, "MLP") < before - LOSS:
                break
            found |= {along: round(1 - sum(merged.widths()) / full, 4), f"at {along}": setting}
    return found


def width(units: int, seed: int) -> list[dict]:
    """A row for all units, and a row for the living ones."""
    model = mlp(units, seed)
    chain, alive = method().read(model), living(model, images("MLP")[0])
    dead = sum(int((~a).sum()) for a in alive)
    row = {"width": units, "seed": seed, "dead": dead, "accuracy": accuracy(model, chain, "MLP")}
    return [
        row | {"units": "all"} | spare(model, chain),
        row | {"units": "living"} | spare(model, without(chain, alive)),
    ]


def correlations(model, x) -> list[torch.Tensor]:
    return [torch.corrcoef(a.double().T) for a in activations(model, x)]


def pairs(kind: str, seed: int, share: float = 0.5) -> list[dict]:
    """A row a network: dead units, and how pairs of living units that one unit was merged from correlate on images."""
    model = network(kind, seed)
    chain, n = method().read(model), 10_000 if kind == "MLP" else 1000
    alive, r = living(model, images(kind)[0][:n]), correlations(model, images(kind)[2][:200])
    merged, _ = to_budget(chain, share)
    found, null, generator = [], [], torch.Generator().manual_seed(seed)
    for groups, ok, matrix in zip(merged.members, alive, r, strict=True):
        ok = ok & matrix.diagonal().isfinite()
        inside = [(a, b) for g in groups for a, b in itertools.combinations(g, 2) if ok[a] and ok[b]]
        found += [matrix[a, b].item() for a, b in inside]
        a, b = torch.combinations(ok.nonzero().flatten()).T
        draw = torch.randint(len(a), (NULL, len(inside)), generator=generator)
        null.append(matrix[a[draw], b[draw]])
    medians = torch.cat(null, 1).median(1).values
    alone = [not all(ok[i] for i in g) for groups, ok in zip(merged.members, alive, strict=True) for g in groups]
    partly = [
        any(ok[i] for i in g) and not all(ok[i] for i in g)
        for groups, ok in zip(merged.members, alive, strict=True)
        for g in groups
    ]
    return [
        {
            "kind": kind,
            "seed": seed,
            "units": sum(chain.widths()),
            "dead": sum(int((~a).sum()) for a in alive),
            "left": sum(merged.widths()),
            "left, only dead": sum(alone) - sum(partly),
            "largest group": max(len(g) for groups in merged.members for g in groups),
            "pairs": len(found),
            "median r": round(torch.tensor(found).median().item(), 4),
            "above 0.9": round(float((torch.tensor(found) >= 0.9).float().mean()), 4),
            "random": round(medians.median().item(), 4),
            "random, 99 %": round(medians.quantile(0.99).item(), 4),
            "random at 0.9": float((medians >= 0.9).float().mean()),
        }
    ]


def layers(seed: int, beta: float) -> list[dict]:
    """A row a layer of vgg-small, trained and as initialised: channels, and those left."""
    from nbkit import models

    rows = []
    for what, model in {
        "trained": network("vgg-small", seed),
        "untrained": method().fuse(models.build("vgg-small", seed=seed)),
    }.items():
        chain = method().read(model)
        left = zip(chain.widths(), method().ifm(chain, beta).widths(), strict=True)
        row = {"network": what, "seed": seed, "beta": beta}
        rows += [row | {"layer": i, "channels": n, "left": k} for i, (n, k) in enumerate(left, 1)]
    return rows


def build(out: Path, work: Path, seeds: int) -> list[Path]:
    from nbkit import runtime

    runtime.deterministic(seed=0)
    torch.set_num_threads(1)
    kept, rows = Work(work), []
    for kind, seed in itertools.product(KINDS, range(seeds)):
        rows.append(kept.once(f"dense-{kind}-{seed}", partial(dense, kind, seed)))
        for share in BUDGETS[kind]:
            rows += kept.once(f"budget-{kind}-{seed}-{share}", partial(budget, kind, seed, share))
            rows += kept.once(f"evenly-{kind}-{seed}-{share}", partial(evenly, kind, seed, share))
    for row in [r for r in rows if (r["kind"], r["arm"]) == ("MLP", "IFM") and r["budget"] in FULL]:
        settings = (row["seed"], row["budget"], row["widths"])
        rows.append(kept.once(f"retrained-{settings[0]}-{settings[1]}", partial(retrained, *settings)))
    parts = {
        "width": [(width, w, seed) for seed in range(seeds) for w in WIDTHS],
        "pairs": [(pairs, kind, seed) for kind in KINDS for seed in range(seeds)],
        "layers": [(layers, seed, beta) for seed in range(seeds) for beta in DEPTHS],
    }
    tables = {"results": pd.DataFrame(rows)}
    for name, todo in parts.items():
        found = [kept.once("-".join([name, *map(str, how)]), partial(measure, *how)) for measure, *how in todo]
        tables[name] = pd.DataFrame(itertools.chain.from_iterable(found))
    for name, table in tables.items():
        write_table(out / f"{name}.csv", table)
    return [out / f"{name}.csv" for name in tables]


if __name__ == "__main__":
    run(build, __doc__, work=work_option("iterative-feature-merging"), seeds=seeds_option(3))
