"""All tables of this folder: what notebooks/09-representations/06-brain-encoders measures beforehand.

Five simulated brains look at the same canvases of Fashion-MNIST images. Encoders of their vertices, from 250, 500,
1,000, 2,000 and 4,000 training canvases, scored on 1,000 others (results.csv.gz); where attention lies and whether
value norms agree (maps.csv); learning rates and the factor of louder positions, chosen on a sixth brain (rates.csv).
network.safetensors: the attention encoder of brain 0 from 4,000 canvases, in half precision. About 10 minutes on one
core; a run that was stopped goes on where it was (delete the folder --work for a fresh start). Routing rules and the
encoder are the notebook's method cells; canvases, rivals and what is measured on maps stand here.
"""

from __future__ import annotations

import functools
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from nbkit.recipes import (
    Work,
    round_to_half,
    run,
    seeds_option,
    widened,
    work_option,
    write_table,
    write_tensors,
)

SIZES = (250, 500, 1000, 2000, 4000)
SPLITS = {"train": 4000, "val": 500, "test": 1000}
TUNING = 5  # the brain on which learning rates are chosen
TUNED_AT = 1000
LOUD = "attention, louder positions"  # positions are multiplied before they are added
FITTED = 250  # training canvases of which the principal axes are taken
RATES = {
    "attention": (0.001, 0.003, 0.01),
    "factorised": (0.003, 0.01, 0.03),
    "one shared query": (0.001, 0.003, 0.01),
    LOUD: (),  # the rate of attention
}
FACTORS = (8, 16, 32)  # of the positions of LOUD
MADE_AT = {"factorised": (1000, 4000), "one shared query": (4000,), LOUD: (1000, 4000)}  # others: all sizes
MAPPED = (1000, 4000)
LONG = {name: f"{name}, 3,000 steps" for name in ("attention", LOUD)}  # is the order of models a matter of steps?
LONG_BRAINS = (0,)
POOLED = ("ridge, mean", "ridge, max", "ridge, second order")
STATIC = ("ridge, flat", "ridge, mean", "factorised")
GRID = 6
REGIONS = ("place", "category", "mix", "presence", "pool")
VERTICES = 16  # a region
PREFERRED = (4, 1, 7, 5, 3, 9)  # the class that a brain's regions prefer, drawn once
EMPTY = 500  # tiles of noise alone
NOISE = 0.1  # standard deviation, of pixels in [0, 1]
ALPHAS = tuple(10 ** (k / 2) for k in range(-4, 15))  # 0.01 to 10 million


@functools.cache
def the_method():
    from nbkit import papers

    return papers.method("brain-encoders")


# --- simulated brains


def owner() -> Tensor:
    """The region of each vertex, [80]."""
    return torch.arange(len(REGIONS)).repeat_interleave(VERTICES)


def near(corner) -> Tensor:
    """The 2 x 2 cells below and right of a corner (row, column), as a mask [36]. Raises: ValueError."""
    if not 0 <= min(corner) <= max(corner) <= GRID - 2:
        raise ValueError(f"a corner of 2 x 2 cells has a row and column of 0 to {GRID - 2}, not {corner}")
    cell = torch.arange(GRID * GRID)
    return ((cell // GRID - corner[0]) // 2 == 0) & ((cell % GRID - corner[1]) // 2 == 0)


def region_vectors(tokens, kinds, preferred, corner, centre) -> dict[str, Tensor]:
    """What each region takes from a canvas, [N, d]: the routing rules.

    tokens [N, 36, d]; kinds [N, 36], classes or -1; centre [d]: the preferred class's mean token. Raises: ValueError.
    """
    if tokens.ndim != 3 or tokens.shape[:2] != kinds.shape:
        raise ValueError(f"tokens are [N, L, d] and kinds [N, L], not {tuple(tokens.shape)} and {tuple(kinds.shape)}")
    wanted = (kinds == preferred).to(tokens)
    share = wanted / wanted.sum(1, keepdim=True).clamp(min=1)
    closeness = 1 - torch.arange(GRID * GRID) % GRID / (GRID - 1)  # 1 at the left edge, 0 at the right
    return {
        "place": tokens[:, near(corner)].mean(1),
        "category": (share[:, :, None] * (tokens - centre)).sum(1),
        "mix": ((share * closeness)[:, :, None] * (tokens - centre)).sum(1),
        "presence": wanted.amax(1, keepdim=True).expand(-1, tokens.shape[2]),
        "pool": tokens.mean(1),
    }


def brain(seed: int) -> dict:
    """Preferred class, corner of the 2 x 2 cells, and vertex weights of a simulated brain. Raises: ValueError."""
    if seed not in range(len(PREFERRED)):
        raise ValueError(f"brains are numbered 0 to {len(PREFERRED) - 1}, not {seed}")
    random = torch.Generator().manual_seed(1000 + seed)
    corner = torch.randint(GRID - 1, (2,), generator=random).tolist()
    weights = torch.randn(len(REGIONS), 64, VERTICES, generator=random)
    return {"preferred": PREFERRED[seed], "corner": corner, "weights": weights}


def responses(vectors: dict[str, Tensor], weights: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Signal and response of every vertex, [N, V] each; the signal has variance 1, the response 1 / CEILING.

    Raises: ValueError.
    """
    signal = torch.cat([vectors[name] @ w for name, w in zip(REGIONS, weights, strict=True)], 1)
    spread = signal.std(0)
    if not (spread > 0).all():
        raise ValueError("a region is the same on every canvas: nothing to predict")
    signal = (signal - signal.mean(0)) / spread
    noise = torch.randn(signal.shape, generator=torch.Generator().manual_seed(seed))
    return signal, signal + (1 / the_method().CEILING - 1) ** 0.5 * noise


# --- canvases and tokens


def tile_bank(images: Tensor, seed: int, noise: float = NOISE) -> Tensor:
    """Images [M, 1, 28, 28], then EMPTY black ones, each with its own noise, cut to [0, 1]. Raises: ValueError."""
    if images.ndim != 4 or not noise >= 0:
        raise ValueError(f"images must be [M, 1, h, w] and noise at least 0, not {tuple(images.shape)} and {noise}")
    black = images.new_zeros(EMPTY, *images.shape[1:])
    tiles = torch.cat([images, black])
    drawn = torch.randn(tiles.shape, generator=torch.Generator().manual_seed(seed))
    return (tiles + noise * drawn).clamp(0, 1)


def scenes(images: Tensor, labels: Tensor, canvases: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tiles [M + EMPTY, 1, 28, 28], canvases [N, 36] of their numbers, and kinds [N, 36], a class or -1 for noise.

    8 to 12 objects a canvas, at random places. Raises: ValueError.
    """
    if len(images) != len(labels) or not len(labels) or canvases < 1:
        many = f"{len(images)} images, {len(labels)} labels and {canvases} canvases"
        raise ValueError(f"a label an image, and at least one canvas, not {many}")
    random = torch.Generator().manual_seed(seed + 100)
    shape = (canvases, GRID * GRID)
    rank = torch.rand(shape, generator=random).argsort(1).argsort(1)
    many = torch.randint(8, 13, (canvases, 1), generator=random)
    objects = torch.randint(len(images), shape, generator=random)
    empty = len(images) + torch.randint(EMPTY, shape, generator=random)
    cells = torch.where(rank < many, objects, empty)
    kinds = torch.cat([labels, labels.new_full((EMPTY,), -1)])[cells]
    return tile_bank(images, seed), cells, kinds


@torch.no_grad()
def features(model: nn.Module, tiles: Tensor, layer: str = "gap") -> Tensor:
    """What a layer makes of each tile, [M, C], in double precision."""
    from nbkit import hooks

    found = []
    for part in tiles.split(500):
        with hooks.record(model.eval(), [layer]) as seen:
            model(part)
        found.append(seen[layer].flatten(1).double())
    return torch.cat(found)


def cell_features(model: nn.Module, tiles: Tensor, cells: Tensor) -> Tensor:
    """[N, 36, C]: each tile is looked at once, however often it lies on a canvas."""
    used, where = cells.unique(return_inverse=True)
    return features(model, tiles[used])[where]


def principal(x: Tensor, d: int = 64) -> tuple[Tensor, Tensor]:
    """Mean [C] and d principal axes [C, d] of the rows of x, scaled so that a row's projection has a mean squared
    length of d. Signs: the largest entry of an axis is positive. Raises: ValueError."""
    if x.ndim != 2 or not len(x) > d <= x.shape[1] or not x.isfinite().all():
        raise ValueError(f"x must be finite, with more than {d} rows and at least {d} columns: {tuple(x.shape)}")
    centred = x - x.mean(0)
    axes = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)[:, :d]
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    size = (centred @ axes).square().sum(1).mean().sqrt()
    return x.mean(0), axes * d**0.5 / size


@functools.cache
def stimuli() -> dict[str, dict[str, Tensor]]:
    """Tokens, kinds and class probabilities of every split."""
    from nbkit import datasets, models

    data = datasets.load("fashion-mnist")
    half = torch.arange(len(data.x_test)) % 2 == 0
    model = models.load("small-cnn", seed=0)
    found = {}
    images = {
        "train": (data.x_train, data.y_train),
        "val": (data.x_test[half], data.y_test[half]),
        "test": (data.x_test[~half], data.y_test[~half]),
    }
    for seed, (split, (x, y)) in enumerate(images.items()):
        tiles, cells, kinds = scenes(x, y, SPLITS[split], seed)
        bank = features(model, tiles)
        if split == "train":
            mean, axes = principal(bank[cells[:FITTED]].flatten(0, 1))
        with torch.no_grad():
            chances = model.head(bank.float()).softmax(1)
        found[split] = {"tokens": ((bank - mean) @ axes).float()[cells], "kinds": kinds, "chances": chances[cells]}
    return found


def excerpt() -> dict:
    """What the notebook looks at: the first training canvases and the test canvases by the trained backbone (tiles,
    cells, kinds, tokens), and ``look``, which makes tokens [N, 36, 64] of tiles and canvases."""
    from nbkit import datasets, models

    data = datasets.load("fashion-mnist")
    model = models.load("small-cnn", seed=0)
    odd = torch.arange(len(data.x_test)) % 2 == 1
    train = [*scenes(data.x_train, data.y_train, SPLITS["train"], 0)]
    train[1:] = [part[:FITTED] for part in train[1:]]
    test = scenes(data.x_test[odd], data.y_test[odd], SPLITS["test"], 2)
    raw = cell_features(model, *train[:2])
    mean, axes = principal(raw.flatten(0, 1))

    def look(tiles: Tensor, cells: Tensor) -> Tensor:
        return ((cell_features(model, tiles, cells) - mean) @ axes).float()

    found = {"look": look, "images": data.x_test[odd]}
    for split, (tiles, cells, kinds), tokens in (
        ("train", train, ((raw - mean) @ axes).float()),
        ("test", test, look(*test[:2])),
    ):
        found[split] = {"tiles": tiles, "cells": cells, "kinds": kinds, "tokens": tokens}
    return found


def redrawn(stage: dict, canvas: int, noise: float) -> tuple[Tensor, Tensor]:
    """A test canvas of the excerpt with other noise: picture [1, 168, 168] and tokens [1, 36, 64]."""
    from nbkit import datasets

    tiles = tile_bank(stage["images"], 2, noise)[stage["test"]["cells"][canvas]]
    cells = torch.arange(GRID * GRID)[None]
    return datasets.canvas(tiles, cells.view(1, GRID, GRID)).images[0], stage["look"](tiles, cells)


def simulated(seed: int, splits: dict | None = None) -> dict[str, dict]:
    """A brain's region vectors, signals and responses, by split (by default all).

    The centre of the preferred class is its mean token on the first training canvases.
    """
    splits = splits or stimuli()
    one = brain(seed)
    first = {name: splits["train"][name][:FITTED] for name in ("tokens", "kinds")}
    centre = first["tokens"][first["kinds"] == one["preferred"]].mean(0)
    found = {}
    for k, split in enumerate(SPLITS):
        if split in splits:
            given = splits[split]
            vectors = region_vectors(given["tokens"], given["kinds"], one["preferred"], one["corner"], centre)
            signal, y = responses(vectors, one["weights"], 10 * seed + k)
            found[split] = {"vectors": vectors, "signal": signal, "y": y, "centre": centre}
    return found


def scores(predicted: Tensor, given: dict[str, Tensor]) -> tuple[list[float], list[float]]:
    """Mean score of each region's vertices, against responses (over their ceiling) and against the signal."""
    method = the_method()
    noisy = method.score(predicted, given["y"])
    clean = method.score(predicted, given["signal"], ceiling=1.0)
    return tuple(s.view(len(REGIONS), -1).mean(1).tolist() for s in (noisy, clean))


def rows_of(model: str, seed: int, n: int, predicted: Tensor, test: dict[str, Tensor], chosen) -> list[dict]:
    noisy, clean = scores(predicted, test)
    chosen = chosen if isinstance(chosen, list) else [chosen] * len(REGIONS)
    return [
        {"model": model, "seed": seed, "canvases": n, "region": region, "score": s, "clean": c, "chosen": choice}
        for region, s, c, choice in zip(REGIONS, noisy, clean, chosen, strict=True)
    ]


# --- ridge


class Ridge:
    """Ridge regression of y [n, V] on the centred columns of x [n, p], at any penalty.

    Solved in the smaller of the two spaces, p x p (primal) or n x n (dual). equal: every column is
    brought to variance 1; else all columns by one factor.
    """

    def __init__(self, x: Tensor, y: Tensor, equal: bool = True):
        if x.ndim != 2 or y.ndim != 2 or not len(x) == len(y) > 1:
            raise ValueError(f"x must be [n, p] and y [n, V], n > 1, not {tuple(x.shape)} and {tuple(y.shape)}")
        if not (x.isfinite().all() and y.isfinite().all()):
            raise ValueError("x or y holds NaN or infinite values")
        x = x.double()
        self.mean = x.mean(0)
        size = x.std(0)
        self.size = size.clamp(min=1e-9) if equal else size.square().mean().sqrt()
        if not self.size.min() > 0:
            raise ValueError("no column of x varies")
        self.level = y.double().mean(0)
        x = (x - self.mean) / self.size
        y = y.double() - self.level
        self.dual = len(x) < x.shape[1]
        gram = x @ x.T if self.dual else x.T @ x
        self.values, self.vectors = torch.linalg.eigh(gram)
        self.inner = self.vectors.T @ (y if self.dual else x.T @ y)
        self.x = x

    def basis(self, x: Tensor) -> Tensor:
        """Rows x in the coordinates that predict() needs: once for all penalties."""
        x = (x.double() - self.mean) / self.size
        return (x @ self.x.T if self.dual else x) @ self.vectors

    def predict(self, basis: Tensor, alpha: float) -> Tensor:
        if not alpha > 0:
            raise ValueError(f"alpha must be above 0, not {alpha}")
        return basis @ (self.inner / (self.values.clamp(min=0) + alpha)[:, None]) + self.level


def pooled(tokens: Tensor, how: str) -> Tensor:
    """One row a canvas, [N, p], of tokens [N, L, d]."""
    ways = {
        "flat": lambda: tokens.flatten(1),
        "mean": lambda: tokens.mean(1),
        "max": lambda: torch.cat([tokens.amax(1), tokens.amin(1)], 1),
        "second order": lambda: second_order(tokens),
    }
    if how not in ways:
        raise ValueError(f"how must be one of {', '.join(ways)}, not {how!r}")
    return ways[how]()


def second_order(tokens: Tensor) -> Tensor:
    """Means over the tokens of every channel and of every product of two, [N, d + d (d + 1) / 2]."""
    d = tokens.shape[2]
    products = tokens.mT @ tokens / tokens.shape[1]
    upper = torch.triu_indices(d, d)
    return torch.cat([tokens.mean(1), products[:, upper[0], upper[1]]], 1)



def gated(given: dict[str, Tensor]) -> Tensor:
    """Tokens averaged by what the backbone's own head thinks they are, one mean a class: [N, 10 + 640]."""
    cells = given["tokens"].shape[1]
    means = torch.einsum("nlc,nld->ncd", given["chances"], given["tokens"]) / cells
    return torch.cat([given["chances"].mean(1), means.flatten(1)], 1)


def ridge_rows(how: str, n: int, seeds: int) -> list[dict]:
    """Ridge of every brain on one kind of columns; penalty and scaling chosen a region on validation."""
    method = the_method()
    splits = stimuli()
    brains = [simulated(seed) for seed in range(seeds)]
    y = {split: torch.cat([b[split]["y"] for b in brains], 1) for split in SPLITS}
    best = [(-9.0, None, None)] * (seeds * len(REGIONS))
    x = {s: gated(one) if how == "class-gated" else pooled(one["tokens"], how) for s, one in splits.items()}
    for equal in (False, True):
        fit = Ridge(x["train"][:n], y["train"][:n], equal)
        val, test = fit.basis(x["val"]), fit.basis(x["test"])
        for alpha in ALPHAS:
            found = method.score(fit.predict(val, alpha).float(), y["val"]).view(-1, VERTICES).mean(1)
            for k in (k for k, value in enumerate(found.tolist()) if value > best[k][0]):
                columns = slice(k * VERTICES, (k + 1) * VERTICES)
                chosen = f"{alpha:.3g}{' equal' if equal else ''}"
                best[k] = (found[k].item(), chosen, fit.predict(test, alpha)[:, columns].float())
    rows = []
    for seed, one in enumerate(brains):
        mine = best[seed * len(REGIONS) : (seed + 1) * len(REGIONS)]
        predicted = torch.cat([p for _, _, p in mine], 1)
        rows += rows_of(f"ridge, {how}", seed, n, predicted, one["test"], [c for _, c, _ in mine])
    return rows


def live(stage: dict, task: dict, region: str, how: str, equal: bool) -> float:
    """Ridge of brain 0 from the excerpt's training canvases to its test canvases, without noise in the responses: the
    mean score at the best of five penalties.

    region: one of REGIONS, or "category as it is", which keeps the mean token of its class.
    """
    weights = brain(0)["weights"][REGIONS.index(region.split()[0])]
    y = {}
    for split in ("train", "test"):
        vectors = task[split]["vectors"]
        as_it_is = vectors["category"] + vectors["presence"] * task[split]["centre"]
        y[split] = (as_it_is if region == "category as it is" else vectors[region]) @ weights
    fit = Ridge(pooled(stage["train"]["tokens"], how), y["train"], equal)
    basis = fit.basis(pooled(stage["test"]["tokens"], how))
    tried = (fit.predict(basis, 10.0**k).float() for k in range(5))
    return max(the_method().score(p, y["test"], ceiling=1).mean().item() for p in tried)


def told_rows(n: int, seeds: int) -> list[dict]:
    """Ridge on the vector a region really takes: what is left to learn where the routing is known."""
    method = the_method()
    rows = []
    for seed in range(seeds):
        one = simulated(seed)
        parts = []
        for k, region in enumerate(REGIONS):
            columns = slice(k * VERTICES, (k + 1) * VERTICES)
            x = {split: one[split]["vectors"][region] for split in SPLITS}
            fit = Ridge(x["train"][:n], one["train"]["y"][:n, columns], False)
            val, test = fit.basis(x["val"]), fit.basis(x["test"])
            alpha = max(
                ALPHAS,
                key=lambda a: method.score(fit.predict(val, a).float(), one["val"]["y"][:, columns]).mean().item(),
            )
            parts.append((f"{alpha:.3g}", fit.predict(test, alpha).float()))
        predicted = torch.cat([p for _, p in parts], 1)
        rows += rows_of("told the routing", seed, n, predicted, one["test"], [c for c, _ in parts])
    return rows


# --- what is trained by gradients


class Factorised(nn.Module):
    """y_v = sum_l s_v(l) (f_v . F_l) + b_v: a fixed map times fixed features; tokens as they are.

    owner: the region of each vertex; a region's vertices share a map, a softmax over cells, as in the authors' code.
    """

    def __init__(self, owner: Tensor, d: int = 64, cells: int = GRID * GRID):
        super().__init__()
        self.register_buffer("owner", owner)
        self.map = nn.Parameter(torch.randn(int(owner.max()) + 1, cells))
        self.feature = nn.Linear(d, len(owner))

    def maps(self) -> Tensor:
        return self.map.softmax(1)

    def forward(self, tokens):
        pooled = torch.einsum("nld,rl->nrd", tokens, self.maps())  # [N, R, d]
        return (pooled[:, self.owner] * self.feature.weight).sum(-1) + self.feature.bias


def alike(maps: Tensor) -> float:
    """Mean correlation of the maps [N, L] of two canvases, over all pairs."""
    z = maps.double() - maps.double().mean(1, keepdim=True)
    z = z / z.norm(dim=1, keepdim=True).clamp(min=1e-12)
    n = len(z)
    return ((z.sum(0).square().sum() - z.square().sum()) / (n * (n - 1))).item()


@torch.no_grad()
def map_facts(net, tokens, kinds, preferred, corner) -> list[dict]:
    """A row a region: where attention and value norms lie, and how far the two agree."""
    method = the_method()
    a = method.attention(net.eval(), tokens).mean(1)
    sent = method.value_norms(net, tokens)
    holds = (kinds == preferred).any(1)
    random = torch.Generator().manual_seed(0)
    mixed = (sent / a).gather(2, torch.rand(a.shape, generator=random).argsort(2)) * a
    rows = []
    for r, region in enumerate(REGIONS):
        by_content = region in ("category", "mix", "presence")
        rest = holds if by_content else torch.ones_like(holds)
        target = (kinds == preferred if by_content else near(corner).expand_as(kinds))[rest]
        among = ((kinds >= 0) if by_content else torch.ones_like(kinds).bool())[rest]
        one = a[rest, r]
        two = sent[rest, r] / sent[rest, r].sum(1, keepdim=True)
        rows.append(
            {
                "region": region,
                "even": (target.sum(1) / among.sum(1)).mean().item(),
                "attention": (one * target).sum(1).mean().item(),
                "value norms": (two * target).sum(1).mean().item(),
                "same top": (one.argmax(1) == two.argmax(1)).float().mean().item(),
                "same top, shuffled": (one.argmax(1) == mixed[rest, r].argmax(1)).float().mean().item(),
                "alike": alike(a[:, r]),
                "alike, norms": alike(sent[:, r]),
            }
        )
    return rows


def made(model: str, seed: int, n: int, rate: float, factor: float = 1) -> tuple[nn.Module, float, Tensor]:
    """An encoder of one brain, its best validation score and its predictions on the test canvases.

    factor: of the positions that are added to the keys.
    """
    method = the_method()
    splits = stimuli()
    one = simulated(seed)
    torch.manual_seed(seed)
    forward = method.predict
    if model.startswith("factorised"):
        net, forward = Factorised(owner()), Factorised.forward
    else:
        net = method.Encoder(owner() * (model != "one shared query"))
        net.positions *= factor
    data = (splits["train"]["tokens"][:n], one["train"]["y"][:n], splits["val"]["tokens"], one["val"]["y"])
    longer = {"steps": 3000, "wait": 12} if model in LONG.values() else {}
    history = method.train(net, forward, data, rate, seed=seed, **longer)
    with torch.no_grad():
        predicted = forward(net.eval(), splits["test"]["tokens"])
    return net, max(row[2] for row in history), predicted


def trained(model: str, seed: int, n: int, rate: float, factor: float = 1) -> dict:
    """Rows of results.csv and maps.csv of one encoder, and its weights where they are shipped."""
    method = the_method()
    net, _, predicted = made(model, seed, n, rate, factor)
    shipped = (model, seed, n) == ("attention", 0, SIZES[-1])
    test = stimuli()["test"]
    if shipped:
        round_to_half(net)
        with torch.no_grad():
            predicted = method.predict(net, test["tokens"])
    found = {"rows": rows_of(model, seed, n, predicted, simulated(seed)["test"], f"{rate:.3g}"), "maps": []}
    one = brain(seed)
    where = {"model": model, "seed": seed, "canvases": n}
    if model.startswith("attention") and n in MAPPED:
        rows = map_facts(net, test["tokens"], test["kinds"], one["preferred"], one["corner"])
        found["maps"] = [{**where, **row} for row in rows]
    elif model.startswith("factorised"):
        on = net.maps().detach()[0, near(one["corner"])].sum().item()
        found["maps"] = [{**where, "region": "place", "even": 4 / 36, "attention": on}]
    if shipped:
        found["weights"] = {name: w.detach().tolist() for name, w in net.named_parameters()}
    return found


def build(out: Path, work: Path, seeds: int) -> list[Path]:
    from nbkit import runtime

    runtime.deterministic(seed=0)
    kept = Work(work)
    rows, maps, rates, weights, tried = [], [], [], {}, {}
    for n in SIZES:
        for how in ("flat", "mean", "max", "second order", "class-gated"):
            rows += kept.once(f"ridge-{how}-{n}", functools.partial(ridge_rows, how, n, seeds))
        rows += kept.once(f"told-{n}", functools.partial(told_rows, n, seeds))
    for model, grid in RATES.items():

        def validated(rate: float, model: str = model) -> float:
            return kept.once(f"rate-{model}-{rate:.3g}", lambda: made(model, TUNING, TUNED_AT, rate)[1])

        if grid:
            tried[model] = widened(validated, grid, factor=3, best=max)
            rates += [{"model": model, "rate": rate, "score": score} for rate, score in tried[model].items()]
        among = tried.get(model, tried["attention"])
        rate = max(among, key=among.get)
        factor = 1
        if model == LOUD:

            def louder(factor: float, rate: float = rate) -> float:
                return kept.once(f"factor-{factor:g}", lambda: made(LOUD, TUNING, TUNED_AT, rate, factor)[1])

            factors = widened(louder, FACTORS, best=max)
            factor = max(factors, key=factors.get)
            rates += [{"model": "positions times", "rate": f, "score": score} for f, score in factors.items()]
        runs = [(model, n, seed) for n in sorted(MADE_AT.get(model, SIZES), reverse=True) for seed in range(seeds)]
        if model in LONG:
            runs += [(LONG[model], SIZES[-1], seed) for seed in LONG_BRAINS if seed < seeds]
        for name, n, seed in runs:
            found = kept.once(f"{name}-{n}-{seed}", functools.partial(trained, name, seed, n, rate, factor))
            rows += found["rows"]
            maps += found["maps"]
            weights |= found.get("weights", {})
    results = pd.DataFrame(rows).sort_values(["model", "canvases", "seed"], kind="stable")
    write_table(out / "results.csv.gz", results.round(4))
    maps = pd.DataFrame(maps).sort_values(["model", "canvases", "seed"], kind="stable")
    write_table(out / "maps.csv", maps.round(4))
    write_table(out / "rates.csv", pd.DataFrame(rates).round(5))
    write_tensors(out / "network.safetensors", {name: torch.tensor(w).half() for name, w in weights.items()})
    return [out / name for name in ("results.csv.gz", "maps.csv", "rates.csv", "network.safetensors")]


if __name__ == "__main__":
    run(build, __doc__, work=work_option("brain-encoders"), seeds=seeds_option(5, "brains"))
