"""All tables of this folder: what notebooks/07-lean-transformers/11-zero-tprune measures beforehand.

Three tiny-vit, 1,000 test images, tokens pruned by 16 rules, before three blocks at four keep rates and before the
first two possible ones at three, all with the same number of tokens in every block: accuracy, cosine of the class
token's feature with that of the unpruned network, and which images were right; how many heads pass the variance filter
in each block, and the rank correlation of importance with ink; the same cosine of DINOv2 on 20 photographs at two
rates. About 7 minutes on one core; a run that was stopped goes on where it was (delete the folder --work for a fresh
start). The functions are the notebook's method cells.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nbkit import hooks
from nbkit.recipes import Work, run, seeds_option, work_option, write_table, write_tensors

CASES = {  # setting -> its keep rates, before which blocks tokens go
    "three layers": [("three layers", rate, (2, 3, 5)) for rate in (0.9, 0.7, 0.5, 0.3)],
    "early": [("early", rate, (1, 2)) for rate in (0.1, 0.06, 0.02)],
}
TESTED = 1000
ARMS = (
    *("full", "uniform start", "S by lot", "WPR + EIR + VHF", "WPR + EIR", "WPR"),
    *("one vote", "CLS attention", "ink", "ToMe", "random 0", "random 1", "random 2", "dense", "upside down"),
    *("inked by lot", "first by lot"),
)
LOT = ("random 0", "random 1", "random 2")
GRAPHS = ("full", "uniform start", "S by lot", "WPR + EIR + VHF", "WPR + EIR", "WPR")
PHOTO_RATES = (0.5, 0.3)
PHOTOS = 20
PHOTO_ARMS = (
    *("full", "WPR + EIR + VHF", "WPR", "one vote", "CLS attention", "contrast", "ToMe", *LOT),
)


def the_method():
    from nbkit import papers

    return papers.method("zero-tprune")


# rivals


def best_of(scores: Tensor, keep: int, method) -> Tensor:
    """Places of the class token and of the ``keep`` patches of the highest scores, [N, P]."""
    return torch.cat([torch.zeros(len(scores), 1, dtype=torch.long), 1 + method.top(scores, keep)], 1)


def merged(keys: Tensor, hidden: Tensor, size: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """ToMe: every other token looks for its most similar partner among the rest; the r most similar are merged into
    theirs, weighted by the tokens that each stands for. The class token, at 0, is never merged.

    keys [N, T, d] (mean over heads), hidden [N, T, D], size [N, T] -> places [N, T - r], states, sizes.
    """
    tokens = keys.shape[1]
    most = (tokens - 1) // 2
    if not 0 <= r <= most:
        raise ValueError(f"of {tokens} tokens between 0 and {most} can be merged away at once, not {r}")
    unit = F.normalize(keys, dim=-1)
    likeness = unit[:, ::2] @ unit[:, 1::2].mT
    likeness[:, 0] = -torch.inf
    best, partner = likeness.max(-1)
    gone = best.argsort(dim=-1, descending=True, stable=True)[:, :r]
    into = 1 + 2 * partner.gather(1, gone)
    gone = 2 * gone
    mass = hidden * size.unsqueeze(-1)
    wide = partial(lambda places: places.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
    mass = mass.scatter_add(1, wide(into), mass.gather(1, wide(gone)))
    size = size.scatter_add(1, into, size.gather(1, gone))
    kept = torch.ones_like(size, dtype=torch.bool).scatter(1, gone, False).nonzero()[:, 1].view(len(size), -1)
    size = size.gather(1, kept)
    return kept, mass.gather(1, wide(kept)) / size.unsqueeze(-1), size


class ToMe:
    """The rule for a pruning layer; between the layers attention is proportional to the tokens' sizes."""

    def __init__(self, heads: int):
        self.heads, self.size = heads, None

    def __call__(self, stage, keep: int, block: int):
        n, tokens, width = stage.keys.shape
        keys = stage.keys.view(n, tokens, self.heads, width // self.heads).mean(2)
        size = torch.ones(n, tokens) if self.size is None else self.size
        places, states = torch.arange(tokens).expand(n, -1), stage.hidden
        while (gone := size.shape[1] - 1 - keep) > 0:  # at most half at once: several rounds where more have to go
            r = min(gone, (size.shape[1] - 1) // 2)
            mass = torch.cat([states, keys], -1)
            kept, mass, size = merged(keys, mass, size, r)
            states, keys = mass.split([width, keys.shape[-1]], -1)
            places = places.gather(1, kept)
        self.size = size
        return places, states

    @contextmanager
    def proportional(self, model: nn.Module) -> Iterator[None]:
        """softmax(scores + log size): in tiny-vit applied to the probabilities, in DINOv2 given as a mask."""

        def weigh(module, args, probabilities):
            if self.size is None:
                return None
            weighted = probabilities * self.size[:, None, None]
            return weighted / weighted.sum(-1, keepdim=True)

        def mask(module, args, kwargs):
            if self.size is None:
                return None
            return args, kwargs | {"attention_mask": self.size.log()[:, None, None]}

        def forget(module, args, kwargs):
            self.size = None

        with ExitStack() as stack:
            stack.callback(model.register_forward_pre_hook(forget, with_kwargs=True).remove)
            for name, module in model.named_modules():
                if name.endswith("attn.weights"):
                    stack.callback(module.register_forward_hook(weigh).remove)
                elif name.endswith(".attention"):
                    stack.callback(module.register_forward_pre_hook(mask, with_kwargs=True).remove)
            yield


def rule(method, arm: str, inputs: Tensor, *, depth: int, patch: int, generator: torch.Generator):
    """What the arm does in a pruning layer: a function of (stage, patches to keep, block)."""
    grid = inputs.unfold(2, patch, patch).unfold(3, patch, patch)  # [N, C, rows, columns, patch, patch]
    worth = {"ink": grid.mean((1, 4, 5)), "contrast": grid.std((4, 5)).mean(1)}.get(arm)
    settings = {
        "uniform start": {"boost": False},
        "WPR + EIR + VHF": {"share": 0.0},
        "WPR + EIR": {"share": 0.0, "limits": method.ANY},
        "WPR": {"share": 0.0, "limits": method.ANY, "emphasise": False},
    }.get(arm, {})

    def simple(stage, keep: int, block: int) -> Tensor:
        if worth is not None:
            scores = worth.flatten(1).gather(1, stage.places[:, 1:] - 1)
        elif arm == "CLS attention":
            scores = stage.attention[:, :, 0, 1:].mean(1)
        elif arm == "one vote":
            scores = stage.attention.mean((1, 2))[:, 1:]
        elif arm == "upside down":  # what the I-stage finds least important stays
            s = method.wpr(stage.attention, method.votes(block - 1, depth))
            scores = -method.together(s, method.passing(s))[:, 1:]
        else:
            scores = torch.rand(stage.places[:, 1:].shape, generator=generator)
            if arm == "inked by lot":  # any that hold something; blank ones only when these do not suffice
                scores += grid.amax((1, 4, 5)).flatten(1).gather(1, stage.places[:, 1:] - 1) > 0
        return best_of(scores, keep, method)

    def graph(stage, keep: int, block: int) -> Tensor:
        if arm == "S by lot":
            stage = stage._replace(keys=torch.randn(stage.keys.shape, generator=generator))
        return method.zero_tprune(stage, keep, iterations=method.votes(block - 1, depth), **settings)[1]

    def mixed(stage, keep: int, block: int) -> Tensor:
        """In the first layer chance, further up the whole method."""
        return (graph if stage.places.shape[1] <= grid[0, 0, ..., 0, 0].numel() else simple)(stage, keep, block)

    return mixed if arm == "first by lot" else graph if arm in GRAPHS else simple


# cost


def own_macs(method, arm: str, before: int, keep: int, block: int, *, depth=6, heads=4, width=64) -> int:
    """Multiply-adds of a rule itself in one pruning layer; what ranks by CLS attention, ink or chance is free."""
    if arm == "first by lot":
        arm = "full" if before < 49 else "random 0"
    tokens, half, iterations = before + 1, before // 2, method.votes(block - 1, depth)
    if arm == "ToMe":
        found = 0
        while tokens - 1 > keep:
            found += (tokens // 2) * (tokens - tokens // 2) * (width // heads)
            tokens -= min(tokens - 1 - keep, (tokens - 1) // 2)
        return found
    if arm == "one vote":
        return heads * tokens**2
    if arm == "upside down" or arm in GRAPHS[3:]:
        return iterations * heads * tokens**2
    if arm not in GRAPHS:
        return 0
    r = min(round(0.5 * (before - keep)), half)
    matching = heads * tokens**2 + half * (before - half) * width if r else 0
    return matching + iterations * heads * (tokens - r) ** 2


def cost(method, arm: str, case: tuple) -> float:
    """Multiply-adds of the six blocks and of the rule, as a share of the unpruned blocks'."""
    from nbkit import sparsity

    counts, patches, own = method.schedule(case[1], 49, case[2]), [49], 0
    for block in range(6):
        patches.append(counts.get(block, patches[-1]))
        own += own_macs(method, arm, patches[-2], patches[-1], block) if block in counts else 0
    whole, total = (
        sparsity.transformer_macs([p + 1 for p in entered], width=64, hidden=256).sum()
        for entered in ([49] * 6, patches[1:])
    )
    return round(float((total + own) / whole), 4)


def finished(rows: list[dict]) -> pd.DataFrame:
    """The stored rows with the accuracy of the unpruned network beside each, and the cost."""
    method, table = the_method(), pd.DataFrame(rows)
    whole = table[table["arm"] == "dense"].set_index("seed")["accuracy"]
    cases = {(name, rate): case for name, group in CASES.items() for case in group for rate in [case[1]]}
    table = table[table["arm"] != "dense"].reset_index(drop=True)
    table.insert(5, "dense", table["seed"].map(whole))
    found = zip(table["arm"], table["setting"], table["rate"], strict=True)
    table["multiply-adds"] = [cost(method, arm, cases[name, rate]) for arm, name, rate in found]
    return table.round({"cosine": 6})


# tiny-vit


def garments(seed: int, arm: str, tested: int = TESTED) -> list[dict]:
    """A row a setting and keep rate: accuracy, cosine, and the right images as a text of 0 and 1."""
    from nbkit import datasets, models

    method, data = the_method(), datasets.load("fashion-mnist")
    model = models.load("tiny-vit", seed=seed).eval()
    generator = torch.Generator().manual_seed(1000 * seed + ARMS.index(arm))
    cosine, right = defaultdict(list), defaultdict(list)
    for start in range(0, tested, 100):
        images, y = data.x_test[start : start + 100], data.y_test[start : start + 100]
        with torch.no_grad(), hooks.record(model, "norm", concat=False) as acts:
            logits = model(images)
            whole = acts["norm"][:, 0]
            for case in itertools.chain(*CASES.values()) if arm != "dense" else [("whole", 1.0, ())]:
                if arm != "dense":
                    logits = garment_logits(method, arm, model, images, case, generator)
                cosine[case].append(F.cosine_similarity(acts["norm"][:, 0], whole))
                right[case].append(logits.argmax(1) == y)
    rows = []
    for case, parts in right.items():
        hits = torch.cat(parts)
        row = {"seed": seed, "setting": case[0], "rate": case[1], "arm": arm}
        row |= {"accuracy": round(hits.float().mean().item(), 4), "cosine": torch.cat(cosine[case]).mean().item()}
        rows.append(row | {"right": "".join(map(str, hits.int().tolist()))})
    return rows


def garment_logits(method, arm: str, model, images: Tensor, case: tuple, generator: torch.Generator) -> Tensor:
    counts = method.schedule(case[1], 49, case[2])
    if arm != "ToMe":
        how = rule(method, arm, images, depth=6, patch=4, generator=generator)
        return method.prune(model, images, counts, how)[0]
    tome = ToMe(4)
    with tome.proportional(model):
        return method.prune(model, images, counts, tome)[0]


def heads(seed: int, images: int = 500) -> list[dict]:
    """A row a block of the unpruned network: share of heads below, inside and above the limits, of images without one
    inside, the mean variance, and the mean rank correlation of importance with the ink of the patches."""
    from nbkit import attribution, datasets, models

    method, x = the_method(), datasets.load("fashion-mnist").x_test[:images]
    model, rows = models.load("tiny-vit", seed=seed).eval(), []
    found = attribution.attention_probabilities(model, x, layers="blocks.*.attn.weights")
    ink = pd.DataFrame(F.avg_pool2d(x, 4).flatten(1).numpy())
    for block, attention in enumerate(found):
        s = method.wpr(attention, method.votes(block, len(found)))
        variance, passed = s.var(-1, correction=0), method.passing(s)
        low, high = 0.01, 0.7
        row = {"seed": seed, "block": block, "iterations": method.votes(block, len(found))}
        row |= {"below": (variance < low).float().mean().item(), "inside": passed.float().mean().item()}
        row |= {"above": (variance > high).float().mean().item()}
        row |= {"none": (~passed.any(-1)).float().mean().item(), "variance": variance.mean().item()}
        importance = pd.DataFrame(method.together(s, passed)[:, 1:].numpy())
        rows.append(row | {"ink": importance.corrwith(ink, axis=1, method="spearman").mean()})
    return [{k: round(v, 4) for k, v in row.items()} for row in rows]


# DINOv2


def photographs(rate: float, photos: int = PHOTOS) -> list[dict]:
    """A row a photograph and arm: cosine of the pruned class token's feature with the whole one."""
    from nbkit import datasets, models

    method, rows = the_method(), []
    model = models.load("dinov2-small", attn_implementation="eager").eval()
    pictures = models.transform("dinov2-small", size=224)(datasets.load("imagenet-sample"))[-photos:]
    counts = method.schedule(rate, 256, (3, 6, 9))
    generator = torch.Generator().manual_seed(round(100 * rate))
    for first, x in zip(range(0, photos, 2), pictures.split(2), strict=True):
        with torch.no_grad():
            whole = model(x).pooler_output
        for arm in PHOTO_ARMS:
            if arm == "ToMe":
                tome = ToMe(6)
                with tome.proportional(model):
                    output, _ = method.prune(model, x, counts, tome, method.DINO)
            else:
                how = rule(method, arm, x, depth=12, patch=14, generator=generator)
                output, _ = method.prune(model, x, counts, how, method.DINO)
            cosine = F.cosine_similarity(output.pooler_output, whole).tolist()
            rows += [{"rate": rate, "photo": i, "arm": arm, "cosine": round(c, 4)} for i, c in enumerate(cosine, first)]
    return rows


def build(out: Path, work: Path, seeds: int) -> list[Path]:
    from nbkit import runtime

    runtime.deterministic(seed=0)
    kept = Work(work)
    rows = []
    for seed, arm in itertools.product(range(seeds), ARMS):
        rows += kept.once(f"garments-{seed}-{arm}", partial(garments, seed, arm))
    table = finished(rows)
    bits = np.array([[int(c) for c in text] for text in table.pop("right")], dtype=np.uint8)
    share = [row for seed in range(seeds) for row in kept.once(f"heads-{seed}", partial(heads, seed))]
    photos = [row for rate in PHOTO_RATES for row in kept.once(f"photos-{rate}", partial(photographs, rate))]
    wide = pd.DataFrame(photos).pivot(index=["rate", "photo"], columns="arm", values="cosine")
    write_table(out / "results.csv", table)
    write_table(out / "heads.csv", pd.DataFrame(share))
    write_table(out / "photos.csv", wide[list(PHOTO_ARMS)].reset_index())
    write_tensors(out / "right.safetensors", {"right": torch.from_numpy(np.packbits(bits, axis=1))})
    return [out / name for name in ("results.csv", "heads.csv", "photos.csv", "right.safetensors")]


if __name__ == "__main__":
    run(build, __doc__, work=work_option("zero-tprune"), seeds=seeds_option(3))
