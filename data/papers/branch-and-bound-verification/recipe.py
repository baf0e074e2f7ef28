"""Twelve small networks for digits, and what branch and bound proves of them on test images.

nets.safetensors: four activations, trained against attacks (three seeds each are measured, seed 0 is stored).
settings.csv: the radius and learning rate of each, chosen on training images. bounds.csv, proved.csv, curves.csv: the
bound of every test image by every heuristic, whether it is above 0, and its mean gain on the way. ranks.csv: estimated
beside true gains.
The functions are the method cells of notebooks/12-search-and-proof/06-branch-and-bound-verification.
"""

from __future__ import annotations

import functools
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from nbkit.recipes import Work, part_option, round_to_half, run, work_option, write_table, write_tensors

SLUG = "branch-and-bound-verification"
ACTIVATIONS = ("sigmoid", "tanh", "sin", "gelu")
SEEDS = 3
IMAGES = 30  # of the test images; as many training images choose
RADII = tuple(round(0.005 * i, 3) for i in range(2, 25))
RATES = (0.005, 0.01, 0.02, 0.05, 0.1)
FIRST, STEPS, SPLITS = 50, 10, 32  # optimiser steps at the root and in each child; splits of a question
DRAWS = 3  # of the random choice
NAMES = {"long": "no split", "input": "inputs"}  # in the tables
ARMS = {  # heuristic, branching point
    "random": ("random", "middle"),
    "widest": ("widest", "middle"),
    "weighted": ("weighted", "middle"),
    "BaBSR-like": ("BaBSR-like", "middle"),
    "BBPS": ("BBPS", "middle"),
    "BBPS, points": ("BBPS", "points"),
}


@functools.cache
def method():
    from nbkit import papers

    return papers.method(SLUG)


@functools.cache
def data():
    """Digits as [N, 64] in [0, 1], training and test."""
    from nbkit import datasets

    d = datasets.load("digits")
    return d.x_train.flatten(1), d.y_train, d.x_test.flatten(1), d.y_test


def babsr_like(net, t, d):
    """As BBPS, but the change ends at the bias of the layer below: what becomes of A is left out."""
    import torch

    m = method()
    kl, ku, bl, bu = d["rows"].unbind(2)
    a = m.signed(d["arrived"][:, None], kl, ku)
    r = m.signed(d["arrived"][:, None], bl, bu) + a * torch.cat(net["b"][:-1])
    return (r[:, 1:] - r[:, :1]).amin(1)


def width(net, t, d):
    """How long each neuron's interval is."""
    return d["ends"].diff(dim=1)[:, 0]


def weighted(net, t, d):
    """The same times the size of the coefficient at the activation's output."""
    return width(net, t, d) * d["arrived"].abs()


def heuristic(name: str, seed: int = 0):
    """A score of neurons by its name; "random" is dealt by the seed."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    scores = {
        "BBPS": method().bbps,
        "BaBSR-like": babsr_like,
        "weighted": weighted,
        "widest": width,
        "random": lambda net, t, d: torch.rand(d["point"].shape, generator=generator),
    }
    if name not in scores:
        raise ValueError(f"no heuristic {name!r}: it is one of {', '.join(scores)}")
    return scores[name]


def untrained(name: str):
    """64-32-32-10 with this activation."""
    from torch import nn

    f = activation(name)["f"]

    class Apply(nn.Module):
        def forward(self, x):
            return f(x)

    return nn.Sequential(nn.Linear(64, 32), Apply(), nn.Linear(32, 32), Apply(), nn.Linear(32, 10))


def trained(name: str, seed: int) -> list[list]:
    """Trained for 30 epochs against three steps of PGD within 0.03, rounded to half precision; test accuracy first."""
    import torch

    from nbkit import training

    torch.manual_seed(seed)
    model = untrained(name)
    x, y, x_test, y_test = data()
    against = lambda m, a, b, generator: training.pgd(m, a, b, eps=0.03, steps=3)  # noqa: E731
    rate = 1e-2 if name == "sigmoid" else 3e-3
    training.fit(model, (x, y), epochs=30, batch=64, lr=rate, adversary=against, schedule=training.cosine(), seed=seed)
    round_to_half(model)
    with torch.no_grad():
        accuracy = (model(x_test).argmax(1) == y_test).double().mean().item()
    return [accuracy, *(p.tolist() for p in model.parameters())]


def network(name: str, parameters: list):
    """The model in float64 with these parameters, and what ``read`` makes of it."""
    import torch

    model = untrained(name).double()
    for p, values in zip(model.parameters(), parameters, strict=True):
        p.data = torch.as_tensor(values).double()
    return model.requires_grad_(False), method().read(model, activation(name))


def questions(model, net, x, y, eps: float, n: int, seed: int):
    """The task of the first n images, in an order dealt by the seed, that the network names rightly: the true class
    against the class whose bound is lowest before any optimisation; and which images these are."""
    import torch

    x = x.double()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    images = order[(model(x[order]).argmax(1) == y[order])][:n]
    x, y = x[images], y[images]
    low, high = (x - eps).clamp(0, 1), (x + eps).clamp(0, 1)
    others = torch.stack([torch.tensor([k for k in range(10) if k != label]) for label in y.tolist()])  # [n, 9]
    c = torch.nn.functional.one_hot(y, 10)[:, None] - torch.nn.functional.one_hot(others, 10)
    c = c.double().flatten(0, 1)
    t = method().task(net, c[::9], low, high)
    rows = method().lines(net["act"], t["l"], t["u"]).repeat_interleave(9, 0)
    A, r, _ = method().backward(net, c, rows)
    bounds = method().least(A, r, low.repeat_interleave(9, 0), high.repeat_interleave(9, 0)).view(-1, 9)
    hardest = c.view(-1, 9, 10)[torch.arange(len(images)), bounds.argmin(1)]
    return method().task(net, hardest, low, high), images.tolist()


def settings(name: str, seed: int, parameters: list) -> dict:
    """On training images: the rate with the best mean bound without a split, and the radius at which that proves
    nearest to half of the questions."""
    model, net = network(name, parameters)
    x, y, _, _ = data()
    found = {}
    low, high = 0, len(RADII) - 1
    while low < high:  # the share falls as the radius grows
        eps = RADII[(low + high) // 2]
        try:
            t, _ = questions(model, net, x, y, eps, IMAGES, seed)
            bound = method().start(net, t, None, FIRST, RATES[2])["bound"]
            found[eps] = (bound > 0).double().mean().item()
        except ValueError:  # an interval leaves the tables
            found[eps] = 0.0
        if found[eps] > 0.5:
            low = (low + high) // 2 + 1
        else:
            high = (low + high) // 2
    eps = min(found, key=lambda e: abs(found[e] - 0.5))
    t, _ = questions(model, net, x, y, eps, IMAGES, seed)
    rates = {lr: method().start(net, t, None, FIRST, lr)["bound"].mean().item() for lr in RATES}
    return {"eps": eps, "lr": max(rates, key=rates.get), "proved": found[eps], "rates": list(rates.values())}


def attacked(model, t, points: int = 10_000, climbs: int = 1000, steps: int = 12):
    """Points of each box, random ones and ones that went downhill from the best of them, and their values:
    [N][points + climbs, inputs] and [N][points + climbs]."""
    import torch

    generator = torch.Generator().manual_seed(0)
    met, values = [], []
    for c, low, high in zip(t["c"], t["low"], t["high"], strict=True):
        x = low + (high - low) * torch.rand(points, len(low), generator=generator, dtype=torch.float64)
        z = x[(model(x) @ c).argsort()[:climbs]].requires_grad_()
        for step in range(steps):
            (slope,) = torch.autograd.grad((model(z) @ c).sum(), z)
            z = torch.minimum(torch.maximum(z - (high - low) / (4 + step) * slope.sign(), low), high)
            z = z.detach().requires_grad_()
        met.append(torch.cat([x, z.detach()]))
        values.append(model(met[-1]) @ c)
    return met, values


def by_input(net, t, d, splits: int, lr: float):
    """Split boxes instead of neurons: the input whose width times coefficient is largest, in the middle.

    The children's intervals are computed anew; slopes, steps and the parent's bound as for the others."""
    import torch

    m, N = method(), len(t["l"])
    boxes, history = (t["low"], t["high"]), [d["bound"]]
    for _ in range(splits):
        at = d["bound"].view(-1, N).argmin(0) * N + torch.arange(N)
        low, high = (box[at] for box in boxes)
        worst = {k: v[at] for k, v in d.items()}
        l, u = worst["ends"].unbind(1)
        offsets = [m.offset(net["act"], worst["slopes"][:, i], l, u, side) for i, side in enumerate((1, -1))]
        A, _, _ = m.backward(net, t["c"], torch.cat([worst["slopes"], torch.stack(offsets, 1)], 1))
        j = (A.abs() * (high - low)).argmax(1)
        both_low, both_high = low.repeat(2, 1), high.repeat(2, 1)
        cut = (low + high)[torch.arange(N), j] / 2
        both_high[torch.arange(N), j] = cut
        both_low[torch.arange(N, 2 * N), j] = cut
        child = m.task(net, t["c"].repeat(2, 1), both_low, both_high)
        new = {k: torch.cat([v, v]) for k, v in worst.items()}
        new |= {"who": torch.arange(2 * N), "ends": torch.stack([child["l"], child["u"]], 1)}
        new = m.improve(net, child, new, STEPS, lr)
        d = {k: torch.cat([v.index_copy(0, at, new[k][:N]), new[k][N:]]) for k, v in d.items()}
        boxes = tuple(
            torch.cat([box.index_copy(0, at, both[:N]), both[N:]])
            for box, both in zip(boxes, (both_low, both_high), strict=True)
        )
        history.append(d["bound"].view(-1, N).amin(0))
    return torch.stack(history)


def prepared(name: str, seed: int, parameters: list, chosen: dict, n: int = IMAGES):
    """Model, net, task and images of a network's questions on test images."""
    model, net = network(name, parameters)
    _, _, x, y = data()
    return model, net, *questions(model, net, x, y, chosen["eps"], n, seed)


@functools.cache
def stored(name: str, seed: int = 0, n: int = IMAGES):
    """The same from the stored network and settings, and the learning rate."""
    from nbkit import papers

    chosen = papers.results(SLUG, "settings").set_index(["activation", "seed"]).loc[(name, seed)]
    tensors = papers.tensors(SLUG, "nets")
    model, net, t, images = prepared(name, seed, [tensors[f"{name}-{seed}-{i}"] for i in range(6)], chosen, n)
    return model, net, t, images, chosen["lr"]


def hidden(net, x):
    """Pre-activations [..., n] of all hidden neurons."""
    import torch

    z = []
    for W, b in zip(net["W"][:-1], net["b"][:-1], strict=True):
        z.append(x @ W.T + b)
        x = net["act"]["f"](z[-1])
    return torch.cat(z, -1)


def room(model, net, t, d, **effort) -> float:
    """The least that a value met in a domain lies above the domain's bound, over all domains and the points of
    ``attacked`` that fall into them; negative were a bound too high. Every point must lie in a domain, and within
    the intervals and planes of its box."""
    import torch

    gaps = []
    for i, (x, values) in enumerate(zip(*attacked(model, t, **effort), strict=True)):
        z = hidden(net, x)
        assert ((t["l"][i] <= z) & (z <= t["u"][i])).all(), "a neuron leaves its interval"
        assert (x @ t["L"][i].T + t["r"][i] <= z + 1e-12).all(), "a neuron leaves its planes"
        assert (z <= x @ t["U"][i].T + t["s"][i] + 1e-12).all(), "a neuron leaves its planes"
        mine = d["who"] == i
        l, u = d["ends"][mine].unbind(1)
        inside = ((l[:, None] <= z) & (z <= u[:, None])).all(-1)  # [domains, points]
        assert inside.any(0).all(), "a point lies in no domain"
        gap = values - d["bound"][mine, None]
        gaps.append(torch.where(inside, gap, torch.inf).min().item())
    return min(gaps)


def room_after(name: str, questions: int, splits: int) -> float:
    """``room`` of the first questions of a stored network, their domains after BBPS's splits."""
    model, net, t, _, lr = stored(name, n=questions)
    _, d = method().branch(net, t, method().start(net, t, lr=lr), splits, lr=lr)
    return room(model, net, t, d)


def ahead(table: pd.DataFrame, a: str, b: str, each: bool = True) -> dict[str, bool]:
    """By activation: is column a above b? p < 0.0125 when the sign of every image's difference is flipped at random,
    and, with ``each``, a higher mean in every network."""
    from scipy.stats import permutation_test

    found = {}
    for name, rows in table.groupby("activation", sort=False):
        gap = rows[a].astype(float) - rows[b].astype(float)
        flips = {"permutation_type": "samples", "alternative": "greater", "n_resamples": 9999}
        p = permutation_test((gap.to_numpy(),), lambda g, axis: g.mean(axis), vectorized=True, rng=0, **flips).pvalue
        found[name] = bool(p < 0.0125 and (not each or (gap.groupby(rows["seed"]).mean() > 0).all()))
    return found


@functools.cache
def activation(name: str) -> dict:
    """One of the paper's activations, or ReLU, with its tables. Raises: ValueError."""
    if name not in method().KNOWN:
        raise ValueError(f"no activation {name!r}: it is one of {', '.join(method().KNOWN)}")
    return method().tabled(*method().KNOWN[name])


@functools.cache
def points(name: str, reach: float = 5.0, step: float = 0.05):
    """The paper's lookup table as a function of l and u: of all p on a grid, the one that leaves the least area over
    [l, p] and [p, u]. Ends are rounded inwards; where the table has nothing between them, it is the middle."""
    import torch

    grid = torch.linspace(-reach, reach, round(2 * reach / step) + 1).double()
    i, j = torch.triu_indices(len(grid), len(grid), 1)
    areas = torch.full((len(grid), len(grid)), torch.inf).double()
    areas[i, j] = method().area(activation(name), grid[i], grid[j])
    best = grid[torch.stack([(row[:, None] + areas).argmin(0) for row in areas])]

    def point(l, u):
        i = ((l + reach) / step - 1e-6).ceil().long()
        j = ((u + reach) / step + 1e-6).floor().long()
        known = (i >= 0) & (j < len(grid)) & (j > i + 1)
        return torch.where(known, best[i * known, j * known], (l + u) / 2)

    return point


def at_zero(l, u):
    """0 where the interval holds it, else the middle: where ReLU is split."""
    import torch

    return torch.where((l < 0) & (u > 0), 0.0, (l + u) / 2)


def smallest(sizes, act: dict, reach: float, splits: int, choose=None, steps: int = 40) -> dict[str, float]:
    """Of a random network with one output on the cube of this reach: its bound at first and after all splits, and its
    smallest value on a grid of 401 points a side."""
    import torch
    from torch import nn

    m = method()
    torch.manual_seed(0)

    class Apply(nn.Module):
        def forward(self, z):
            return act["f"](z)

    layers = [layer for a, b in zip(sizes, sizes[1:], strict=False) for layer in (nn.Linear(a, b), Apply())]
    net = m.read(nn.Sequential(*layers[:-1]), act)
    box = reach * torch.ones(1, sizes[0], dtype=torch.float64)
    t = m.task(net, torch.ones(1, 1, dtype=torch.float64), -box, box)
    history, _ = m.branch(net, t, m.start(net, t, choose, lr=0.1), splits, m.bbps, choose, steps=steps, lr=0.1)
    axis = torch.linspace(-reach, reach, 401, dtype=torch.float64)
    last = act["f"](hidden(net, torch.cartesian_prod(*[axis] * sizes[0]).view(-1, sizes[0])))[:, net["parts"][-1]]
    met = (last @ net["W"][-1].T + net["b"][-1]).min()
    return {"no split": history[0].item(), "all splits": history[-1].item(), "smallest on a grid": met.item()}


def searched(name: str, seed: int, parameters: list, chosen: dict, arm: str, draw: int = 0) -> list:
    """Bounds after 0 to SPLITS splits, [SPLITS + 1][N]; of "long" those after few and after many steps."""
    m, lr = method(), chosen["lr"]
    _, net, t, _ = prepared(name, seed, parameters, chosen)
    if arm == "long":
        return [m.start(net, t, None, n, lr)["bound"].tolist() for n in (FIRST, FIRST + 2 * SPLITS * STEPS)]
    if arm == "input":
        return by_input(net, t, m.start(net, t, None, FIRST, lr), SPLITS, lr).tolist()
    score, where = ARMS[arm]
    choose = None if where == "middle" else points(name)
    begin = m.start(net, t, choose, FIRST, lr)
    score = heuristic(score, 100 * seed + draw)
    return m.branch(net, t, begin, SPLITS, score, choose, steps=STEPS, lr=lr)[0].tolist()


def ranked(name: str, seed: int, parameters: list, chosen: dict) -> list[dict]:
    """Of every image: Spearman correlation of each score with the true gain of splitting each neuron in the middle,
    and the share of the largest true gain that the neuron with the highest score gets."""
    import torch
    from scipy.stats import spearmanr

    m = method()
    _, net, t, images = prepared(name, seed, parameters, chosen)
    d = m.start(net, t, None, FIRST, chosen["lr"])
    n = t["l"].shape[1]
    scores = {h: heuristic(h)(net, t, d) for h in ("BBPS", "BaBSR-like", "weighted", "widest")}
    every = {k: v.repeat_interleave(n, 0) for k, v in d.items()}
    j = torch.arange(n).repeat(len(images))
    two = m.improve(net, t, m.split(net["act"], every, j), STEPS, chosen["lr"])
    gain = two["bound"].view(2, len(images), n).amin(0) - d["bound"][:, None]
    rows = []
    for i, image in enumerate(images):
        row = {h: round(float(spearmanr(s[i], gain[i]).statistic), 3) for h, s in scores.items()}
        top = gain[i].max().clamp(min=1e-9)
        best = {f"{h} gets": round((gain[i, s[i].argmax()] / top).item(), 3) for h, s in scores.items()}
        rows.append({"activation": name, "seed": seed, "image": image} | row | best)
    return rows


def measured(kept: Work, name: str, seed: int) -> dict:
    """Everything of one network."""
    accuracy, *parameters = kept.once(f"net-{name}-{seed}", partial(trained, name, seed))
    chosen = kept.once(f"settings-{name}-{seed}", partial(settings, name, seed, parameters))
    arms = [(arm, draw) for arm in ARMS for draw in range(DRAWS if arm == "random" else 1)]
    arms += [("long", 0), ("input", 0)]
    found = {
        f"{arm} {draw}" if arm == "random" else arm: np.array(
            kept.once(f"{arm}-{name}-{seed}-{draw}", partial(searched, name, seed, parameters, chosen, arm, draw))
        )
        for arm, draw in arms
    }
    model, _, t, images = prepared(name, seed, parameters, chosen)
    lowest = lambda: [v.min().item() for v in attacked(model, t)[1]]  # noqa: E731
    least = np.array(kept.once(f"least-{name}-{seed}", lowest))
    for arm, history in found.items():
        assert (history <= least).all(), f"{name} {seed} {arm}: a bound above a value that was met"
    ranks = kept.once(f"ranks-{name}-{seed}", partial(ranked, name, seed, parameters, chosen))
    labels = {"activation": name, "seed": seed}
    head = pd.DataFrame({**labels, "image": images})
    ends = {"least": least, "none": found["long"][0]} | {NAMES.get(arm, arm): h[-1] for arm, h in found.items()}
    won = {arm: (values > 0).astype(int) for arm, values in ends.items()}
    won = {"not refuted": won.pop("least")} | won
    rise = {NAMES.get(arm, arm): (h - h[0]).mean(1) for arm, h in found.items() if arm != "long"}
    rise["no split"] = np.full(SPLITS + 1, (found["long"][1] - found["long"][0]).mean())
    return {
        "settings": labels | {"accuracy": round(accuracy, 4), **chosen},
        "bounds": head.join(averaged(pd.DataFrame(ends)).round(3)),
        "proved": head.join(averaged(pd.DataFrame(won)).round(3)),
        "curves": averaged(pd.DataFrame(rise)).round(3).rename_axis("splits").reset_index().assign(**labels),
        "ranks": pd.DataFrame(ranks),
        "nets": {f"{name}-{seed}-{i}": np.array(p) for i, p in enumerate(parameters)},
    }


def averaged(table: pd.DataFrame) -> pd.DataFrame:
    """With one column for the random draws, their mean."""
    draws = [column for column in table if column.startswith("random ")]
    return table.drop(columns=draws).assign(random=table[draws].mean(axis=1))


def build(out: Path, work: Path, part: str = "all") -> list[Path]:
    import torch

    from nbkit import runtime

    runtime.deterministic(seed=0)
    kept = Work(work)
    names = ACTIVATIONS if part == "all" else (part,)
    found = [measured(kept, name, seed) for seed in range(SEEDS) for name in names]
    if part != "all":
        return []
    write_table(out / "settings.csv", pd.DataFrame([f["settings"] for f in found]).drop(columns="rates"))
    for table in ("bounds", "proved", "curves", "ranks"):
        write_table(out / f"{table}.csv", pd.concat([f[table] for f in found]))
    nets = {k: torch.tensor(v).half() for f in found if f["settings"]["seed"] == 0 for k, v in f["nets"].items()}
    write_tensors(out / "nets.safetensors", nets)
    return [out / f"{name}.csv" for name in ("settings", "bounds", "proved", "curves", "ranks")] + [
        out / "nets.safetensors"
    ]


if __name__ == "__main__":
    run(build, __doc__, work=work_option(SLUG), part=part_option(*ACTIVATIONS))
