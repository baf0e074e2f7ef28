"""Everything notebooks/02-concepts/03-concept-metrics measures: nine networks, and the metrics of their concepts.

Networks on composed scenes, three for each of rho = 0, 0.5, 0.9 (how often partners come together), the same draws
otherwise. Banks from 900 scenes of training tiles, all metrics on 400 scenes of test tiles.

- metrics.csv: a row a network and bank: accuracy, CEM at five depths (cem1_right: of rightly classified images), CLM
  (skip or miss; depth; alpha), CGIM by version and axis, the share of images whose top concept is absent and there by
  two negative signs. Random banks: smallest, mean, largest of 20, each column for itself.
- concepts.csv: a network and concept: balanced accuracy of its CAV, the same on the scenes that have one of the pair
  alone, CLM where it is present; accuracy and CLM of the class's map and of the image's ink in its place.
- named.csv: of present concepts, which cell their map is strongest in on average: their own, that of the neighbour in
  the domino, another filled one, an empty one; where the neighbour is the partner, and where it is not.
- pairs.csv: of those whose neighbour is the partner, the share strongest in its cell, rho 0.9 and 0; z of the
  difference as if all concepts were independent draws, and halved (four of a scene that always agree).
- source.csv: CLM of all present concepts on scenes with rho 0, by the network's rho and that of the CAV's scenes; z of
  the paired difference to the network 0.9 with CAVs of rho 0.
- nets.safetensors: the three networks of seed 0, float16.

    python data/papers/concept-metrics/recipe.py

The functions are the notebook's own method cells. One thread; about thirteen minutes of processor time. A run that was
stopped goes on where it was (delete the folder --work for a fresh start).
"""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from sklearn.linear_model import SGDClassifier
from torch import Tensor
from torch.nn import functional as F

from nbkit import datasets, models, papers, training
from nbkit.recipes import Work, round_to_half, run, seeds_option, work_option, write_table, write_tensors

SLUG = "concept-metrics"
RHOS = (0.0, 0.5, 0.9)  # with 1 partners would have the same labels, hence the same vectors
SHAPE = {"widths": (16, 32, 64), "classes": 6, "batch_norm": True}
POOL, TEST, DRAWS = 900, 400, 20
FEW = [("skip", 1, 1), ("miss", 1, 1)]  # of CLM: absent concepts, depth, alpha
ALL = [*FEW, *((absent, depth, 1) for absent in ("skip", "miss") for depth in (3, 5)), ("skip", 1, 3), ("skip", 1, 6)]

CONCEPTS = (  # a line holds three pairs: first member, second member, first, ...
    *("t-shirt", "trouser", "pullover", "sandal", "dress", "bag"),
    *("coat", "ankle boot", "shirt", "sneaker", "digit 1", "digit 8"),
)
PROFILE = torch.tensor([12.0, 8, 3, 1, 1, 1])  # how likely class 0 draws each pair; class k: turned by k


class Scenes(NamedTuple):
    images: Tensor  # [n, 1, 84, 84]
    y: Tensor  # [n], the class
    u: Tensor  # bool [n, 12], which concepts are there
    place: Tensor  # [n, 12, 2], row and column of a concept's centre; -1 where it is not there
    mate: Tensor  # [n, 12], the concept in the same domino; -1 where there is none


def tiles(split: str = "test") -> Tensor:
    """Real pictures of the twelve concepts, [12, M, 1, 28, 28]; split: train or test."""
    found = []
    for name in CONCEPTS:
        data = datasets.load("mnist" if "digit" in name else "fashion-mnist")
        label = data.classes.index(name.removeprefix("digit "))
        found.append(getattr(data, f"x_{split}")[getattr(data, f"y_{split}") == label])
    return torch.stack(found)


def layouts() -> Tensor:
    """Every way to lay two dominoes on 3x3 cells, [W, 4]: two cells of one, two of the other."""
    four = torch.tensor(list(permutations(range(9), 4)))
    apart = (four // 3).diff(dim=1).abs() + (four % 3).diff(dim=1).abs()
    return four[(apart[:, 0] == 1) & (apart[:, 2] == 1)]


def compose(pictures: Tensor, n: int, rho: float, *, seed: int = 0) -> Scenes:
    """n Scenes of tiles [12, M, 1, 28, 28]. Raises: ValueError (rho outside [0, 1], n below 1)."""
    if not 0 <= rho <= 1 or n < 1:
        raise ValueError(f"compose needs rho in [0, 1] and n >= 1, not {rho}, {n}")
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(6, (n,), generator=g)
    likely = PROFILE[(torch.arange(6) - y[:, None]) % 6]  # [n, 6]
    first = torch.multinomial(likely, 2, generator=g)  # two different pairs
    second = torch.multinomial(likely, 2, generator=g)
    second = torch.where(torch.rand(n, 1, generator=g) < rho, first, second)
    concept = torch.stack([2 * first, 2 * second + 1], 2).flatten(1)  # [n, 4], a domino is two
    ways = layouts()
    cell = ways[torch.randint(len(ways), (n,), generator=g)]
    chosen = concept * pictures.shape[1]
    chosen = chosen + torch.randint(pictures.shape[1], chosen.shape, generator=g)
    cells = torch.full((n, 9), -1).scatter(1, cell, chosen).view(n, 3, 3)
    images = datasets.canvas(pictures.flatten(0, 1), cells, noise=0.05, seed=seed).images
    centre = torch.stack([cell // 3, cell % 3], 2) * 28 + 14
    place = torch.full((n, 12, 2), -1).scatter(1, concept[..., None].expand(-1, -1, 2), centre)
    mate = torch.full((n, 12), -1).scatter(1, concept, concept[:, [1, 0, 3, 2]])
    return Scenes(images, y, place[..., 0] >= 0, place, mate)


def shipped(rho: float) -> torch.nn.Module:
    """The stored network of seed 0. Raises: KeyError (another rho than 0, 0.5, 0.9)."""
    net, stored = models.build("small-cnn", seed=0, **SHAPE), papers.tensors(SLUG, "nets")
    net.load_state_dict({name: stored[f"{rho}/{name}"] for name in net.state_dict()})
    return net.eval().requires_grad_(False)


def network(rho: float, seed: int, work: Path) -> torch.nn.Module:
    file = work / f"net-{rho}-{seed}.pt"
    net = models.build("small-cnn", seed=seed, **SHAPE)
    if not file.exists():
        s = compose(tiles("train"), 6000, rho, seed=seed)
        net = net.to(memory_format=torch.channels_last)
        how = {"steps": 360, "batch": 32, "lr": 1e-2, "schedule": training.cosine(0.1), "seed": seed}
        training.fit(net, (s.images, s.y), **how)
        round_to_half(net)
        torch.save(net.state_dict(), file)
    net.load_state_dict(torch.load(file))
    return net.eval().requires_grad_(False)


def balanced(says: torch.Tensor, u: torch.Tensor) -> list[float]:
    """Balanced accuracy of every concept; NaN where all images, or none, have it."""
    return ((says & u).sum(0) / u.sum(0) / 2 + (~says & ~u).sum(0) / (~u).sum(0) / 2).tolist()


def existence(method, theta, uhat, pred, s, K=6) -> dict:
    """CEM by depth, and how the failures at depth 1 come about."""
    q = method.ranking(theta, uhat, pred)
    right = pred == s.y
    row = {f"cem{depth}": method.cem(q, s.u, depth).mean().item() for depth in (1, 2, 3, 4, 5)}
    row["cem1_right"] = method.cem(q, s.u, 1)[right].mean().item()
    top = q[:, :1]
    both = (theta.T[pred].gather(1, top) < 0) & (uhat.gather(1, top) < 0) & ~s.u.gather(1, top)
    return row | {"absent1": 1 - row["cem1"], "two_negative1": both.float().mean().item()}


def location(method, maps, q, s, cases) -> dict:
    """Mean CLM of (absent, depth, alpha)."""
    return {f"clm_{absent}{depth}_a{alpha}": method.clm(maps, q, s.place, depth, alpha, absent=absent).mean().item()
            for absent, depth, alpha in cases}  # fmt: skip


def agreement(method, theta, uhat, pred, s, V) -> dict:
    """CGIM by version and axis: the mean, and for concepts the share below 0."""
    Ustar, row = method.mean_projection(uhat, pred, s.y, 6), {}
    for version in (1, 2, 3):
        for axis in ("concept", "class"):
            found = method.cgim(theta, Ustar, V, version, axis=axis)
            row[f"cgim{version}_{axis}"] = found.nanmean().item()
            if axis == "concept":
                row[f"cgim{version}_negative"] = (found < 0).float().mean().item()
    return row


def judged(method, pool, test, s, y_pool, V, bank, *, margin, sgd=False, cases=FEW, theta=None) -> dict:
    """A row of metrics.csv: the bank's projections of pool features and test maps."""
    E, feats = test
    uhat = method.project(feats, bank, margin=margin)
    known = method.project(pool, bank, margin=margin)
    if sgd:  # as the public code of post-hoc CBMs
        made = SGDClassifier(loss="log_loss", penalty="elasticnet", alpha=1e-5, l1_ratio=0.99, max_iter=10000,
                             random_state=0).fit(known, y_pool)  # fmt: skip
        weights, bias = torch.tensor(made.coef_.T).float(), torch.tensor(made.intercept_).float()
    else:
        weights, bias = method.fit_theta(known, y_pool)
    pred = (uhat @ weights + bias).argmax(1)
    weights = weights if theta is None else theta
    q = method.ranking(weights, uhat, pred)
    row = {"accuracy": (pred == s.y).float().mean().item()}
    row |= existence(method, weights, uhat, pred, s) | agreement(method, weights, uhat, pred, s, V)
    return row | location(method, method.coam(E, bank.vectors), q, s, cases)


def unit(shape: tuple[int, int], seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(shape, generator=torch.Generator().manual_seed(seed)), dim=1)


def metric_rows(method, net, pool, own, test, s, seed: int) -> list[dict]:
    E, feats = test
    V = torch.stack([own.u[own.y == k].float().mean(0) for k in range(6)], 1)
    given = (method, pool, test, s, own.y, V)
    bank = method.fit_cavs(pool, own.u, seed=seed)
    rows = {
        "CBM, dot": judged(*given, bank, margin=False, cases=ALL),
        "CBM, margin": judged(*given, bank, margin=True, cases=ALL),
        "C = 0.1": judged(*given, method.fit_cavs(pool, own.u, C=0.1, seed=seed), margin=True),
        "50 images": judged(*given, method.fit_cavs(pool, own.u, 50, seed=seed), margin=True),
        "elastic net": judged(*given, bank, margin=True, sgd=True),
        "random theta": judged(*given, bank, margin=True, theta=unit((12, 6), 77 + seed)),
    }
    drawn = []
    for draw in range(DRAWS):
        by_lot = method.Bank(unit((12, 64), 1000 * (seed + 1) + draw), torch.zeros(12))
        drawn.append(judged(*given, by_lot, margin=False))
    drawn = pd.DataFrame(drawn)
    rows |= {f"random bank, {how}": getattr(drawn, how)().to_dict() for how in ("min", "mean", "max")}
    # the true concepts, and what the class alone says
    truth = s.u.float()
    theta, bias = method.fit_theta(own.u.float(), own.y)
    pred = (truth @ theta + bias).argmax(1)
    rows["oracle"] = {"accuracy": (pred == s.y).float().mean().item()}
    rows["oracle"] |= existence(method, theta, truth, pred, s) | agreement(method, theta, truth, pred, s, V)
    uhat = method.project(feats, bank, margin=True)
    weights, bias = method.fit_theta(method.project(pool, bank, margin=True), own.y)
    pred = (uhat @ weights + bias).argmax(1)
    prior = method.ranking(V, torch.ones_like(uhat), pred)
    rows["class prior"] = {f"cem{depth}": method.cem(prior, s.u, depth).mean().item() for depth in (1, 2, 3, 4, 5)}
    top = method.ranking(weights, uhat, pred)
    ours, theirs = (method.cem(q, s.u, 1) for q in (top, prior))
    rows["class prior"] |= {"cbm_better": (ours > theirs).sum().item(), "cbm_worse": (ours < theirs).sum().item()}
    rows["network"] = {"accuracy": (net.head(feats).argmax(1) == s.y).float().mean().item()}
    for name, maps in one_map(net, E, feats, s).items():
        rows[name] = location(method, maps.expand(-1, 12, -1, -1), top, s, [*FEW, ("skip", 5, 1)])
    return [{"bank": name} | row for name, row in rows.items()]


def one_map(net, E, feats, s) -> dict[str, torch.Tensor]:
    """Maps [n, 1, 21, 21] that know no concept: that of the network's class, and where the image has ink."""
    weights = net.head.weight[net.head(feats).argmax(1)]
    return {"class map": torch.einsum("nmhw,nm->nhw", E, weights)[:, None],
            "ink": F.adaptive_avg_pool2d(s.images, 21)}  # fmt: skip


def concept_rows(method, pool, own, test, s, seed: int) -> list[dict]:
    bank = method.fit_cavs(pool, own.u, seed=seed)
    says = method.project(test[1], bank, margin=True) > 0
    partner = s.u.view(-1, 6, 2).flip(2).flatten(1)
    maps, rows, all_right = method.coam(test[0], bank.vectors), [], balanced(says, s.u)
    for j, name in enumerate(CONCEPTS):
        alone, there = s.u[:, j] != partner[:, j], s.u[:, j]
        hit = method.clm(maps[there, j : j + 1], torch.zeros(int(there.sum()), 1, dtype=torch.long),
                         s.place[there, j : j + 1], 1, 1)  # fmt: skip
        apart = balanced(says[alone, j : j + 1], s.u[alone, j : j + 1])[0]
        row = {"concept": name, "accuracy": all_right[j], "apart": apart, "alone": int(alone.sum())}
        rows.append(row | {"clm": hit.mean().item()})
    return rows


def named_rows(method, pool, own, test, s, seed: int) -> list[dict]:
    """Counts: which cell the map of a present concept is strongest in on average."""
    maps = method.coam(test[0], method.fit_cavs(pool, own.u, seed=seed).vectors)
    cells = F.interpolate(maps, size=(84, 84), mode="bilinear").view(*maps.shape[:2], 3, 28, 3, 28).mean((3, 5))
    best = cells.flatten(2).argmax(2)  # [n, 12]
    cell = torch.where(s.u, s.place[..., 0] // 28 * 3 + s.place[..., 1] // 28, -1)
    own_cell, beside = best == cell, best == cell.gather(1, s.mate.clamp(min=0))
    filled = (best[..., None] == cell[:, None]).any(2)
    partner, rows = s.mate == (torch.arange(12) ^ 1), []
    for kind, which in (("partner", s.u & partner), ("stranger", s.u & ~partner)):
        hits = {"own": own_cell, "neighbour": beside, "other": filled & ~own_cell & ~beside, "empty": ~filled}
        rows.append({"neighbour is": kind} | {name: int((hit & which).sum()) for name, hit in hits.items()})
    return rows


def everywhere(method, maps, s) -> torch.Tensor:
    """CLM of all present concepts, [n]."""
    return method.clm(maps, torch.arange(12).expand(len(s.y), 12), s.place, 12, 1)


def features(method, net, n: int, rho: float, seed: int, split: str):
    s = compose(tiles(split), n, rho, seed=seed)
    return s, method.last_maps(net, s.images)


def measure(method, rho: float, seed: int, work: Path) -> dict[str, list[dict]]:
    """All tables' rows of one network; with rho 0 and 0.9 for source.csv the CLM of every scene with rho 0."""
    net = network(rho, seed, work)
    own, pool = features(method, net, POOL, rho, 1000 + seed, "train")
    pool = pool.mean((2, 3))
    s, E = features(method, net, TEST, rho, 2000 + seed, "test")
    test = (E, E.mean((2, 3)))
    where, found = {"rho": rho, "seed": seed}, {}
    for name, rows in (("metrics", metric_rows(method, net, pool, own, test, s, seed)),
                       ("concepts", concept_rows(method, pool, own, test, s, seed)),
                       ("named", named_rows(method, pool, own, test, s, seed))):  # fmt: skip
        found[name] = [where | row for row in rows]
    if rho == 0.5:
        return found
    zero = (s, E) if rho == 0 else features(method, net, TEST, 0.0, 2000 + seed, "test")
    other, far = features(method, net, POOL, 0.9 - rho, 1000 + seed, "train")
    banks = {rho: method.fit_cavs(pool, own.u, seed=seed),
             0.9 - rho: method.fit_cavs(far.mean((2, 3)), other.u, seed=seed)}  # fmt: skip
    found["source"] = []
    for r, bank in banks.items():
        hits = everywhere(method, method.coam(zero[1], bank.vectors), zero[0])
        found["source"].append(where | {"cav rho": r, "clm": hits.tolist()})
    return found


def source_rows(rows: list[dict]) -> list[dict]:
    """Means of the scenes' CLM, and z of network 0 with CAVs of 0.9 less network 0.9 with CAVs of 0."""
    by = {(row["rho"], row["cav rho"], row["seed"]): torch.tensor(row["clm"]) for row in rows}
    table = []
    for row in rows:
        made = row | {"clm": sum(row["clm"]) / len(row["clm"])}
        if (row["rho"], row["cav rho"]) == (0.0, 0.9):
            less = by[0.0, 0.9, row["seed"]] - by[0.9, 0.0, row["seed"]]
            made["z"] = (less.mean() / less.std() * len(less) ** 0.5).item()
        table.append(made)
    return table


def pair_rows(rows: list[dict], seeds: int) -> list[dict]:
    """Where the partner is beside: shares of maps strongest in its cell, and z of the difference of 0.9 and 0."""
    table = pd.DataFrame(rows)
    table["all"] = table[["own", "neighbour", "other", "empty"]].sum(axis=1)
    found = []
    for seed in range(seeds):
        high = table.query("rho == 0.9 and seed == @seed and `neighbour is` == 'partner'").iloc[0]
        low = table.query("rho == 0 and seed == @seed and `neighbour is` == 'partner'").iloc[0]
        both = (high["neighbour"] + low["neighbour"]) / (high["all"] + low["all"])
        a, b = high["neighbour"] / high["all"], low["neighbour"] / low["all"]
        z = (a - b) / (both * (1 - both) * (1 / high["all"] + 1 / low["all"])) ** 0.5
        found.append({"seed": seed, "rho 0.9": a, "rho 0": b, "z": z, "z halved": z / 2})
    return found


def build(out: Path, work: Path, seeds: int) -> list[Path]:
    from nbkit import runtime

    runtime.deterministic(seed=0)
    method, kept = papers.method(SLUG), Work(work)
    parts = [kept.once(f"measured-{rho}-{seed}", lambda r=rho, s=seed: measure(method, r, s, work))
             for seed in range(seeds) for rho in RHOS]  # fmt: skip
    tables = {name: [row for part in parts for row in part.get(name, [])]
              for name in ("metrics", "concepts", "named", "source")}  # fmt: skip
    tables["source"] = source_rows(tables["source"])
    tables["pairs"] = pair_rows(tables["named"], seeds)
    for name, rows in tables.items():
        write_table(out / f"{name}.csv", pd.DataFrame(rows), float_format="%.4g")
    nets = {f"{rho}/{key}": value.half() if value.is_floating_point() else value
            for rho in RHOS for key, value in network(rho, 0, work).state_dict().items()}  # fmt: skip
    write_tensors(out / "nets.safetensors", nets)
    return [*(out / f"{name}.csv" for name in tables), out / "nets.safetensors"]


if __name__ == "__main__":
    run(build, __doc__, work=work_option(SLUG), seeds=seeds_option(3, "networks for each rho"))
