"""All tables of this folder: what notebooks/07-lean-transformers/10-vflowopt measures beforehand.

DINOv2 ViT-S/14 at 112 pixels: for three budgets, searches of 30 evaluations on 30 unlabelled crops of 11 photographs,
by Bayesian optimisation and by chance, every seed with its own crops; each strategy found, its ablations and its
rivals, all with the same number of tokens, on two crops each of 20 other photographs: the cosine of the pruned and the
whole class token. Three tiny-vit: the same with 30 training images of Fashion-MNIST for the search, and the accuracy
on 1,000 test images. About 6 minutes on one core; a run that was stopped goes on where it was (delete the folder
--work for a fresh start). The functions are the notebook's method cells.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections import namedtuple
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor, nn

from nbkit.recipes import Work, run, work_option, write_table, write_tensors

SEEDS = {0.5: 3, 0.25: 5, 0.1: 5}  # searches in DINOv2, by budget
GARMENT_BUDGETS = (0.25, 0.1)
NETWORKS = 3
GARMENT_SEEDS = 5  # searches in each tiny-vit; the first is the one whose arms are measured
CALLS, INITIAL = 30, 12
TESTED = 1000
GROUP = 50  # test images whose mean cosine is stored
CROPS = 2
TOWER = 3  # blocks
# arm -> what ranks the patches, whose schedule, whether the searched cells recycle
ARMS = {
    "full": ("I", "searched", True),
    "no recycling": ("I", "searched", False),
    "one stage": ("I", "flat", True),
    "one stage, no recycling": ("I", "flat", False),
    "t = 0": ("t = 0", "searched", True),
    "alpha = 0": ("alpha = 0", "searched", True),
    "mean attention, searched": ("mean", "searched", True),
    "mean attention, schedule": ("mean", "searched", False),
    "mean attention": ("mean", "flat", False),
    "CLS attention, searched": ("CLS", "searched", True),
    "CLS attention, schedule": ("CLS", "searched", False),
    "CLS attention": ("CLS", "flat", False),
    "entropy, searched": ("entropy", "searched", True),
    "entropy": ("entropy", "flat", False),
    "contrast, searched": ("contrast", "searched", True),
    "contrast": ("contrast", "flat", False),
    "least attention": ("least", "flat", False),
    "random 0, schedule": ("random", "searched", False),
    "random 1, schedule": ("random", "searched", False),
    "random 2, schedule": ("random", "searched", False),
    "random, searched": ("random", "searched", True),
    "random 0": ("random", "flat", False),
    "random 1": ("random", "flat", False),
    "random 2": ("random", "flat", False),
}
OTHERS = ("pool", "random strategy", "random search")
FIXED = ("mean attention", "CLS attention", "entropy", "contrast", "least attention", "pool")  # the same for every seed


@cache
def the_method():
    from nbkit import papers

    return papers.method("vflowopt")


Seen = namedtuple("Seen", "hidden attention entropy from_class whole")
DINO = {"block": "encoder.layer.{}", "attention": "encoder.layer.{}.attention", "norm": "layernorm"}
VIT = {what: name.replace("encoder.layer", "layers") for what, name in DINO.items()}
TINY = {"block": "blocks.{}", "attention": "blocks.{}.attn.weights", "norm": "norm"}


def look(model: nn.Module, x: Tensor, pictures: Tensor, names: Mapping[str, str], tower: int = TOWER) -> Seen:
    """One pass of inputs x, whose bytes are ``pictures``: the states that leave the first ``tower`` blocks, the last
    one's attention between patches and from the class token, the patches' entropy, the class token's last output."""
    from nbkit import attribution, hooks

    last, attend = (names[what].format(tower - 1) for what in ("block", "attention"))
    with hooks.record(model, [last, names["norm"]], concat=False) as acts:
        (A,) = attribution.attention_probabilities(model, x, layers=[attend])
    A = A.mean(1)  # [n, 1 + N, 1 + N]
    among = A[:, 1:, 1:] / A[:, 1:, 1:].sum(-1, keepdim=True)
    entropy = the_method().patch_entropy(pictures, pictures.shape[-1] // math.isqrt(among.shape[-1]))
    return Seen(acts[last], among, entropy, A[:, 0, 1:], acts[names["norm"]][:, 0])


def views(name: str, size: int = 224) -> tuple[Tensor, Tensor]:
    """DINOv2's inputs for the photographs of a data set, and the same as bytes, [n, 3, size, size]."""
    from nbkit import models

    transform, pictures = models.transform("dinov2-small", size=size), photographs(name)
    seen = torch.from_numpy(np.stack([np.array(transform.crop(picture)) for picture in pictures]))
    return transform(pictures), seen.permute(0, 3, 1, 2)


def crops(pictures: Sequence, n: int, seed: int, side: int = 112) -> Tensor:
    """n square crops, a picture after the other, half to all of its shorter side, as bytes [n, 3, side, side]."""
    from PIL import Image

    rng, found = np.random.default_rng(seed), []
    for i in range(n):
        picture = Image.fromarray(np.asarray(pictures[i % len(pictures)])).convert("RGB")
        size = int(min(picture.size) * rng.uniform(0.5, 1))
        left, top = (int(rng.integers(extent - size + 1)) for extent in picture.size)
        cut = picture.crop((left, top, left + size, top + size))
        found.append(np.array(cut.resize((side, side), Image.Resampling.BICUBIC)))
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2)


@cache
def dino():
    from nbkit import models

    return models.load("dinov2-small", attn_implementation="eager").eval()


def seen_by_dino(pictures: Tensor):
    """What `look` says of bytes [n, 3, 112, 112]."""
    from nbkit import models

    x = models.transform("dinov2-small", size=pictures.shape[-1], resize=pictures.shape[-1])(pictures)
    return look(dino(), x, pictures, DINO)


def photographs(name: str) -> list:
    from nbkit import datasets

    return list(datasets.load(name).images.values())


def bytes_of(x: Tensor) -> Tensor:
    return (255 * x).round().to(torch.uint8)


# rivals


def contrast(pictures: Tensor, patch: int) -> Tensor:
    """Standard deviation of the grey level in every patch, [n, N]; of one channel (clothing) the mean: ink."""
    cut = pictures.double().mean(1).unfold(1, patch, patch).unfold(2, patch, patch)
    worth = cut.std((-2, -1)) if pictures.shape[1] == 3 else cut.mean((-2, -1))
    return worth.flatten(1).float()


def ranking(which: str, seen, strategy, extra: Tensor, generator: torch.Generator) -> Tensor:
    """Scores of the patches, [n, N]."""
    method = the_method()
    made = partial(method.importance, seen.attention, seen.entropy)
    if which == "random":
        return torch.rand(seen.entropy.shape, generator=generator)
    return {
        "I": lambda: made(strategy.t, strategy.alpha),
        "t = 0": lambda: made(0, strategy.alpha),
        "alpha = 0": lambda: made(strategy.t, 0),
        "mean": lambda: made(0, 0),
        "least": lambda: -made(0, 0),
        "CLS": lambda: seen.from_class,
        "entropy": lambda: seen.entropy,
        "contrast": lambda: extra,
    }[which]()


def pooled(tail, hidden: Tensor, counts: Sequence[int]) -> Tensor:
    """The class token's output where the patches are averaged in rectangles, as many as fit in every stage's tokens."""
    n, tokens, width = hidden.shape
    side, most = math.isqrt(tokens - 1), min(counts)
    shapes = [(r, c) for r in range(1, side + 1) for c in range(r, min(2 * r, side) + 1) if r * c <= most]
    grid = hidden[:, 1:].transpose(1, 2).view(n, width, side, side)
    means = F.adaptive_avg_pool2d(grid, max(shapes, key=lambda s: s[0] * s[1])).flatten(2).transpose(1, 2)
    with torch.no_grad():
        return tail(torch.cat([hidden[:, :1], means], 1))[:, 0]


def output_of(arm: str, tail, seen, strategy, budget: float, extra: Tensor, generator, others: dict) -> Tensor:
    """The class token's output, [n, D], of one arm; ``others``: strategies of the arms that have their own."""
    method = the_method()
    N = seen.entropy.shape[1]
    counts = flat(N, budget)
    if arm == "pool":
        return pooled(tail, seen.hidden, counts)
    strategy = others.get(arm, strategy)
    which, schedule, cells = ARMS.get(arm, ARMS["full"])
    if schedule == "searched":
        counts = method.stages(N, budget, strategy.R1, strategy.R2)
    side = math.isqrt(N)
    a = max(strategy.a, side / math.isqrt(counts[0])) if cells else None  # no more cells than tokens
    return method.prune(tail, seen.hidden, ranking(which, seen, strategy, extra, generator), counts, a)[0]


# searches


def t_max(attention: Tensor) -> float:
    """The t from which on K would be empty in every image."""
    received = attention.sum(1)
    return (received.amax(-1) / received.mean(-1)).max().item()


def box(Rbar: float, side: int, t_most: float) -> np.ndarray:
    """Smallest and largest value of each of the five, [2, 5]: the public code's for a budget of 0.25 and 27 x 27
    tokens, with the budget and the side of the grid; t ends where no token would vote."""
    least = [Rbar, 0.2 / 0.375, 0, -1, max(1, side / 9)]
    return np.array([least, [min(1, 1.5 * Rbar), 1, t_most, 1, 8 * side / 9]])


def flat(tokens: int, Rbar: float) -> tuple[int, ...]:
    """One stage: as many patches in all three, but for what does not divide by three."""
    return tuple((round(3 * tokens * Rbar) + 2 - stage) // 3 for stage in range(3))


def draw(rng, n: int, limits: np.ndarray, Rbar: float, side: int) -> np.ndarray:
    """n random strategies, [n, 5], that meet the budget and have no more cells than tokens kept."""
    found = np.empty((0, 5))
    while len(found) < n:
        s = rng.uniform(*limits, (4 * n, 5))
        first = (side * side * s[:, 0]).round()
        second = (first * s[:, 1]).round()
        rest = round(3 * side * side * Rbar) - first - second
        few = (np.floor((side - 1) / s[:, 4]) + 1) ** 2 <= first
        found = np.vstack([found, s[(1 <= rest) & (rest <= second) & few]])
    return found[:n]


def searched(tail, seen, budget: float, seed: int, chance: bool = True) -> list[dict]:
    """A row an evaluation: of the Bayesian search, and of the random one, which shares its first twelve."""
    method, rows = the_method(), []
    side = math.isqrt(seen.entropy.shape[1])
    limits = box(budget, side, t_max(seen.attention))
    f = partial(method.similarity, tail, seen, Rbar=budget)
    drawn = draw(np.random.default_rng(seed), CALLS, limits, budget, side)
    y = [f(method.Strategy(*s)) for s in drawn[:INITIAL]]
    rng = np.random.default_rng(1000 + seed)
    propose = partial(draw, rng, 2000, limits, budget, side)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a length scale at its bound: hardly a slope
        tried, found = method.bayesian(f, drawn[:INITIAL], y, propose, limits, CALLS)
    arms = {"Bayesian": (tried, found)}
    if chance:
        arms["random"] = (drawn, [*y, *(f(method.Strategy(*s)) for s in drawn[INITIAL:])])
    for name, (strategies, values) in arms.items():
        for call, (s, value) in enumerate(zip(strategies, values, strict=True), 1):
            if name == "Bayesian" or call > INITIAL:
                row = {"search": name if call > INITIAL else "both", "call": call, "f": round(value, 5)}
                rows.append(row | {k: round(float(v), 5) for k, v in zip(method.Strategy._fields, s, strict=True)})
    return rows


def best(rows: list[dict], name: str):
    own = [row for row in rows if row["search"] in ("both", name)]
    row = max(own, key=lambda row: row["f"])
    method = the_method()
    return method.Strategy(*(row[k] for k in method.Strategy._fields))


def strategies(rows: list[dict]) -> tuple:
    """The strategy found, and those of the arms that have their own."""
    method = the_method()
    first = method.Strategy(*(rows[0][k] for k in method.Strategy._fields))
    others = {"random strategy": first}
    if any(row["search"] == "random" for row in rows):
        others["random search"] = best(rows, "random")
    return best(rows, "Bayesian"), others


# DINOv2


def dino_search(budget: float, seed: int) -> list[dict]:
    seen = seen_by_dino(crops(photographs("photos"), 30, seed))
    tail = nn.Sequential(*dino().encoder.layer[TOWER:], dino().layernorm)
    return searched(tail, seen, budget, seed, chance=budget < 0.5)


@cache
def evaluation():
    pictures = crops(photographs("imagenet-sample"), 20 * CROPS, 12345)
    return pictures, seen_by_dino(pictures)


def dino_arms(budget: float, seed: int, rows: list[dict]) -> list[dict]:
    """A row an arm: the cosine of every photograph, mean of its crops."""
    found = []
    pictures, seen = evaluation()
    tail = nn.Sequential(*dino().encoder.layer[TOWER:], dino().layernorm)
    strategy, others = strategies(rows)
    generator = torch.Generator().manual_seed(100 * seed + round(100 * budget))
    for arm in (*ARMS, *OTHERS):
        if (arm in FIXED and seed) or (arm == "random search" and arm not in others):
            continue
        output = output_of(arm, tail, seen, strategy, budget, contrast(pictures, 14), generator, others)
        cosine = F.cosine_similarity(output, seen.whole).view(CROPS, 20).mean(0)
        row = {"budget": budget, "seed": seed, "arm": arm}
        found.append(row | {f"photo {i}": round(c, 4) for i, c in enumerate(cosine.tolist())})
    return found


# tiny-vit


def seen_by_vit(network: int, x: Tensor):
    from nbkit import models

    model = models.load("tiny-vit", seed=network).eval()
    seen = look(model, x, bytes_of(x), TINY)
    return nn.Sequential(*model.blocks[TOWER:], model.norm), seen, model.head


def garment_search(budget: float, network: int, seed: int) -> list[dict]:
    from nbkit import datasets

    x = datasets.load("fashion-mnist").x_train
    own = 10 * network + seed
    drawn = torch.randperm(len(x), generator=torch.Generator().manual_seed(own))[:30]
    tail, seen, _ = seen_by_vit(network, x[drawn])
    return searched(tail, seen, budget, own)


def garment_arms(budget: float, network: int, rows: list[dict]) -> list[dict]:
    """A row an arm: accuracy, the cosine of groups of 50 images, and the right images as a text of 0 and 1."""
    from nbkit import datasets

    data = datasets.load("fashion-mnist")
    x, y = data.x_test[:TESTED], data.y_test[:TESTED]
    tail, seen, head = seen_by_vit(network, x)
    strategy, others = strategies(rows)
    generator = torch.Generator().manual_seed(100 * network + round(100 * budget))
    found, ink = [], contrast(bytes_of(x), 4)
    for arm in ("whole", *ARMS, *OTHERS):
        output = seen.whole
        if arm != "whole":
            output = output_of(arm, tail, seen, strategy, budget, ink, generator, others)
        with torch.no_grad():
            hits = head(output).argmax(1) == y
        row = {"budget": budget, "network": network, "arm": arm, "accuracy": round(hits.double().mean().item(), 4)}
        cosine = F.cosine_similarity(output, seen.whole).view(-1, GROUP).mean(1)
        row |= {f"group {i}": round(c, 5) for i, c in enumerate(cosine.tolist())}
        found.append(row | {"right": "".join(map(str, hits.int().tolist()))})
    return found


# what the tables say


def cosines() -> pd.DataFrame:
    """Stored cosines [model, budget, run, unit], a column an arm; a unit is a photograph or a group of test images."""
    from nbkit import papers

    found = {}
    for model, name, run_ in (("DINOv2", "photos", "seed"), ("tiny-vit", "garments", "network")):
        table = papers.results("vflowopt", name).rename(columns={run_: "run"})
        cut = table.set_index(["budget", "run", "arm"]).filter(regex="photo|group")
        wide = cut.rename_axis(columns="unit").stack().unstack("arm")
        wide = wide.fillna(wide.groupby(["budget", "unit"]).transform("first"))  # the same in every run
        for arm in ("random", "random, schedule"):
            draws = [arm.replace("random", f"random {k}") for k in range(3)]
            wide[arm] = wide[draws].mean(axis=1)
            wide = wide.drop(columns=draws)
        found[model] = wide
    return pd.concat(found, names=["model"]).drop(columns="whole")


def search_leads() -> pd.DataFrame:
    """Best f so far, Bayesian minus random, [model, budget, network, seed], a column an evaluation."""
    from nbkit import papers

    table = papers.results("vflowopt", "searches")
    runs = ["model", "budget", "network", "seed"]
    both = [table[table["search"].isin(["both", name])] for name in ("Bayesian", "random")]
    best = [part.set_index([*runs, "call"])["f"].sort_index().groupby(runs).cummax() for part in both]
    return (best[0] - best[1]).unstack("call").dropna()


def accuracies() -> pd.DataFrame:
    """Stored accuracies of tiny-vit, [arm, network], a column a budget."""
    from nbkit import papers

    table = papers.results("vflowopt", "garments")
    return table.pivot(index=["arm", "network"], columns="budget", values="accuracy")


def lead(table: pd.DataFrame, case: tuple[str, float], rival: str, mine: str = "full") -> tuple[pd.Series, bool]:
    """By how much ``mine`` is ahead in each run, and whether it is in every run, and over the units by two standard
    errors."""
    gap = (table[mine] - table[rival]).loc[case]
    runs, units = gap.groupby("run").mean(), gap.groupby("unit").mean()
    return runs, bool((runs > 0).all() and units.mean() >= 2 * units.sem() > 0)


def clipped(tokens: int, Rbar: float, R1: float, R2: float) -> tuple[int, int, int]:
    """Patches in the stages; where R3 would leave [0, 1] it is the nearest, and the budget is missed."""
    first = round(tokens * R1)
    second = max(1, round(first * R2))
    return first, second, max(1, min(second, round(3 * tokens * Rbar) - first - second))


def build(out: Path, work: Path) -> list[Path]:
    from nbkit import runtime

    runtime.deterministic(seed=0)
    kept, traces, photos, garments = Work(work), [], [], []
    for budget, seeds in SEEDS.items():
        for seed in range(seeds):
            rows = kept.once(f"dino-search-{budget}-{seed}", partial(dino_search, budget, seed))
            traces += [{"model": "DINOv2", "budget": budget, "network": 0, "seed": seed} | row for row in rows]
            photos += kept.once(f"dino-arms-{budget}-{seed}", partial(dino_arms, budget, seed, rows))
    for budget, network, seed in itertools.product(GARMENT_BUDGETS, range(NETWORKS), range(GARMENT_SEEDS)):
        rows = kept.once(f"vit-search-{budget}-{network}-{seed}", partial(garment_search, budget, network, seed))
        traces += [{"model": "tiny-vit", "budget": budget, "network": network, "seed": seed} | row for row in rows]
        if not seed:
            garments += kept.once(f"vit-arms-{budget}-{network}", partial(garment_arms, budget, network, rows))
    table = pd.DataFrame(garments)
    bits = np.array([[int(c) for c in text] for text in table.pop("right")], dtype=np.uint8)
    write_table(out / "searches.csv", pd.DataFrame(traces))
    write_table(out / "photos.csv", pd.DataFrame(photos))
    write_table(out / "garments.csv", table)
    write_tensors(out / "right.safetensors", {"right": torch.from_numpy(np.packbits(bits, axis=1))})
    return [out / name for name in ("searches.csv", "photos.csv", "garments.csv", "right.safetensors")]


if __name__ == "__main__":
    run(build, __doc__, work=work_option("vflowopt"))
