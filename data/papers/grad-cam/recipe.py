"""The tables of notebooks/01-saliency/01-grad-cam, measured at length.

Three sets of ten mosaics of four photographs, every method asked for every tile's class; the share of tiles that a
box around each map finds; agreement with occlusion on 18 photographs and on ten mosaics; nine mosaics attacked; units
of block 16 silenced; mosaics of garments in three small networks. Grad-CAM, its boxes and the mosaics are the
notebook's own method cells; its variants, the baselines and the measures are below. About ten minutes on one core.
"""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from nbkit import attribution, faithfulness, hooks
from nbkit.recipes import Work, part_option, run, work_option, write_table

SETS, LAST, ATTACKED = (3, 4, 5), "_act_head", 3
BLOCKS = (16, 15, 14, 13, 12, 11, 8, 5, 3)
LAYERS = {"head": LAST} | {f"block {n}": f"_blocks.{n - 1}" for n in BLOCKS}
RULES = ("head", "block 16", "block 15")  # where other weights than the mean gradient are tried
STITCHED = ("head", "block 16", "block 15", "block 12", "block 11")
BEFORE_LAST = "_blocks.15._act1"  # the last maps before the head that are nowhere negative
PIXELS = ("gradient", "guided backprop", "Deconvnet")
BOXED = (*PIXELS, "Grad-CAM", "c-MWP", "Guided Grad-CAM", "stitched", "centre", "noise")
SHOWN = ("", "head", "block 16", "block 15", "block 11")
THRESHOLDS = [round(0.05 * k, 2) for k in range(1, 20)]
ABSENT = 404  # an airliner, which none of the photographs shows


class _DeconvReLU(torch.autograd.Function):
    """M. Zeiler and R. Fergus, 2013: what comes back is cut at zero, whatever the input was."""

    @staticmethod
    def forward(ctx, x):
        return x.clamp(0, 6)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.clamp(min=0)


class _Deconv(nn.Module):
    def forward(self, x):
        return _DeconvReLU.apply(x)


def deconvnet(model: nn.Module, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """[C, 3, H, W]: the Deconvnet image of one picture [1, 3, H, W] for each of the classes c."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.ReLU6):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, _Deconv())
    return attribution.saliency(model, x.expand(len(c), -1, -1, -1), c, absolute=False)


def contrastive(a: torch.Tensor, down: torch.Tensor, top: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """c-MWP (J. Zhang et al., 2016) [C, h, w], through a linear layer, ReLU, mean over positions and a linear head.

    a [J, h, w]: maps that are nowhere negative; down [K, J]: weights to the last maps top [K, h, w]; w [C, K]: those
    to the scores. Winning probabilities of the class minus those of its opposite (-w), both handed down once more.
    """

    def won(w: torch.Tensor) -> torch.Tensor:
        share = torch.einsum("ck,khw->ckhw", w.clamp(min=0), top)
        return share / share.sum((1, 2, 3), keepdim=True)

    against = won(w) - won(-w)
    plus = down.clamp(min=0)
    norm = torch.einsum("kj,jhw->khw", plus, a) + 1e-20
    return torch.einsum("jhw,kj,ckhw->chw", a, plus, against / norm).relu()


def c_mwp(model: nn.Module, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """The two 1 x 1 convolutions before the head have nothing but normalisation between them: one linear layer."""
    block = model._blocks[15]

    def scale(norm):
        return norm.weight / (norm.running_var + norm.eps).sqrt()

    with torch.no_grad(), hooks.record(model, [BEFORE_LAST, LAST]) as maps:
        model(x)
        project = scale(block._bn2)[:, None] * block._project_conv.weight[:, :, 0, 0]
        head = scale(model._bn1)[:, None] * model._conv_head.weight[:, :, 0, 0]
        return contrastive(maps[BEFORE_LAST][0], head @ project, maps[LAST][0], model._fc.weight[c])


def by_rule(A: torch.Tensor, dA: torch.Tensor) -> dict[str, torch.Tensor]:
    """Signed maps [B, h, w] from A and dA [B, K, h, w], by Grad-CAM's weights and by others."""
    square = dA**2
    below = 2 * square + A.sum((2, 3), keepdim=True) * square * dA
    share = torch.where(below != 0, square / below, 0)
    weights = {
        "Grad-CAM": dA.mean((2, 3)),
        "max pooling": dA.amax((2, 3)),
        "Grad-CAM++": (share * dA.relu()).sum((2, 3)),
    }
    maps = {name: torch.einsum("bk,bkhw->bhw", w, A) for name, w in weights.items()}
    return maps | {"no pooling": (dA * A).sum(1)}


def mosaic_sets(candidates: list[int], seed: int, n: int = 10) -> list[list[int]]:
    """n draws of four different photographs; the same ones for the same seed."""
    rng = np.random.default_rng(seed)
    return [rng.choice(candidates, 4, replace=False).tolist() for _ in range(n)]


def tile_masks(h: int, w: int) -> torch.Tensor:
    """Which places of a map [h, w] lie in each tile of a mosaic: bool [4, h, w]."""
    row, column = (torch.arange(n) >= n // 2 for n in (h, w))
    return torch.stack([(row == bool(t // 2))[:, None] & (column == bool(t % 2)) for t in range(4)])


def iou(a, b) -> float:
    """Intersection over union of two boxes (y0, x0, y1, x1)."""
    height = max(0, min(a[2], b[2]) - max(a[0], b[0]))
    width = max(0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return height * width / (sum(areas) - height * width)


def agreement(L: torch.Tensor, drops: torch.Tensor) -> float:
    """Spearman correlation of a map [H, W], averaged down to the grid of drops [a, b], with the drops."""
    pooled = nn.functional.adaptive_avg_pool2d(L[None], drops.shape)
    return float(faithfulness.rank_correlation(pooled, drops[None]))


def gradients(model: nn.Module, x: torch.Tensor, c: list[int]):
    """Maps of all layers {name: [1, K, h, w]}, their gradients {name: [C, K, h, w]}, the image's [C, 3, H, W]."""
    x = x.detach().requires_grad_()
    with torch.enable_grad(), hooks.record(model, list(LAYERS.values()), detach=False) as acts:
        y = model(x)[0]
    tensors = [*(acts[layer] for layer in LAYERS.values()), x]
    found = [torch.autograd.grad(y[k], tensors, retain_graph=True) for k in c]
    *dA, dx = (torch.cat(parts) for parts in zip(*found, strict=True))
    A = [tensor.detach() for tensor in tensors[:-1]]
    return dict(zip(LAYERS, A, strict=True)), dict(zip(LAYERS, dA, strict=True)), dx


def maps_of(model, x, c, noise_seed):
    """Every method's map for each class c of one picture: {(method, layer): [C, h, w]}, some of them signed."""
    A, dA, dx = gradients(model, x, c.tolist())
    size = tuple(x.shape[-2:])
    out = {}
    for layer, g in dA.items():
        maps = by_rule(A[layer].expand_as(g), g)
        for rule, L in maps.items() if layer in RULES else [("Grad-CAM", maps["Grad-CAM"])]:
            out[rule, layer] = L
    guided = attribution.guided_backprop(model, x.expand(len(c), -1, -1, -1), c)
    pixels = dict(zip(PIXELS, (dx, guided, deconvnet(model, x, c)), strict=True))
    out |= {(name, ""): values.abs().amax(1) for name, values in pixels.items()}
    out["gradient x input", ""] = (dx * x).sum(1)
    noise = torch.rand(len(c), 14, 14, generator=torch.Generator().manual_seed(noise_seed))
    for layer in ("head", "block 16"):
        cam = attribution.upsample(out["Grad-CAM", layer].relu(), size)
        out["Guided Grad-CAM", layer] = out["guided backprop", ""] * cam
        out["gradient x map", layer] = out["gradient", ""] * cam
    out["guided x noise", ""] = out["guided backprop", ""] * attribution.upsample(noise, size)
    out["c-MWP", ""] = c_mwp(model, x, c)
    rows, columns = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in size), indexing="ij")
    out["centre", ""] = torch.exp(-2 * (rows**2 + columns**2)).expand(len(c), *size)
    out["noise", ""] = noise
    return out


def solo_maps(model, x, y, right):
    """{(photo, class, layer): map [h, w]} of every photo alone, asked for the class of every other."""
    out = {}
    for photo in right:
        A, dA, _ = gradients(model, x[photo : photo + 1], y[right].tolist())
        for layer in STITCHED:
            maps = by_rule(A[layer].expand_as(dA[layer]), dA[layer])["Grad-CAM"].relu()
            out |= {(photo, c, layer): L for c, L in zip(right, maps, strict=True)}
    return out


def scored(maps):
    """Hit and share of mass of the maps [4, h, w] of a mosaic's four classes."""
    masks = tile_masks(*maps.shape[1:])
    hit = faithfulness.pointing_game(maps, masks).tolist()
    return zip(hit, faithfulness.energy_share(maps, masks).tolist(), strict=True)


def boxes(method, maps, size):
    """IoU of the box of each map [4, h, w] with its tile, for every threshold: [(threshold, [4 values])]."""
    if maps.shape[-1] > 14:  # pixels are averaged down to the cells of the head first
        maps = nn.functional.adaptive_avg_pool2d(maps, 14)
    full = attribution.upsample(maps.relu(), (size, size))
    half = size // 2
    tiles = [(half * (t // 2), half * (t % 2), half * (t // 2 + 1), half * (t % 2 + 1)) for t in range(4)]
    for threshold in THRESHOLDS:
        found = [method.box_from_map(L, threshold) for L in full]
        yield threshold, [0.0 if b is None else iou(b, t) for b, t in zip(found, tiles, strict=True)]


def rows_of(maps, seed: int, number: int, tiles: list[int]) -> list[tuple]:
    """Rows of mosaics.csv.gz: every map [4, h, w] of one mosaic, asked for the class of each of its photographs."""
    rows = []
    for (name, layer), L in maps.items():
        if name != "gradient x input":
            for photo, (hit, energy) in zip(tiles, scored(L.relu()), strict=True):
                rows.append((seed, number, photo, name, layer, round(hit, 3), round(energy, 3)))
    return rows


def mosaic(method, model, x, y, solo, seed, number, tiles):
    """The rows of one mosaic, and (seed, method, layer, threshold, whether a box overlaps its tile by half)."""
    whole = method.grid_mosaic(x[tiles])[None]
    maps = maps_of(model, whole, y[tiles], 100 * seed + number)
    for layer in STITCHED:
        alone = [torch.stack([solo[photo, asked, layer] for photo in tiles]) for asked in tiles]
        maps["stitched", layer] = torch.stack([method.grid_mosaic(four) for four in alone])
    maps |= {("no ReLU", layer): maps["Grad-CAM", layer].abs() for layer in RULES}
    found = []
    for (name, layer), L in maps.items():
        if name in BOXED and layer in SHOWN:
            for threshold, ious in boxes(method, L, whole.shape[-1]):
                found += [(seed, name, layer, threshold, value >= 0.5) for value in ious]
    return rows_of(maps, seed, number, tiles), found


def falls(model, x, c, window):
    """How far the logits c fall when each window of one picture is made grey: [C, gh, gw]."""
    n = x.shape[-1] // window
    with torch.no_grad():
        clean = model(x)[0, c]
        rows = []
        for place in range(n):
            covered = x.repeat(n, 1, 1, 1)
            for k in range(n):
                covered[k, :, place * window : (place + 1) * window, k * window : (k + 1) * window] = 0
            rows.append(clean - model(covered)[:, c])
    return torch.stack(rows).permute(2, 0, 1)


def agreements(maps, drops, picture, photos):
    """Rows of occlusion.csv; a map that is not signed by nature is also given with its sign where it has one."""
    rows = []
    for (name, layer), L in maps.items():
        if name in ("guided x noise", "gradient x map") or layer not in SHOWN:
            continue
        signed = name == "gradient x input"
        for k, photo in enumerate(photos):
            values = L[k] if signed else L[k].relu()
            rows.append((picture, photo, name, layer, round(agreement(values, drops[k]), 3)))
            if name == "Grad-CAM":
                rows.append((picture, photo, "signed", layer, round(agreement(L[k], drops[k]), 3)))
    return rows


def attack(model, x, target, eps=4 / 255, steps=10):
    """PGD towards a class that is not there: no pixel moves by more than eps of its range (Madry et al., 2018)."""
    bound = eps / 0.502  # in the units of the network's input
    adversarial = x.clone()
    for _ in range(steps):
        adversarial.requires_grad_()
        with torch.enable_grad():
            loss = nn.functional.cross_entropy(model(adversarial), torch.tensor([target]))
            (g,) = torch.autograd.grad(loss, adversarial)
        moved = adversarial.detach() - bound / 4 * g.sign()
        adversarial = (x + (moved - x).clamp(-bound, bound)).clamp(x.min(), x.max())
    return adversarial


def attacked(method, model, x, y, seed, number, tiles):
    whole = method.grid_mosaic(x[tiles])[None]
    fooled = attack(model, whole, ABSENT)
    with torch.no_grad():
        p = [model(picture).softmax(1)[0] for picture in (whole, fooled)]
    maps = maps_of(model, fooled, y[tiles], 100 * seed + number)
    kept = {key: L for key, L in maps.items() if key[0] in ("Grad-CAM", *PIXELS, "c-MWP", "noise") and key[1] in SHOWN}
    rows = []
    for (name, layer), L in kept.items():
        for photo, (hit, energy) in zip(tiles, scored(L.relu()), strict=True):
            before, after = (round(q[y[photo]].item(), 6) for q in p)
            absent = round(p[1][ABSENT].item(), 6)
            rows.append((seed, number, photo, name, layer, round(hit, 3), round(energy, 3), before, after, absent))
    return rows


def silenced(method, model, x, y, right, n=16, draws=20):
    """Rows of neurons.csv: how far the logit falls when n of the 320 units of block 16 are set to zero."""
    layer = LAYERS["block 16"]
    x, y = x[right], y[right]
    A, _ = method.maps_and_gradients(model, x, y, layer=layer)
    _, alpha = method.grad_cam(model, x, y, layer=layer)
    active = A.mean((2, 3))
    generator = torch.Generator().manual_seed(0)
    chosen = {
        "alpha": [alpha],
        "alpha x mean activation": [alpha * active],
        "mean activation": [active],
        "random": [torch.rand(alpha.shape, generator=generator) for _ in range(draws)],
    }

    def score(A: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), hooks.edit(model, {layer: hooks.replace(lambda out: A)}):
            return model(x).gather(1, y[:, None])[:, 0]

    clean, rows = score(A), []
    for name, orders in chosen.items():
        kept = [A * (order < order.topk(n).values[:, -1:]).float()[..., None, None] for order in orders]
        fall = torch.stack([clean - score(one) for one in kept]).mean(0)
        rows += [(photo, name, round(value, 3)) for photo, value in zip(right, fall.tolist(), strict=True)]
    return rows


def garments(method, seed, n=100):
    """Rows of garments.csv: n mosaics of four test garments of different kinds, all named rightly, in one network."""
    from nbkit import datasets, models

    net, data = models.load("small-cnn", seed=seed), datasets.load("fashion-mnist")
    x, y = data.x_test, data.y_test
    with torch.no_grad():
        pool = (net(x).argmax(1) == y).nonzero().flatten().numpy()
    rng, draws = np.random.default_rng(seed), []
    while len(draws) < n:
        four = rng.choice(pool, 4, replace=False)
        draws += [four] if len(set(y[four].tolist())) == 4 else []
    draws = np.stack(draws, 1)  # [4, n]
    whole, scores = method.grid_mosaic(x[draws]), {}
    for tile, c in enumerate(y[draws]):
        maps = {f"relu{k}": method.grad_cam(net, whole, c, layer=f"relu{k}")[0] for k in (1, 2, 3, 4)}
        maps["guided backprop"] = attribution.guided_backprop(net, whole, c).abs().amax(1)
        maps["gradient"] = attribution.saliency(net, whole, c).abs().amax(1)
        for name, L in maps.items():
            mask = tile_masks(*L.shape[1:])[tile].expand_as(L)
            scores.setdefault(name, []).append(faithfulness.pointing_game(L, mask).mean().item())
    return [(seed, name, round(sum(hits) / 4, 4)) for name, hits in scores.items()]


def filled(method, model, x, y, right):
    """Rows of frames.csv: the share of a photograph that the box around its own map fills."""
    rows = []
    for name in SHOWN[1:]:
        L, _ = method.grad_cam(model, x[right], y[right], layer=LAYERS[name])
        for photo, full in zip(right, attribution.upsample(L, (224, 224)), strict=True):
            for threshold in (0.15, 0.3, 0.5):
                share = iou(method.box_from_map(full, threshold), (0, 0, 224, 224))
                rows.append((photo, name, threshold, round(share, 4)))
    return rows


COLUMNS = {
    "mosaics": ["seed", "mosaic", "photo", "method", "layer", "hit", "energy"],
    "occlusion": ["picture", "photo", "method", "layer", "spearman"],
    "frames": ["photo", "layer", "threshold", "share"],
    "neurons": ["photo", "chosen by", "fall"],
    "garments": ["seed", "method", "hit"],
    "attacked": ["seed", "mosaic", "photo", "method", "layer", "hit", "energy", "before", "after", "absent"],
}


def measure_mosaics(work: Work, method, model, x, y, right, draws) -> dict[str, pd.DataFrame]:
    solo, rows, found = {}, [], []
    for s, n, tiles in draws:

        def one(s=s, n=n, tiles=tiles):
            if not solo:
                solo.update(solo_maps(model, x, y, right))
            return mosaic(method, model, x, y, solo, s, n, tiles)

        more, boxed = work.once(f"mosaic {s} {n}", one)
        rows += more
        found += boxed
    by = ["seed", "method", "layer", "threshold"]
    found = pd.DataFrame(found, columns=[*by, "found"])
    boxes = found.groupby(by, sort=False)["found"].mean().round(3).reset_index()
    return {"mosaics": pd.DataFrame(rows, columns=COLUMNS["mosaics"]), "boxes": boxes}


def measure_occlusion(work: Work, method, model, x, y, right, draws) -> dict[str, pd.DataFrame]:
    pictures = [("alone", photo, x[[photo]], [photo], 32) for photo in right]
    for seed, n, tiles in draws:
        if seed == SETS[0]:
            pictures.append(("in a mosaic", n, method.grid_mosaic(x[tiles])[None], tiles, 64))
    rows = []
    for kind, number, picture, shown, window in pictures:

        def one(kind=kind, number=number, picture=picture, shown=shown, window=window):
            maps = maps_of(model, picture, y[shown], number)
            return agreements(maps, falls(model, picture, y[shown], window), kind, shown)

        rows += work.once(f"{kind} {number}", one)
    return {"occlusion": pd.DataFrame(rows, columns=COLUMNS["occlusion"])}


def measure_attacked(work: Work, method, model, x, y, right, draws) -> dict[str, pd.DataFrame]:
    rows = []
    for s, n, tiles in draws:
        if n < ATTACKED:
            once = partial(attacked, method, model, x, y, s, n, tiles)
            rows += work.once(f"attacked {s} {n}", once)
    return {"attacked": pd.DataFrame(rows, columns=COLUMNS["attacked"])}


def measure_small(work: Work, method, model, x, y, right, draws) -> dict[str, pd.DataFrame]:
    frames = work.once("frames", partial(filled, method, model, x, y, right))
    rows = work.once("neurons", partial(silenced, method, model, x, y, right))
    fashion = [row for s in range(3) for row in work.once(f"garments {s}", partial(garments, method, s))]
    return {
        "frames": pd.DataFrame(frames, columns=COLUMNS["frames"]),
        "neurons": pd.DataFrame(rows, columns=COLUMNS["neurons"]),
        "garments": pd.DataFrame(fashion, columns=COLUMNS["garments"]),
    }


PARTS = {
    "mosaics": measure_mosaics,
    "occlusion": measure_occlusion,
    "attacked": measure_attacked,
    "small": measure_small,
}


def build(out: Path, part: str = "all", work: Path | None = None) -> list[Path]:
    from nbkit import datasets, models, papers, runtime

    runtime.deterministic(seed=0)
    method = papers.method("grad-cam")
    model, photos = models.load("efficientnet-lite0"), datasets.load("imagenet-sample")
    x, y = models.transform("efficientnet-lite0")(photos), photos.y
    with torch.no_grad():
        right = (model(x).argmax(1) == y).nonzero().flatten().tolist()
    draws = [(s, n, tiles) for s in SETS for n, tiles in enumerate(mosaic_sets(right, s))]
    paths = []
    for name in PARTS if part == "all" else [part]:
        for title, table in PARTS[name](Work(work), method, model, x, y, right, draws).items():
            paths.append(out / f"{title}.csv{'.gz' * (title == 'mosaics')}")
            write_table(paths[-1], table)
    return paths


if __name__ == "__main__":
    run(build, __doc__, part=part_option(*PARTS), work=work_option("grad-cam"))
