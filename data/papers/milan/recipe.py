"""Networks and tables of the milan notebook: an encoder, a describer, a language model, subjects with a spurious digit.

About 11 minutes of one core, in pieces that are kept. The functions are the method cells of
notebooks/02-concepts/05-milan.
"""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pandas as pd
import torch
from scipy.stats import binom
from torch import nn

from nbkit import datasets, hooks, models, papers, training
from nbkit.recipes import Work, round_to_half, run, seeds_option, work_option, write_table, write_tensors

SLUG = "milan"
NET = {"widths": (16, 32, 64)}
POOLS = {
    "train": slice(0, 8000),
    "first": slice(8000, 9000),
    "fresh": slice(9000, 10000),
    "test": slice(10000, 12000),
}
LAMBDAS = (0.0, 0.1, 0.2, 0.5, 1.0)
DRAWS = 20
GRID = (0, 1, 2, 4, 8, 16, 32)  # units cut


def scenes(garments, digits, n, *, agree, seed):
    """n canvases of a garment and a digit in two of four tiles, by lot: images, garment's class, categories.

    garments, digits: (tiles [M, 1, 28, 28], classes [M]). agree: the share of canvases whose digit is set to the
    garment's class, in the others it is drawn; None: it never is. categories [n, 4]: 0-9 garments, 10-19 digits,
    -1 an empty tile. Raises: ValueError.
    """
    if n < 1 or not (agree is None or 0 <= agree <= 1):
        raise ValueError(f"scenes needs n >= 1 and agree in [0, 1] or None, not {n}, {agree}")
    lot = torch.Generator().manual_seed(seed)
    first = torch.randperm(len(garments[0]), generator=lot).repeat(-(-n // len(garments[0])))[:n]
    y = garments[1][first]
    name = torch.randint(10, (n,), generator=lot)
    if agree is None:
        name = (y + 1 + name % 9) % 10
    else:
        name = torch.where(torch.rand(n, generator=lot) < agree, y, name)
    second = torch.empty_like(first)
    for c in name.unique():
        of_class = (digits[1] == c).nonzero()[:, 0]
        here = name == c
        second[here] = of_class[torch.randint(len(of_class), (int(here.sum()),), generator=lot)]
    place = torch.rand(n, 4, generator=lot).argsort(1)[:, :2]
    cells = torch.full((n, 4), -1).scatter(1, place, torch.stack([first, len(garments[0]) + second], 1))
    categories = torch.full((n, 4), -1).scatter(1, place, torch.stack([y, 10 + name], 1))
    tiles = torch.cat([garments[0], digits[0]])
    return datasets.canvas(tiles, cells.view(n, 2, 2)).images, y, categories


ROWS = {  # category: kind, group, shape
    "t-shirt": "garment upperwear short-sleeves",
    "trouser": "garment two-legs",
    "pullover": "garment upperwear long-sleeves",
    "dress": "garment skirt",
    "coat": "garment upperwear long-sleeves",
    "sandal": "garment footwear straps",
    "shirt": "garment upperwear long-sleeves",
    "sneaker": "garment footwear laces",
    "bag": "garment straps",
    "boot": "garment footwear shaft",
    "zero": "digit loop",
    "one": "digit stroke",
    "two": "digit curve",
    "three": "digit curve",
    "four": "digit stroke",
    "five": "digit curve",
    "six": "digit loop",
    "seven": "digit stroke",
    "eight": "digit loop",
    "nine": "digit loop",
}
HAS = {category: frozenset([category, *row.split()]) for category, row in ROWS.items()}
TYPES = {
    "kind": ["garment", "digit"],
    "group": ["upperwear", "footwear"],
    "category": list(ROWS),
    "shape": sorted({row.split()[-1] for row in ROWS.values()}),
    "part": ["upper", "lower"],
}
OTHER_WORDS = {  # a synonym of every attribute
    "garment": "clothing", "digit": "number", "upperwear": "top", "footwear": "shoe",
    "upper": "head", "lower": "bottom",
    "short-sleeves": "half-sleeves", "long-sleeves": "full-sleeves", "two-legs": "legs", "skirt": "hem",
    "straps": "handles", "laces": "sole", "shaft": "high-top", "loop": "ring", "stroke": "line", "curve": "bow",
    "t-shirt": "tee", "trouser": "pants", "pullover": "sweater", "dress": "gown", "coat": "jacket",
    "sandal": "slipper", "shirt": "blouse", "sneaker": "trainer", "bag": "purse", "boot": "bootie",
    **{name: str(i) for i, name in enumerate(list(ROWS)[10:])},
}  # fmt: skip
MEANS = {word: word for word in OTHER_WORDS} | {w: a for a, w in OTHER_WORDS.items()}
WORDS = [*MEANS, "thing", "some", "mostly", "with", "at", "the", "of", "on", "near"]


def implied(attribute):
    """An attribute and what every category that has it has as well: "boot" is footwear, too."""
    rows = [row for row in HAS.values() if attribute in row]
    return frozenset.intersection(*rows) if rows else frozenset([attribute])


def read(text):
    """The attributes that a description states or implies. A word that is no attribute's says nothing."""
    return frozenset().union(*(implied(MEANS[w]) for w in text.split() if w in MEANS))


def f1(said, true):
    """F1 of two sets of attributes: 2 |both| / (|said| + |true|); 0 where either is empty."""
    return 2 * len(said & true) / max(1, len(said) + len(true))


def shared(sets):
    """The attributes that more than half of the sets have."""
    count = Counter(attribute for each in sets for attribute in each)
    return frozenset(a for a, n in count.items() if n > len(sets) / 2)


def annotate(true, lot):
    """One description of regions that share these attributes; lot: a random.Random.

    The noun is generic more often than not, shape and part are mostly left out, a word in ten is wrong.
    """

    def word(kind):
        attribute = lot.choice([a for a in TYPES[kind] if a in true])
        if lot.random() < 0.1:
            attribute = lot.choice([a for a in TYPES[kind] if a != attribute])
        return lot.choice([attribute, OTHER_WORDS[attribute]])

    said = {kind for kind, all_of in TYPES.items() if true & set(all_of)}
    levels = [kind for kind in ("kind", "group", "category") if kind in said]
    odds = {"kind": 5, "group": 3, "category": 3}
    noun = word(lot.choices(levels, [odds[k] for k in levels])[0]) if levels else "thing"
    shape = word("shape") if "shape" in said and lot.random() < 0.4 else ""
    part = word("part") if "part" in said and lot.random() < 0.4 else ""
    noun = f"{lot.choice(['', 'some', 'mostly'])} {noun}"
    text = lot.choice(
        [
            f"{noun} {shape and 'with ' + shape} {part and 'at the ' + part}",
            f"{part and f'the {part} of'} {noun} {shape and 'with ' + shape}",
            f"{shape and shape + ' on'} {noun} {part and 'near the ' + part}",
        ]
    )
    return " ".join(text.split())


def tokens(texts):
    """Texts as word numbers [N, T], each ended by its STOP and filled up. Raises: ValueError."""
    unknown = {w for text in texts for w in text.split()} - set(WORDS)
    if unknown or not len(texts):
        raise ValueError(f"no texts, or words that are not known: {sorted(unknown)}")
    rows = [torch.tensor([*map(WORDS.index, text.split()), len(WORDS) + 1]) for text in texts]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=len(WORDS) + 2)


def regions(masks, categories):
    """What every mask is on: the attributes of the tile with most of it, with its part, one set an image."""
    where = masks.view(-1, 2, 28, 2, 28).transpose(2, 3).reshape(-1, 4, 28, 28)
    mass = where.sum((2, 3)) * (categories >= 0)
    found = []
    for tile, m, c in zip(where, mass, categories, strict=True):
        here = m.argmax()
        if m[here] == 0:
            found.append(frozenset())
            continue
        row = (tile[here].sum(1) @ torch.arange(28.0) / m[here]).item()
        part = {"upper"} if row < 11 else {"lower"} if row > 17 else set()
        found.append(list(HAS.values())[c[here]] | part)
    return found


def fit(logp, model, sets, words, *, epochs, lr=3e-3, batch=128, seed=0):
    """Train by the mean of -log p of the words; sets [N, k, features], words [N, T]."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    lot = torch.Generator().manual_seed(seed)
    steps = epochs * -(-len(sets) // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(sets), generator=lot).split(batch):
            loss = -logp(model, words[rows], sets[rows]).sum() / (words[rows] != len(WORDS) + 2).sum()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5)
            optimizer.step()
            schedule.step()
    return model.eval().requires_grad_(False)


def shipped(model: torch.nn.Module, name: str) -> torch.nn.Module:
    """The model with the weights of data/papers/milan/<name>.safetensors, to be looked at only."""
    model.load_state_dict(papers.tensors(SLUG, name))
    return model.eval().requires_grad_(False)


def tiles(pool: str) -> tuple[tuple, tuple]:
    """The garments and the digits of a pool; no image is in two pools."""
    garments, digits = datasets.load("fashion-mnist"), datasets.load("mnist")
    return tuple((d.x[POOLS[pool]], d.y[POOLS[pool]]) for d in (garments, digits))


def trained(work: Path, name: str, model: torch.nn.Module, train) -> torch.nn.Module:
    """The model of a file in the work folder, or trained now; its weights are what float16 holds."""
    file = work / f"{name}.pt"
    if file.exists():
        model.load_state_dict(torch.load(file))
    else:
        train(model)
        round_to_half(model)
        torch.save(model.state_dict(), file)
    return model.eval().requires_grad_(False)


def encoder(work: Path) -> torch.nn.Module:
    (x, y), (digits, names) = tiles("train")
    data = (torch.cat([x, digits]), torch.cat([y, 10 + names]))
    return trained(
        work, "encoder", models.build("small-cnn", seed=10, classes=20, **NET),
        lambda net: training.fit(net, data, epochs=4, lr=3e-3, batch=64, schedule=training.cosine(0.1), seed=10),
    )  # fmt: skip


def subject(method, work: Path, seed: int) -> torch.nn.Module:
    x, y, _ = scenes(*tiles("train"), 8000, agree=0.5, seed=seed)
    return trained(
        work, f"subject{seed}", models.build("small-cnn", seed=seed, **NET),
        lambda net: training.fit(net, (x, y), epochs=8, lr=3e-3, batch=64, schedule=training.cosine(0.1), seed=seed),
    )  # fmt: skip


def spots(images: torch.Tensor, categories: torch.Tensor, seed: int) -> torch.Tensor:
    """A disc on one bright place of every canvas, cut at the tile's edge, [n, 1, 56, 56]."""
    lot = torch.Generator().manual_seed(seed)
    bright = images.flatten(1).clamp(min=0) ** 2
    at = torch.multinomial(bright, 1, generator=lot)[:, 0]
    row, column = at // 56, at % 56
    radius = 1.5 + 6.5 * torch.rand(len(images), 1, 1, generator=lot)
    line = torch.arange(56)
    near = (line[None, :, None] - row[:, None, None]) ** 2 + (line[None, None] - column[:, None, None]) ** 2
    tile = ((line // 28)[None, :, None] == (row // 28)[:, None, None]) & (
        (line // 28)[None, None] == (column // 28)[:, None, None]
    )
    return ((near <= radius**2) & tile).float()[:, None]


def bank(method, net, work: Path, n: int = 8000) -> tuple[torch.Tensor, list[frozenset]]:
    """Encoded regions of training canvases, with their attributes; none is an exemplar of a subject."""
    images, _, categories = scenes(*tiles("train"), n, agree=0, seed=20)
    masks = spots(images, categories, 20)
    file = work / "bank.pt"
    if not file.exists():
        parts = [method.encode(net, *p) for p in zip(images.split(500), masks.split(500), strict=True)]
        torch.save(torch.cat(parts), file)
    return torch.load(file), regions(masks, categories)


def region_sets(found: list[frozenset], n: int, seed: int, k: int = 15) -> tuple[torch.Tensor, list[str]]:
    """n sets of k regions that have one or two attributes in common but for some, and a description of each."""
    lot = random.Random(seed)
    having = {a: [i for i, f in enumerate(found) if a in f] for all_of in TYPES.values() for a in all_of}
    pair = {
        (a, part): [i for i in having[a] if part in found[i]]
        for a in having for part in TYPES["part"] if part not in (a,)
    }  # fmt: skip
    sets, texts = [], []
    for _ in range(n):
        kind = lot.choice(["kind", "group", "category", "category", "shape", "part"])
        common = lot.choice(TYPES[kind])
        pool = having[common]
        if kind != "part" and lot.random() < 0.5:
            pool = pair[common, lot.choice(TYPES["part"])] or pool
        pure = lot.uniform(0.5, 1)
        rows = [lot.choice(pool) if lot.random() < pure else lot.randrange(len(found)) for _ in range(k)]
        sets.append(rows)
        texts.append(annotate(shared([found[i] for i in rows]), lot))
    return torch.tensor(sets), texts


def describers(method, net, work: Path, n: int = 10000):
    """The describer, the one trained on shuffled pairs, and the language model; loss a text on 1,000 others."""
    feats, found = bank(method, net, work)
    sets, texts = region_sets(found, n + 1000, seed=0)
    words = tokens(texts)
    mixed = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    made = {
        "describer": (method.Describer(len(WORDS)), words[:n]),
        "shuffled": (method.Describer(len(WORDS)), words[:n][mixed]),
        "lm": (method.LanguageModel(len(WORDS)), words[:n]),
    }
    models_ = {
        name: trained(
            work, name, model,
            lambda m, w=w: fit(method.logp, m, feats[sets[:n]], w, epochs=10),
        )
        for name, (model, w) in made.items()
    }  # fmt: skip
    held = {}
    with torch.no_grad():
        for name, model in models_.items():
            total = method.logp(model, words[n:], feats[sets[n:]])
            held[name] = -total.mean().item()
    return models_, held


def watch(method, net, enc, pool: str, seed: int) -> list[dict]:
    """Every unit's exemplars on 1,000 canvases of a pool: encoded, with their attributes, and its best label."""
    images, _, categories = scenes(*tiles(pool), 1000, agree=0.5, seed=30 + seed)
    inside = pixels(images, categories)
    with torch.no_grad(), hooks.record(net, method.LAYERS) as maps:
        net(images)
    units = []
    for layer in method.LAYERS:
        top, levels = method.exemplars(maps[layer])
        for unit, (of, level) in enumerate(zip(top, levels, strict=True)):
            masks = method.masks_at(maps[layer][of, unit], level)
            one = {"layer": layer, "unit": unit, "live": bool(level > 0 and masks.any())}
            if one["live"]:
                one["feats"] = method.encode(enc, images[of], masks)
                one["true"] = shared(regions(masks, categories[of]))
                one["label"] = best_label(method, maps[layer][:, unit], level, inside)
            units.append(one)
    return units


def pixels(images: torch.Tensor, categories: torch.Tensor) -> torch.Tensor:
    """The category of every pixel, 20 where it is black, [n, 56, 56]."""
    whole = categories.view(-1, 2, 2).repeat_interleave(28, 1).repeat_interleave(28, 2)
    return torch.where((images[:, 0] > 0.1) & (whole >= 0), whole, 20)


def best_label(method, maps: torch.Tensor, level: torch.Tensor, inside: torch.Tensor) -> str:
    """The attribute whose pixels overlap most with the unit's mask over all canvases (IoU), as NetDissect names it."""
    on = method.masks_at(maps, level)[:, 0] > 0
    both = torch.bincount(inside[on], minlength=21)
    size = torch.bincount(inside.flatten(), minlength=21)
    iou = {}
    for attribute in {a for row in HAS.values() for a in row}:
        rows = [i for i, row in enumerate(HAS.values()) if attribute in row]
        hit = both[rows].sum()
        iou[attribute] = (hit / (on.sum() + size[rows].sum() - hit)).item()
    return max(sorted(iou), key=iou.get)


def watched(method, net, enc, work: Path, pool: str, seed: int) -> list[dict]:
    """As watch, kept in the work folder."""
    file = work / f"{pool}{seed}.pt"
    if not file.exists():
        torch.save(watch(method, net, enc, pool, seed), file)
    return torch.load(file, weights_only=False)


def describe_all(method, net, enc, made: dict, work: Path, seed: int) -> list[dict]:
    """Every unit: its true attributes on first and fresh exemplars, and what each way says of it."""
    first, fresh = (watched(method, net, enc, work, pool, seed) for pool in ("first", "fresh"))
    common = method.candidates(made["lm"], made["lm"], torch.zeros(1, 112), WORDS)["text"][0]
    rows = []
    for a, b in zip(first, fresh, strict=True):
        row = {"seed": seed, "layer": a["layer"], "unit": a["unit"], "live": a["live"] and b["live"]}
        if row["live"]:
            row |= {
                "first": sorted(a["true"]),
                "fresh": sorted(b["true"]),
                "label": a["label"],
                "common": common,
            }
            for way in ("describer", "shuffled"):
                table = method.candidates(made[way], made["lm"], a["feats"], WORDS)
                for lam in LAMBDAS:
                    best = method.rerank(table, lam).iloc[0]
                    row[f"{way} {lam:g}"] = best["text"]
                    row[f"{way} {lam:g} prior"] = best["prior"]
                if way == "describer":
                    row["beam"] = table[["text", "prior"]].to_numpy().tolist()
        rows.append(row)
    return rows


def scores(method, rows: list[dict]) -> tuple[list[dict], list[dict], list[dict]]:
    """Of one network: F1 of every way; how often lots do as well; sign tests against the shuffled captioner."""
    live = [row for row in rows if row["live"]]
    seed = rows[0]["seed"]
    fresh = [frozenset(row["fresh"]) for row in live]
    first = [frozenset(row["first"]) for row in live]
    layer = torch.tensor([method.LAYERS.index(row["layer"]) for row in live])
    same = layer[:, None] == layer[None]
    others = ~torch.eye(len(live), dtype=torch.bool)
    out, grids = [], {}
    ways = [f"{way} {lam:g}" for way in ("describer", "shuffled") for lam in LAMBDAS] + ["label", "common"]
    for way in ways:
        said = [read(row[way]) for row in live]
        grid = torch.tensor([[f1(s, t) for t in fresh] for s in said])  # [said of, true of]
        grids[way] = grid
        captioner, _, lam = way.partition(" ")
        one = {"seed": seed, "way": way, "captioner": captioner, "lambda": lam, "units": len(live)}
        one["F1"] = grid.diagonal().mean().item()
        one["F1 first"] = sum(f1(s, t) for s, t in zip(said, first, strict=True)) / len(live)
        one["F1 other unit"] = mean_where(grid, others)
        one["F1 other, same layer"] = mean_where(grid, others & same)
        one["attributes"] = sum(len(s) for s in said) / len(live)
        if f"{way} prior" in live[0]:
            one["log p(d)"] = sum(row[f"{way} prior"] for row in live) / len(live)
        out.append(one)
    return out, chances(method, live, fresh, grids["describer 0.2"], layer, seed), against(grids, out, seed)


def mean_where(grid: torch.Tensor, mask: torch.Tensor) -> float:
    """Mean over the units described of the mean F1 of the other units' texts."""
    weights = mask.float()
    return ((grid * weights).sum(0) / weights.sum(0)).mean().item()


def chances(method, live, fresh, grid, layer, seed: int) -> list[dict]:
    """How often texts by lot pass the rules: less likely ones of the same beam; another order of the units."""
    lot = torch.Generator().manual_seed(seed)
    before = sum(f1(read(row["describer 0"]), t) for row, t in zip(live, fresh, strict=True)) / len(live)
    drawn = torch.zeros(1000)
    for row, t in zip(live, fresh, strict=True):
        rarer = [f1(read(text), t) for text, p in row["beam"] if p <= row["describer 0 prior"]]
        drawn += torch.tensor(rarer)[torch.randint(len(rarer), (1000,), generator=lot)] / len(live)
    found = [
        {"seed": seed, "rule": "specificity", "draws": 1000, "passed": int((drawn >= before - 0.02).sum())}
    ]
    found[0]["F1"] = drawn.mean().item()
    index = torch.arange(len(live))
    for rule, within in (("other unit", torch.zeros_like(layer)), ("same layer", layer)):
        mask = (within[:, None] == within[None]) & ~torch.eye(len(live), dtype=torch.bool)
        passed = 0
        for _ in range(1000):
            mixed = torch.rand(len(live), generator=lot).add(within).argsort()
            text = torch.empty_like(index)
            text[within.argsort(stable=True)] = mixed
            moved = grid[text]
            passed += moved.diagonal().mean().item() >= mean_where(moved, mask) + 0.2
        found.append({"seed": seed, "rule": rule, "draws": 1000, "passed": passed})
    for lam in ("0.2", "0.5"):
        said = [read(row[f"describer {lam}"]) for row in live]
        own = sum(f1(s, t) for s, t in zip(said, fresh, strict=True)) / len(live)
        found.append({"seed": seed, "rule": f"rarer by lot, {lam}", "draws": 1000,
                      "passed": int((drawn >= own).sum()), "F1": drawn.mean().item(), "own": own})  # fmt: skip
        found.append(beyond_the_kind(said, fresh, layer, lot) | {"seed": seed, "rule": f"beyond kind, {lam}"})
    return found


def beyond_the_kind(said: list[frozenset], true: list[frozenset], layer: torch.Tensor, lot) -> dict:
    """F1 without the attributes digit and garment, and with the texts permuted in a layer among those of a kind."""
    kinds = frozenset(TYPES["kind"])
    grid = torch.tensor([[f1(s - kinds, t - kinds) for t in true] for s in said])
    alike = [(at, tuple(sorted(s & kinds))) for at, s in zip(layer.tolist(), said, strict=True)]
    group = torch.tensor([sorted(set(alike)).index(one) for one in alike])
    text = torch.empty_like(group)
    draws = torch.zeros(1000)
    for draw in range(1000):
        text[group.argsort(stable=True)] = torch.rand(len(said), generator=lot).add(group).argsort()
        draws[draw] = grid[text].diagonal().mean()
    own = grid.diagonal().mean()
    passed = int((draws >= own - 1e-6).sum())
    only = sum(s <= kinds for s in said)
    return {"draws": 1000, "passed": passed, "F1": draws.mean().item(), "own": own.item(), "kind only": only}


def against(grids: dict, out: list[dict], seed: int) -> list[dict]:
    """Units whose F1 is higher, and lower, than with the shuffled captioner at its best strength on first exemplars."""
    rival = max((one for one in out if one["way"].startswith("shuffled")), key=lambda one: one["F1 first"])[
        "way"
    ]
    rows = []
    for other in (rival, "label", "common", "describer 0"):
        gain = grids["describer 0.2"].diagonal() - grids[other].diagonal()
        better, worse = int((gain > 0).sum()), int((gain < 0).sum())
        row = {"seed": seed, "rival": other.split(" ")[0], "way": other, "better": better, "worse": worse}
        row["F1"] = grids[other].diagonal().mean().item()
        rows.append(row | {"p": sign_test(better, worse)})
    return rows


def sign_test(better: int, worse: int) -> float:
    """Chance that a fair coin falls on this side as often, or more often."""
    return float(binom.sf(better - 1, better + worse, 0.5))


class Cutter:
    """Answers of a subject with units cut, from maps that are kept: what lies before a cut is not computed again."""

    def __init__(self, net, x: torch.Tensor, y: torch.Tensor):
        self.net, self.y = net, y
        with torch.no_grad():
            first = [net[:3](part) for part in x.split(250)]  # after pool1
            self.first = torch.cat(first)
            self.second = torch.cat([net[3:6](part) for part in self.first.split(250)])  # after pool2
            self.third = torch.cat([net[6:9](part) for part in self.second.split(250)])  # after gap

    def right(self, units: list[tuple[str, int]]) -> torch.Tensor:
        cut = {layer: [u for at, u in units if at == layer] for layer in ("relu1", "relu2", "relu3")}
        with torch.no_grad():
            second, third = self.second, self.third
            if cut["relu1"]:
                kept = self.first.clone()
                kept[:, cut["relu1"]] = 0
                second = torch.cat([self.net[3:6](part) for part in kept.split(250)])
            if cut["relu2"]:
                second = second.clone()
                second[:, cut["relu2"]] = 0
            if cut["relu1"] or cut["relu2"]:
                third = torch.cat([self.net[6:9](part) for part in second.split(250)])
            third = third.clone()
            third[:, cut["relu3"]] = 0
            return self.net[9:](third).argmax(1) == self.y

    def accuracy(self, units) -> float:
        return self.right(units).float().mean().item()


PLAN = {  # canvases to edit on: pool, how many, how often the digit is set to the class
    "as trained": ("first", 500, 0.5), "validation": ("fresh", 1000, 0), "adversarial": ("test", 1000, None),
    "random digits": ("test", 500, 0), "half agree": ("test", 500, 0.5),
}  # fmt: skip


def canvases(name: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    pool, n, agree = PLAN[name]
    return scenes(*tiles(pool), n, agree=agree, seed=100 * list(PLAN).index(name) + seed + 50)[:2]


def cut_alone(method, net, seed: int) -> list[float]:
    """Accuracy on canvases as in training with every unit cut alone."""
    x, y = canvases("as trained", seed)
    cutter = Cutter(net, x, y)
    every = [(layer, u) for layer, n in zip(method.LAYERS, NET["widths"], strict=True) for u in range(n)]
    found = [cutter.accuracy([unit]) for unit in every]
    assert abs(found[3] - method.accuracy_without(net, [every[3]], x, y)) < 1e-6
    return found


def edit(net, rows: list[dict], alone: list[float], seed: int) -> dict:
    """Cutting the units whose text mentions a digit, and the controls; see the notebook."""
    cutters = {name: Cutter(net, *canvases(name, seed)) for name in list(PLAN)[1:]}
    score = {(row["layer"], row["unit"]): a for row, a in zip(rows, alone, strict=True)}
    live = [(row["layer"], row["unit"]) for row in rows if row["live"]]
    wanted = [
        (row["layer"], row["unit"]) for row in rows if row["live"] and "digit" in read(row["describer 0.2"])
    ]
    return cuts(cutters, live, wanted, score, seed)


def cuts(cutters: dict, every: list, wanted: list, alone: dict, seed: int) -> dict:
    lot = random.Random(seed)
    sort = lambda units: sorted(units, key=lambda u: -alone[u])  # noqa: E731
    limit = min(len(wanted), GRID[-1])
    orders = {"described": sort(wanted)[:limit], "sort-all": sort(every)[:limit]}
    curve, best = [], {}
    for way, order in orders.items():
        for n in (n for n in GRID if n <= limit):
            row = {"seed": seed, "way": way, "draw": 0, "n": n}
            row |= {on: cutters[on].accuracy(order[:n]) for on in ("validation", "adversarial")}
            curve.append(row)
        best[way] = max((r for r in curve if r["way"] == way), key=lambda r: r["validation"])["n"]
    n = best["described"]
    chosen = orders["described"][:n]
    layers = [layer for layer, _ in chosen]
    for draw in range(DRAWS):
        mixed = lot.sample(every, len(every))
        for m in {n, *(m for m in (4, 16) if m <= limit and draw < 3)}:
            curve.append({"seed": seed, "way": "random", "draw": draw, "n": m,
                          "adversarial": cutters["adversarial"].accuracy(mixed[:m])})  # fmt: skip
        per = [u for layer in dict.fromkeys(layers)
               for u in lot.sample([e for e in every if e[0] == layer], layers.count(layer))]  # fmt: skip
        whole = [layer for layer, _ in wanted]
        pool = [u for layer in dict.fromkeys(whole)
                for u in lot.sample([e for e in every if e[0] == layer], whole.count(layer))]  # fmt: skip
        for way, units in (("random, same layers", per), ("lot, sorted", sort(pool)[:n])):
            curve.append({"seed": seed, "way": way, "draw": draw, "n": n,
                          "adversarial": cutters["adversarial"].accuracy(units)})  # fmt: skip
    ours = cutters["adversarial"].right(chosen)
    signs = []
    for rival, units in (("unedited", []), ("sort-all, same n", orders["sort-all"][:n]),
                         ("sort-all, its n", orders["sort-all"][: best["sort-all"]])):  # fmt: skip
        other = cutters["adversarial"].right(units)
        row = {"seed": seed, "rival": rival, "candidates": len(wanted), "n": n, "rival n": len(units)}
        better, worse = int((ours & ~other).sum()), int((other & ~ours).sum())
        row |= {"better": better, "worse": worse, "p": sign_test(better, worse)}
        row["passed"] = row["p"] <= 0.05
        for on in ("adversarial", "random digits", "half agree"):
            row[on] = cutters[on].accuracy(units)
            row[f"ours, {on}"] = cutters[on].accuracy(chosen)
        signs.append(row)
    mine = ours.float().mean().item()
    for rival in ("random", "random, same layers", "lot, sorted"):
        lots = [row["adversarial"] for row in curve if row["way"] == rival and row["n"] == n]
        row = {"seed": seed, "rival": rival, "candidates": len(wanted), "n": n, "rival n": n}
        row |= {"better": sum(mine > a for a in lots), "worse": sum(mine < a for a in lots)}
        row |= {
            "passed": row["better"] >= 19,
            "adversarial": sum(lots) / len(lots),
            "ours, adversarial": mine,
        }
        signs.append(row)
    return {"curve": curve, "signs": signs, "order": orders["described"], "best": best}


def other_order(net, rows: list[dict], seed: int) -> list[dict]:
    """The same candidates, ordered by accuracy on the validation canvases with random digits."""
    validation, adversarial = (Cutter(net, *canvases(name, seed)) for name in ("validation", "adversarial"))
    units = [(r["layer"], r["unit"]) for r in rows if r["live"] and "digit" in read(r["describer 0.2"])]
    order = sorted(units, key=lambda unit: -validation.accuracy([unit]))
    return [
        {"seed": seed, "way": "other order", "draw": 0, "n": n,
         "validation": validation.accuracy(order[:n]), "adversarial": adversarial.accuracy(order[:n])}
        for n in GRID
    ]  # fmt: skip


def build(out: Path, work: Path, seeds: int) -> list[Path]:
    from nbkit import runtime

    runtime.deterministic(seed=0)
    method = papers.method(SLUG)
    kept = Work(work)
    enc = encoder(work)
    made, held = describers(method, enc, work)
    units, ways, chance, signs, curve, edits = [], [], [], [], [], []
    for seed in range(seeds):
        net = subject(method, work, seed)
        rows = kept.once(f"units{seed}", lambda s=seed, m=net: describe_all(method, m, enc, made, work, s))
        for table, part in zip((ways, chance, signs), scores(method, rows), strict=True):
            table += part
        alone = kept.once(f"alone{seed}", lambda s=seed, m=net: cut_alone(method, m, s))
        found = kept.once(f"edit{seed}", lambda s=seed, m=net, r=rows, a=alone: edit(m, r, a, s))
        curve += found["curve"] + kept.once(
            f"other{seed}", lambda s=seed, m=net, r=rows: other_order(m, r, s)
        )
        edits += found["signs"]
        cut = {tuple(unit): n for n, unit in enumerate(found["order"])}
        keep = [
            "seed",
            "layer",
            "unit",
            "live",
            "label",
            "describer 0",
            "describer 0.2",
            "describer 0.5",
            "shuffled 0.2",
        ]
        for row, without in zip(rows, alone, strict=True):
            one = {name: row.get(name, "") for name in keep} | {"alone": without}
            one |= {name: " ".join(row.get(name, [])) for name in ("first", "fresh")}
            kinds = sorted(read(one["describer 0.2"]) & set(TYPES["kind"]))
            one["says"] = " and ".join(kinds) or "neither"
            units.append(one | {"order": cut.get((row["layer"], row["unit"]), "")})
    ways.append({"seed": -1, "way": "held-out loss", "F1": None} | held)
    tables = {"ways": ways, "chance": chance, "rivals": signs, "cuts": curve, "edits": edits}
    for name, rows in tables.items():
        write_table(out / f"{name}.csv", pd.DataFrame(rows), float_format="%.5g")
    write_table(out / "units.csv.gz", pd.DataFrame(units))
    paths = [out / f"{name}.csv" for name in tables] + [out / "units.csv.gz"]
    nets = {
        "encoder": enc,
        "subject": subject(method, work, 0),
        "describer": made["describer"],
        "lm": made["lm"],
    }
    for name, net in nets.items():
        half = {k: v.half() for k, v in net.state_dict().items()}
        write_tensors(out / f"{name}.safetensors", half)
        paths.append(out / f"{name}.safetensors")
    return paths


if __name__ == "__main__":
    run(build, __doc__, work=work_option(SLUG), seeds=seeds_option(3, "subjects"))
