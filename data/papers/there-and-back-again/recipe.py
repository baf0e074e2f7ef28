"""Everything notebooks/01-saliency/02-there-and-back-again measures: hits by depth, class sensitivity, meta-saliency.

EfficientNet-Lite0 on the 20 photographs of imagenet-sample; pictures of 2 x 2 tiles of 160 pixels hold one of the 18
photographs that the network names rightly among three others: woven textile (weave), other photographs cut into 64
pieces and shuffled (jigsaw), or three more of the 18 (mosaic; the class of every tile is asked for). Three seeds.

- hits.csv.gz: is a map's maximum in the tile of the class asked for, and the share of its mass there; every method,
  level, seed and photograph; layers together by product and by sum; edge map, centre map, norm of activations.
- sensitivity.csv.gz: correlation of the maps for the most and the least likely class of the 20 photographs.
- coherence.csv: mean cosine of a layer's gradients with their mean, a photograph and layer.
- meta.csv.gz: that correlation after a step of the weights: towards the class asked for, towards another, at random.
- meta_hits.csv.gz: hits on the mosaics after such steps.
- cases.csv: every case of every claim, judged by the rules that were set before (share of mass: added afterwards).

    python data/papers/there-and-back-again/recipe.py

The functions are the notebook's own method cells. One thread; about eight minutes of processor time. A run that was
stopped goes on where it was (delete the folder --work for a fresh start).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F

from nbkit import attribution, datasets, faithfulness, models, papers, recipes
from nbkit.recipes import Work, run, seeds_option, work_option, write_table

SLUG, SIDE = "there-and-back-again", 160
RATES, PUBLIC = (0.001, 0.0025, 0.01), 0.0025  # of a step; mosaics get the one of the public example
LATE = ("block 11", "block 15", "block 16", "head")  # layers looked at after a step
STEPPED = ("NormGrad", "selective NormGrad", "linear approximation", "Grad-CAM")
RIVALS = ("NormGrad", "selective NormGrad", "linear approximation", "gradient", "guided backprop")
PACKED = ("hits", "sensitivity", "meta", "meta_hits")
COLUMNS = {
    "hits": ["scene", "seed", "photo", "method", "level", "hit", "energy"],
    "sensitivity": ["photo", "method", "level", "pearson", "spearman"],
    "coherence": ["photo", "level", "cosine"],
    "meta": ["photo", "step", "lr", "method", "level", "pearson", "spearman"],
    "meta_hits": ["seed", "photo", "step", "lr", "method", "level", "hit"],
}


CLUTTER = ("weave", "jigsaw")


@contextmanager
def guided(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, every ReLU module hands back positive gradients only (guided backprop). Raises: TypeError (no ReLU)."""
    relus = [m for m in model.modules() if isinstance(m, nn.ReLU | nn.ReLU6) and not m.inplace]
    if not relus:
        raise TypeError(f"{type(model).__name__} has no ReLU module that works on a copy")
    cut = [m.register_full_backward_hook(lambda m, g, _: (g[0].relu(),)) for m in relus]
    try:
        yield model
    finally:
        for handle in cut:
            handle.remove()


def as_long_as(step: dict, other: dict) -> dict:
    """The direction ``other``, in every parameter tensor as long as the step."""
    lengths = {name: (d.norm(), other[name].norm()) for name, d in step.items()}
    return {name: other[name] * (a / b if b > 0 else 0) for name, (a, b) in lengths.items()}


def random_step(step: dict, seed: int) -> dict:
    """A direction drawn by lot, in every parameter tensor as long as the step."""
    draw = torch.Generator().manual_seed(seed)
    return as_long_as(step, {name: torch.randn(d.shape, generator=draw) for name, d in step.items()})


def coherence(g: torch.Tensor) -> torch.Tensor:
    """Mean cosine of g_u with its mean over places, [B], of gradients [B, K, h, w]."""
    return F.cosine_similarity(g, g.mean((2, 3), keepdim=True), dim=1).mean((1, 2))


def load() -> dict:
    """The network, the photographs for it [20, 3, 224, 224], the same as tiles, and which are named rightly."""
    model = models.load("efficientnet-lite0").requires_grad_(False)
    photos = datasets.load("imagenet-sample")
    x = models.transform("efficientnet-lite0")(photos)
    tiles = F.interpolate(x, size=(SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False)
    with torch.no_grad():
        logits = model(x)
    right = (logits.argmax(1) == photos.y).nonzero().flatten().tolist()
    return {"model": model, "x": x, "tiles": tiles, "y": photos.y, "logits": logits, "right": right}


def weave(rng: np.random.Generator) -> torch.Tensor:
    """Three textile surfaces as tiles [3, 3, SIDE, SIDE], in the network's units (-1 to 1)."""
    grey = datasets.load("textile").x[torch.from_numpy(rng.choice(900, 3, replace=False))]
    grey = F.interpolate(grey, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    return (2 * grey - 1).expand(-1, 3, -1, -1)


def jigsaw(tiles: torch.Tensor, rng: np.random.Generator, n: int = 8) -> torch.Tensor:
    """Tiles [T, 3, s, s] cut into n x n pieces, which are shuffled."""
    s = tiles.shape[-1] // n
    pieces = tiles.unfold(2, s, s).unfold(3, s, s).flatten(2, 3)  # [T, 3, n n, s, s]
    out = []
    for one in pieces:
        mixed = one[:, torch.from_numpy(rng.permutation(n * n))].unflatten(1, (n, n))
        out.append(mixed.permute(0, 1, 3, 2, 4).reshape(3, n * s, n * s))
    return torch.stack(out)


def scene(kit: dict, kind: str, photo: int, seed: int) -> tuple[torch.Tensor, int]:
    """A photograph among three tiles of clutter, [1, 3, 320, 320], and the tile that it is in."""
    rng = np.random.default_rng([seed, photo, CLUTTER.index(kind)])
    place = int(rng.integers(4))
    others = rng.choice([p for p in kit["right"] if p != photo], 3, replace=False)
    clutter = weave(rng) if kind == "weave" else jigsaw(kit["tiles"][others], rng)
    four = [*clutter[:place], kit["tiles"][photo], *clutter[place:]]
    return papers.method("grad-cam").grid_mosaic(torch.stack(four))[None], place


def edges(x: torch.Tensor) -> torch.Tensor:
    """Edge strength [B, H, W] of pictures [B, 3, H, W]: the length of the slope of their grey values."""
    grey = F.pad(x.mean(1, keepdim=True), (0, 1, 0, 1), mode="replicate")
    down, right = grey[..., 1:, :-1] - grey[..., :-1, :-1], grey[..., :-1, 1:] - grey[..., :-1, :-1]
    return (down.square() + right.square()).sqrt()[:, 0]


def all_maps(method, model, x: torch.Tensor, c: torch.Tensor, *, together: bool = True) -> dict:
    """Every method's map at every level for classes c [B] of pictures x [B, 3, H, W]: {(method, level): [B, h, w]}."""
    levels, size = {"input": ""} | method.LAYERS, tuple(x.shape[-2:])
    found = method.grads_at(model, x, c, levels.values())
    with guided(model):
        positive = method.grads_at(model, x, c, levels.values())
    out = {}
    for level, layer in levels.items():
        for rule, make in method.RULES.items() if layer else [("gradient", method.RULES["gradient"])]:
            out[rule, level] = make(*found[layer])
        out["guided backprop", level] = method.RULES["gradient"](*positive[layer])
        if layer:
            out["activations", level] = found[layer][0].norm(dim=1)
        out["edges", level] = F.adaptive_avg_pool2d(edges(x), found[layer][0].shape[-2:])
    for rule in ("NormGrad", "selective NormGrad", "Grad-CAM") if together else ():
        maps = [out[rule, level] for level in method.LAYERS]
        out |= {(rule, how): method.combine(maps, size, how=how) for how in ("product", "sum")}
    rows, columns = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in size), indexing="ij")
    out["centre", "input"] = torch.exp(-2 * (rows**2 + columns**2)).expand(len(x), *size)
    return out


def tile_boxes(places: list[int], side: int) -> torch.Tensor:
    """The boxes [B, 4] of tiles 0 to 3 in maps that are side x side."""
    half = side // 2
    corners = torch.tensor([[half * (p // 2), half * (p % 2)] for p in places])
    return torch.cat([corners, corners + half], 1)


def scored(maps: dict, places: list[int]) -> list[tuple]:
    """(picture, method, level, hit, energy) of every map."""
    rows = []
    for (rule, level), m in maps.items():
        boxes = tile_boxes(places, m.shape[-1])
        hit, energy = faithfulness.pointing_game(m, boxes), faithfulness.energy_share(m, boxes)
        for k, pair in enumerate(zip(hit.tolist(), energy.tolist(), strict=True)):
            rows.append((k, rule, level, round(pair[0], 3), round(pair[1], 2)))
    return rows


def scene_rows(method, kit: dict, kind: str, photo: int, seed: int) -> list[tuple]:
    x, place = scene(kit, kind, photo, seed)
    maps = all_maps(method, kit["model"], x, kit["y"][[photo]])
    return [(kind, seed, photo, *rest) for _, *rest in scored(maps, [place])]


def lines(hits: pd.DataFrame, alike: pd.DataFrame, method, methods: list[str]) -> pd.DataFrame:
    """What the main figure draws: a row a draw or photograph, scene, method and level; correlation as a scene."""
    rates = hits.groupby(["scene", "method", "level", "seed"])["hit"].mean().reset_index()
    correlation = alike.rename(columns={"pearson": "hit"}).assign(scene="correlation")
    table = pd.concat([rates, correlation]).query("method in @methods and hit == hit")
    levels = pd.CategoricalDtype(["input", *method.LAYERS], ordered=True)
    return table.assign(level=table["level"].astype(levels)).dropna(subset="level")


def again(kit: dict, photo: int = 13) -> tuple[pd.Series, pd.Series]:
    """A part of hits.csv.gz, as it is stored and as it comes out now: the first jigsaw scene of one photograph."""
    rows = scene_rows(papers.method(SLUG), kit, "jigsaw", photo, 0)
    key = ["scene", "seed", "photo", "method", "level"]
    now = pd.DataFrame(rows, columns=COLUMNS["hits"]).set_index(key)["energy"]
    return papers.results(SLUG, "hits").set_index(key)["energy"][now.index], now


def mosaics(kit: dict, seed: int) -> list[list[int]]:
    """Six draws of four of the photographs, by the recipe of the Grad-CAM notebook."""
    return recipes.load("papers/grad-cam/recipe.py").mosaic_sets(kit["right"], seed, n=6)


def whole(kit: dict, four: list[int]) -> torch.Tensor:
    return papers.method("grad-cam").grid_mosaic(kit["tiles"][four])[None]


def mosaic_rows(method, kit: dict, four: list[int], seed: int) -> list[tuple]:
    maps = all_maps(method, kit["model"], whole(kit, four).expand(4, -1, -1, -1), kit["y"][four])
    return [("mosaic", seed, four[k], *rest) for k, *rest in scored(maps, [0, 1, 2, 3])]


def correlations(method, top: dict, least: dict, spearman: list[str]) -> list[tuple]:
    """(method, level, Pearson on the maps, Spearman on maps of 224 x 224 as the public code has it)."""
    rows = []
    for (rule, level), m in top.items():
        other, ranked = least[rule, level], float("nan")
        if rule in spearman:
            ranked = faithfulness.rank_correlation(*(attribution.upsample(a, (224, 224)) for a in (m, other))).item()
        rows.append((rule, level, round(method.class_sensitivity(m, other).item(), 4), round(ranked, 4)))
    return rows


def sensitivity_rows(method, kit: dict, photo: int) -> list[tuple]:
    x, y = kit["x"][[photo]], kit["logits"][photo]
    maps = [all_maps(method, kit["model"], x, c[None], together=False) for c in (y.argmax(), y.argmin())]
    learned = [{key: m for key, m in one.items() if key[0] not in ("edges", "centre", "activations")} for one in maps]
    return [(photo, *row) for row in correlations(method, *learned, spearman=[*method.RULES, "guided backprop"])]


def coherence_rows(method, kit: dict, photo: int) -> list[tuple]:
    found = method.grads_at(kit["model"], kit["x"][[photo]], kit["y"][photo].item(), method.LAYERS.values())
    cosines = {level: coherence(found[layer][1]).item() for level, layer in method.LAYERS.items()}
    return [(photo, level, round(cosine, 4)) for level, cosine in cosines.items()]


def steps(method, kit: dict, x: torch.Tensor, c: int, seed: list[int], draws: int, taken: list[int]) -> dict:
    """Directions of equal length in every tensor: towards c, towards a class that is not taken, and drawn by lot."""
    rng = np.random.default_rng(seed)
    own = method.class_step(kit["model"], x, c)
    other = int(rng.choice([k for k in range(1000) if k not in taken]))
    found = {"asked": own, "another": as_long_as(own, method.class_step(kit["model"], x, other))}
    return found | {f"random {k}": random_step(own, seed=int(rng.integers(2**31))) for k in range(draws)}


def stepped_maps(method, model, x, c: int, step: dict, lr: float) -> dict:
    layers = [method.LAYERS[level] for level in LATE]
    with method.moved(model, step, lr):
        found = method.grads_at(model, x, c, layers)
    pairs = [(level, found[method.LAYERS[level]]) for level in LATE]
    return {(rule, level): method.RULES[rule](*pair) for level, pair in pairs for rule in STEPPED}


def meta_rows(method, kit: dict, photo: int) -> list[tuple]:
    x, y, model = kit["x"][[photo]], kit["logits"][photo], kit["model"]
    classes = [y.argmax().item(), y.argmin().item()]
    ways = [steps(method, kit, x, c, [photo, k], 3, classes) for k, c in enumerate(classes)]
    rows = []
    for lr in RATES:
        for step in ways[0]:
            maps = [stepped_maps(method, model, x, c, way[step], lr) for c, way in zip(classes, ways, strict=True)]
            found = correlations(method, *maps, spearman=["NormGrad"] if lr == PUBLIC else [])
            rows += [(photo, step, lr, *row) for row in found]
    return rows


def meta_hit_rows(method, kit: dict, four: list[int], seed: int, number: int) -> list[tuple]:
    x, rows = whole(kit, four), []
    for k, photo in enumerate(four):
        c = kit["y"][photo].item()
        ways = steps(method, kit, x, c, [seed, number, k], 1, kit["y"].tolist())
        for step, direction in ways.items():
            maps = stepped_maps(method, kit["model"], x, c, direction, PUBLIC)
            rows += [(seed, photo, step, PUBLIC, rule, level, hit) for _, rule, level, hit, _ in scored(maps, [k])]
    return rows


def p_greater(difference: pd.Series) -> float:
    """How often the mean is as large when the sign of each photograph's difference is tossed anew."""
    d = difference.dropna().to_numpy()
    signs = np.random.default_rng(0).choice([-1, 1], (20_000, len(d)))
    return float(np.mean((signs * d).mean(axis=1) >= d.mean() - 1e-12))


def case(claim: str, name: str, difference: pd.Series, least: float = 0.0, lr: float = 0.0) -> dict:
    """One case: above 0 in every seed (where there are seeds), by sign flips over photographs, and by ``least``."""
    each = difference.unstack("seed") if "seed" in difference.index.names else difference.to_frame()
    draws, p = int((each.mean() > 0).sum()), p_greater(each.mean(axis=1))
    mean = each.mean(axis=1).mean()
    holds = draws == each.shape[1] and p <= 0.05 and mean >= least
    numbers = {"difference": round(mean, 4), "p": round(p, 4), "draws": f"{draws} of {each.shape[1]}"}
    return {"claim": claim, "lr": lr, "case": name} | numbers | {"holds": bool(holds)}


def judge_depth(hits: pd.DataFrame, method, measure: str = "hit") -> list[dict]:
    """The claims on depth, drop and the gradient's part: by hits, and by the share of mass ("energy")."""
    at = hits.pivot_table(measure, ["scene", "seed", "photo"], ["method", "level"])
    early = at.loc[:, at.columns.get_level_values("level").isin(list(method.BLOCKS))]
    early = early.T.groupby("method").mean().T
    fall = at.xs("head", axis=1, level="level") - early
    rows, by = [], ", share of mass" * (measure == "energy")
    for scene in CLUTTER:
        ours = early.loc[scene]["NormGrad"]
        for rival in ("Grad-CAM", "edges"):
            rows.append(case("depth" + by, f"{scene}, above {rival}", ours - early.loc[scene][rival]))
        rows.append(case("drop" + by, scene, (fall["Grad-CAM"] - fall["NormGrad"]).loc[scene]))
        rows.append(case("gradient" + by, scene, ours - early.loc[scene]["activations"]))
    return rows


def judge_hits(hits: pd.DataFrame, method) -> list[dict]:
    """The claims on layers together, and on the class asked for."""
    at, rows = hits.pivot_table("hit", ["scene", "seed", "photo"], ["method", "level"]), []
    for scene in CLUTTER:
        maps = at.loc[scene]["NormGrad"]
        best = maps[list(method.LAYERS)].mean().idxmax()
        for how in ("product", "sum"):
            rows.append(case("together", f"{scene}, {how}", maps[how] - maps[best]))
    mosaic = at.loc["mosaic"].dropna(axis=1, how="all")
    maps = mosaic["NormGrad"]  # added when weave and jigsaw turned out to be at the ceiling
    best = maps[list(method.LAYERS)].mean().idxmax()
    rows += [case("together", f"mosaic, {how}", maps[how] - maps[best]) for how in ("product", "sum")]
    ours = mosaic["Grad-CAM", "head"]
    for rival in RIVALS:
        maps = mosaic[rival].drop(columns="head" if rival == "linear approximation" else [])
        rows.append(case("asked", f"{rival}, {maps.mean().idxmax()}", ours - maps[maps.mean().idxmax()]))
    return rows


def judge_sensitivity(alike: pd.DataFrame) -> list[dict]:
    """Grad-CAM at the head against every rival at the level where that one's mean correlation is lowest."""
    rows = []
    for measure, claim in (("pearson", "sensitivity"), ("spearman", "sensitivity, Spearman")):
        table = alike.pivot(index="photo", columns=["method", "level"], values=measure)
        for rival in RIVALS:
            level = table[rival].mean().idxmin()
            rows.append(case(claim, f"{rival}, {level}", table[rival, level] - table["Grad-CAM", "head"]))
    return rows


def judge_meta(found: dict, measure: str = "pearson") -> list[dict]:
    """NormGrad after a step, at every learning rate: less alike than before, and than after the rivals' steps?"""
    rows, claim = [], "meta" + ", Spearman" * (measure == "spearman")
    meta = found["meta"].query("method == 'NormGrad'").pivot(index="photo", columns=["lr", "level", "step"])[measure]
    for lr in [rate for rate in meta.columns.unique("lr") if rate and meta[rate].notna().any(axis=None)]:
        for level in LATE:
            own, plain = meta[lr, level, "asked"], meta[0.0, level, "no step"]
            rows.append(case(claim, f"{level}, no step", plain - own, 0.02, lr))
            rows += [case(claim, f"{level}, {s}", meta[lr, level, s] - own, 0.0, lr) for s in ("random", "another")]
    return rows


def judge_meta_hits(found: dict) -> list[dict]:
    rows = []
    hits = found["meta_hits"].query("method == 'NormGrad'")
    after = hits.pivot_table("hit", ["seed", "photo"], ["lr", "level", "step"])
    for level in LATE if PUBLIC in after else ():
        own, plain = after[PUBLIC, level, "asked"], after[0.0, level, "no step"]
        rows.append(case("meta, hits", f"{level}, no step", own - plain, 0.0, PUBLIC))
        for rival in ("random", "another"):
            rows.append(case("meta, hits", f"{level}, {rival}", own - after[PUBLIC, level, rival], 0.0, PUBLIC))
    return rows


def with_no_step(found: dict, mosaics: pd.DataFrame) -> None:
    """Puts what was before any step beside what is after, as learning rate 0; random directions are averaged."""
    for name, source in {"meta": found["sensitivity"], "meta_hits": mosaics}.items():
        before = source.query("method in @STEPPED and level in @LATE").assign(step="no step", lr=0.0)
        after = found[name].assign(step=found[name]["step"].str.split().str[0])
        both = pd.concat([before[COLUMNS[name]], after])
        values = [column for column in ("pearson", "spearman", "hit") if column in both]
        key = [column for column in COLUMNS[name] if column not in values]
        found[name] = both.groupby(key, sort=False)[values].mean().round(4).reset_index()


def judge(found: dict, method) -> pd.DataFrame:
    """Every case of every claim, from the tables alone."""
    rows = judge_depth(found["hits"], method) + judge_depth(found["hits"], method, "energy")
    rows += judge_hits(found["hits"], method) + judge_sensitivity(found["sensitivity"]) + judge_meta_hits(found)
    return pd.DataFrame(rows + judge_meta(found) + judge_meta(found, "spearman"))


def build(out: Path, work: Path, seeds: int) -> list[Path]:
    from nbkit import runtime

    runtime.deterministic(seed=0)
    method, kit, kept = papers.method(SLUG), load(), Work(work)
    found, plain = {name: [] for name in COLUMNS}, []
    for photo in range(len(kit["x"])):
        found["sensitivity"] += kept.once(f"sensitivity {photo}", lambda p=photo: sensitivity_rows(method, kit, p))
        found["coherence"] += kept.once(f"coherence {photo}", lambda p=photo: coherence_rows(method, kit, p))
    for seed in range(seeds):
        for kind in CLUTTER:

            def one(kind=kind, seed=seed):
                return [row for photo in kit["right"] for row in scene_rows(method, kit, kind, photo, seed)]

            found["hits"] += kept.once(f"{kind} {seed}", one)
        for n, four in enumerate(mosaics(kit, seed)):
            rows = kept.once(f"mosaic {seed} {n}", lambda f=four, s=seed: mosaic_rows(method, kit, f, s))
            found["hits"] += rows
            plain += rows
    for photo in range(len(kit["x"])):
        found["meta"] += kept.once(f"meta {photo}", lambda p=photo: meta_rows(method, kit, p))
    for seed in range(seeds):
        for n, four in enumerate(mosaics(kit, seed)):

            def one(four=four, seed=seed, n=n):
                return meta_hit_rows(method, kit, four, seed, n)

            found["meta_hits"] += kept.once(f"meta mosaic {seed} {n}", one)
    found = {name: pd.DataFrame(rows, columns=COLUMNS[name]) for name, rows in found.items()}
    with_no_step(found, pd.DataFrame(plain, columns=COLUMNS["hits"]))
    found["cases"] = judge(found, method)
    paths = [out / f"{name}.csv{'.gz' * (name in PACKED)}" for name in found]
    for path, table in zip(paths, found.values(), strict=True):
        write_table(path, table)
    return paths


if __name__ == "__main__":
    run(build, __doc__, work=work_option(SLUG), seeds=seeds_option(3, "draws of scenes and mosaics"))
