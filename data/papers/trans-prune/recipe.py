"""All tables of this folder: what notebooks/07-lean-transformers/09-trans-prune measures beforehand.

Tokens are pruned before three blocks by the same staircase under every rule. Pictures: three tiny-vit on 1,000 test
images of fashion-mnist (accuracy, which images were right, how many of the kept patches are blank), DINOv2 on 20
photographs (cosine of the class token's feature with the whole network's). Text: SmolLM2 on 18 articles of lee (nats a
token of the answer, and where in the article the kept tokens stand). About 9 minutes on one core; a run that was
stopped goes on where it was (delete the folder --work for a fresh start). The rule is the notebook's method cells.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nbkit import hooks
from nbkit.recipes import Work, run, seeds_option, work_option, write_table, write_tensors

LOT = ("random 0", "random 1", "random 2")
MAIN = ("TTV + IGA", "TTV", "IGA", *LOT)
ALL = (*MAIN, "magnitude", "direction", "TTV, last layer", "norm", "TTV + IGA, code")
PARTS = ("IGA + magnitude", "IGA + direction")
GARMENT_ARMS = (*ALL, *PARTS, "TTV, code", "ink", "least ink", "TTV upside down")
PHOTO_ARMS = (*ALL, *PARTS, "contrast")
TEXT_ARMS = (*MAIN, "last token", "recency")
EVERY_TEXT_ARM = (*ALL, "last token", "recency", "own positions")

GARMENTS = {  # setting, share left -> the blocks before which tokens go, the arms
    ("early", 0.5): ((1, 2, 3), GARMENT_ARMS),
    ("early", 0.125): ((1, 2, 3), GARMENT_ARMS),
    ("early", 0.05): ((1, 2, 3), GARMENT_ARMS),
    ("middle", 0.125): ((2, 3, 4), (*MAIN, "magnitude", "ink", "least ink")),
}
PHOTO_SHARES = (0.5, 0.125)
TEXTS = {("quote", 0.5): EVERY_TEXT_ARM, ("quote", 0.75): TEXT_ARMS, ("continue", 0.125): TEXT_ARMS}
TEXT_BLOCKS, TEXT_COLLECT = (7, 8, 11), (6, 7, 8, 9, 10)
TESTED, ARTICLES, BINS = 1000, 18, 10


def the_method():
    from nbkit import papers

    return papers.method("trans-prune")


@cache
def loaded(name: str) -> nn.Module:
    from nbkit import models

    return models.load(name, **({"attn_implementation": "eager"} if name == "dinov2-small" else {}))


def rule(method, arm: str, *, worth: Tensor | None = None, generator: torch.Generator | None = None):
    """The score of an arm, a function of what a pruning layer knows; ``worth`` [N, tokens that may go] is the ink."""
    arm = arm.removesuffix(", code")

    def score(stage) -> Tensor:
        if arm.startswith("random"):
            return torch.rand(stage.places.shape, generator=generator)
        if arm in PARTS:
            return method.share(method.iga(stage)) + method.share(method.CRITERIA[arm.split()[-1]](stage))
        if arm in ("ink", "contrast", "least ink"):
            return worth.gather(1, stage.places - 1) * (-1 if arm == "least ink" else 1)
        if arm == "TTV upside down":
            return -method.ttv(stage)
        return method.CRITERIA["TTV + IGA" if arm == "own positions" else arm](stage)

    return score


def how(method, arm: str) -> dict:
    return {"variant": "code" if arm.endswith("code") else "paper", "renumber": arm != "own positions"}


# pictures


def garments(seed: int, setting: str, share: float, arm: str, tested: int = TESTED) -> dict:
    """Accuracy, the share of the kept patches that hold nothing, and the right images as a text of 0 and 1."""
    from nbkit import datasets, models

    method, data = the_method(), datasets.load("fashion-mnist")
    model, (blocks, _) = models.load("tiny-vit", seed=seed), GARMENTS.get((setting, share), ((), ()))
    generator = torch.Generator().manual_seed(1000 * seed + 100 * LOT.index(arm) if arm in LOT else 0)
    right, blank = [], []
    for images, y in zip(data.x_test[:tested].split(100), data.y_test[:tested].split(100), strict=True):
        ink = F.avg_pool2d(images, 4).flatten(1)  # [N, 49]
        if arm == "dense":
            with torch.no_grad():
                logits, places = model(images), torch.arange(1, 50).expand(len(images), -1)
        else:
            counts = method.schedule(share, 49, blocks)
            collect = range(blocks[0] - 1, blocks[-1])
            score = rule(method, arm, worth=ink, generator=generator)
            spans = {"free": (1, 50), "asking": (0, 1), "collect": collect}
            logits, kept = method.prune(model, images, counts, score, kind=method.TINY, **spans, **how(method, arm))
            places = kept[blocks[-1]][:, 1:]
        right.append(logits.argmax(1) == y)
        blank.append((ink.gather(1, places - 1) == 0).float().mean(1))
    hits = torch.cat(right)
    row = {"seed": seed, "setting": setting, "share": share, "arm": arm}
    row |= {"accuracy": round(hits.float().mean().item(), 4), "blank": round(torch.cat(blank).mean().item(), 4)}
    return row | {"right": "".join(map(str, hits.int().tolist()))}


def photographs(share: float, arm: str) -> list[float]:
    """The cosine of every photograph's pruned and whole class token."""
    method, model = the_method(), loaded("dinov2-small")
    pictures, whole = photos()
    counts = method.schedule(share, 256, (4, 5, 6))
    generator = torch.Generator().manual_seed(LOT.index(arm) if arm in LOT else 0)
    spans, found = {"free": (1, 257), "asking": (0, 1), "collect": (3, 4, 5)}, []
    for x in pictures.split(4):
        contrast = x.unfold(2, 14, 14).unfold(3, 14, 14).std((4, 5)).mean(1).flatten(1)
        score = rule(method, arm, worth=contrast, generator=generator)
        output, _ = method.prune(model, x, counts, score, kind=method.DINO, **spans, **how(method, arm))
        found.append(output.pooler_output)
    return [round(c, 4) for c in F.cosine_similarity(torch.cat(found), whole).tolist()]


@cache
def photos() -> tuple[Tensor, Tensor]:
    """The photographs [20, 3, 224, 224], and the class token's features that the whole network gives."""
    from nbkit import datasets, models

    pictures = models.transform("dinov2-small", size=224)(datasets.load("imagenet-sample"))
    with torch.no_grad():
        return pictures, torch.cat([loaded("dinov2-small")(x).pooler_output for x in pictures.split(4)])


# text

Prompt = namedtuple("Prompt", "ids free asking answer")


def prompt(tokenizer, text: str, at: int | None = None, context: int = 96) -> Prompt:
    """A chat, ids [1, T]: the start of an article, an instruction, 24 tokens of answer; spans of the first two.

    ``at`` is where a cue of 6 tokens begins, with which the instruction ends and after which the answer quotes the
    article; ``None``: the answer is how the article goes on. Raises: ValueError.
    """
    words = tokenizer(text).input_ids
    first = context if at is None else at + 6
    if len(words) < context or first + 24 > (len(words) if at is None else context) or first < 6:
        raise ValueError(f"{len(words)} tokens: a context of {context} and a cue at {at} do not fit")
    task = "Continue" if at is None else "Quote"
    start = tokenizer("<|im_start|>user\n").input_ids
    ask = tokenizer(f"\n\n{task} the article.<|im_end|>\n<|im_start|>assistant\n").input_ids
    ask = ask + ([] if at is None else words[at:first])
    ids = start + words[:context] + ask + words[first : first + 24]
    free = (len(start), len(start) + context)
    return Prompt(torch.tensor([ids]), free, (free[1], len(ids) - 24), 24)


def nll(output, given: Prompt) -> float:
    """Nats a token of the answer, in the mean."""
    logits = output.logits[0, -given.answer - 1 : -1]
    return F.cross_entropy(logits, given.ids[0, -given.answer :]).item()


def articles(tokenizer, n: int = ARTICLES) -> list[str]:
    """The first texts of at least 140 tokens."""
    from nbkit import datasets

    return [t for t in datasets.load("lee").texts if len(tokenizer(t).input_ids) >= 140][:n]


def cue(article: int) -> int:
    """Where the quotation of an article begins: evenly spread, in an order that has nothing to do with the texts."""
    return (article * 7 % ARTICLES) * 66 // (ARTICLES - 1)


@contextmanager
def head_start(model: nn.Module, ids: Tensor, block: int) -> Iterator[None]:
    """Inside, the blocks before this one give what they give for ``ids``, without being computed again."""
    with torch.no_grad(), hooks.record(model, f"model.layers.{block - 1}") as acts:
        model(input_ids=ids, logits_to_keep=1)
    states, layers = acts[f"model.layers.{block - 1}"], model.model.layers[:block]
    for layer in layers:
        layer.forward = lambda hidden_states, **others: states
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def text(task: str, share: float, article: int) -> list[dict]:
    """A row an arm: nats a token of the answer, how many kept tokens stand in each tenth of the article."""
    from nbkit import models

    method, model, tokenizer = the_method(), loaded("smollm2"), models.tokenizer("smollm2")
    given = prompt(tokenizer, articles(tokenizer)[article], cue(article) if task == "quote" else None)
    inputs = {"input_ids": given.ids, "logits_to_keep": given.answer + 1}
    tokens = given.free[1] - given.free[0]
    counts = method.schedule(share, tokens, TEXT_BLOCKS)
    spans, rows = {"free": given.free, "asking": given.asking, "collect": TEXT_COLLECT}, []
    base = {"task": task, "share": share, "article": article}
    with head_start(model, given.ids, TEXT_COLLECT[0]):
        with torch.no_grad():
            rows.append(base | {"arm": "dense", "nll": nll(model(**inputs), given)})
        for arm in TEXTS[task, share]:
            generator = torch.Generator().manual_seed(1000 * article + (LOT.index(arm) if arm in LOT else 0))
            score = rule(method, arm, generator=generator)
            output, kept = method.prune(
                model, inputs, counts, score, kind=method.LLAMA, **spans, **how(method, arm)
            )
            at = kept[TEXT_BLOCKS[-1]][0] - given.free[0]
            at = at[(at >= 0) & (at < tokens)]
            bins = np.bincount(at.numpy() * BINS // tokens, minlength=BINS)
            row = base | {"arm": arm, "nll": nll(output, given)}
            rows.append(row | {f"tenth {i}": int(n) for i, n in enumerate(bins)})
    return [row | {"nll": round(row["nll"], 4)} for row in rows]


# what the tables say


def distance(counts: np.ndarray, context: int = 96) -> float:
    """Total variation between the tenths that kept tokens stand in, [articles, 10], and those of all tokens."""
    even = np.bincount(np.arange(context) * BINS // context) / context
    return float(abs(counts.sum(0) / counts.sum() - even).sum() / 2)


def swapped(ours: np.ndarray, theirs: np.ndarray, draws: int = 2000, seed: int = 0) -> float:
    """How often, labels exchanged within articles by lot, ours is as much nearer to an even spread as it is."""
    gaps = [distance(theirs) - distance(ours)]
    for flip in np.random.default_rng(seed).random((draws, len(ours), 1)) < 0.5:
        gaps.append(distance(np.where(flip, ours, theirs)) - distance(np.where(flip, theirs, ours)))
    return float(np.mean(np.array(gaps) >= gaps[0] - 1e-12))


def cases(results: pd.DataFrame, bits: np.ndarray, cosines: pd.DataFrame, texts: pd.DataFrame) -> dict:
    """{case: a row a (group, image, photograph or article), a column a rule}; higher is better, text in nats below 0.

    Groups are the networks, all photographs, and three splits of six articles; "random" is the mean of the draws.
    """
    index = pd.MultiIndex.from_frame(results[["setting", "share", "seed", "arm"]])
    hits = pd.DataFrame(100.0 * bits, index=index).stack().unstack("arm").sort_index()
    whole = hits.loc["whole", 1.0]["dense"]
    found = {f"tiny-vit, {setting}, {share}": hits.loc[setting, share] for setting, share in GARMENTS}
    found = {case: rows.assign(whole=whole) for case, rows in found.items()}
    for share, rows in cosines.groupby("share", sort=False):
        found[f"DINOv2, {share}"] = rows.set_index(["share", "photo"]).assign(whole=1.0)
    wide = -texts.pivot(index=["task", "share", "article"], columns="arm", values="nll")
    for task, share in TEXTS:
        rows = wide.loc[task, share].rename(columns={"dense": "whole"})
        found[f"{task}, {share}"] = rows.set_axis(pd.MultiIndex.from_arrays([rows.index // 6, rows.index]))
    return {case: rows.assign(random=rows[list(LOT)].mean(axis=1)) for case, rows in found.items()}


def lead(rows: pd.DataFrame, ours: str, rival: str) -> dict:
    """By how much a rule is ahead of another, whether it passes the notebook's test, and how often it is ahead."""
    gap = rows[ours] - rows[rival]
    groups, units = gap.groupby(level=0).mean(), gap.groupby(level=1).mean()
    passed = (groups > 0).all() and units.mean() >= 2 * units.sem() > 0
    if len(groups) == 1:  # photographs
        passed = (units > 0).sum() >= 15
    return {
        "lead": round(units.mean(), 4), "error": round(units.sem(), 4), "groups ahead": int((groups > 0).sum()),
        "units ahead": int((units > 0).sum()), "passed": bool(passed),
    }  # fmt: skip


def leads(found: dict) -> pd.DataFrame:
    """A row a case and pair of rules that a claim compares."""
    pairs = [("TTV", "random"), ("TTV + IGA", "random"), ("IGA", "random"), ("TTV + IGA", "IGA"), ("TTV", "IGA")]
    pairs += [("TTV + IGA", part) for part in PARTS] + [("TTV", "TTV, last layer")]
    rows = [
        {"case": case, "ours": ours, "rival": rival} | lead(table, ours, rival)
        for case, table in found.items()
        for ours, rival in pairs
        if {ours, rival} <= set(table) and table[[ours, rival]].notna().all(axis=None)
    ]
    return pd.DataFrame(rows)


def means(found: dict) -> pd.DataFrame:
    """A row a case, group and rule: accuracy in per cent, cosine, nats, and what is lost of the whole network's."""
    rows = [
        {"case": case, "group": group, "arm": arm, "value": round(abs(value), 4), "lost": round(whole - value, 4)}
        for case, table in found.items()
        for arm in table.columns.drop(["dense", *LOT], errors="ignore")
        for group, (value, whole) in enumerate(table.groupby(level=0)[[arm, "whole"]].mean().values)
        if value == value
    ]
    return pd.DataFrame(rows)


def uneven(places: pd.DataFrame) -> pd.DataFrame:
    """A row a task, share left and rule: distance to an even spread, and how often by lot IGA is as much farther."""
    counts = places.set_index(["task", "share", "arm", "article"]).sort_index()
    rows = []
    for (task, share, arm), mine in counts.groupby(level=[0, 1, 2], sort=False):
        lot = swapped(mine.values, counts.loc[task, share, "IGA"].values)
        row = {"task": task, "share": share, "arm": arm}
        rows.append(row | {"distance": round(distance(mine.values), 4), "by lot": lot})
    return pd.DataFrame(rows)


def cost(counts: dict, free: int, others: int, depth: int, asking: int, **sizes) -> tuple[float, float]:
    """Multiply-adds of all blocks, and of IGA's own queries, keys and products: shares of the whole network's."""
    from nbkit import sparsity

    entering = pd.Series(counts).reindex(range(depth)).ffill().fillna(free).astype(int) + others
    whole = sparsity.transformer_macs([free + others] * depth, **sizes).sum()
    a_token = sizes["width"] * (sizes["width"] + sizes.get("key_width", sizes["width"]) + asking)
    own = a_token * sum(entering[block - 1] for block in counts)
    return sparsity.transformer_macs([*entering], **sizes).sum() / whole, own / whole


def costs() -> pd.DataFrame:
    """A row a network and share left, of a prompt of 118 tokens and of pictures."""
    method, rows = the_method(), []
    sizes = {
        "tiny-vit": ((1, 2, 3), 49, 1, 6, 1, {"width": 64, "hidden": 256}),
        "DINOv2": ((4, 5, 6), 256, 1, 12, 1, {"width": 384, "hidden": 1536}),
        "SmolLM2": (TEXT_BLOCKS, 96, 22, 30, 19, {"width": 576, "hidden": 1536, "key_width": 192, "gated": True}),
    }
    for (name, (blocks, free, others, depth, asking, size)), share in product(sizes.items(), (0.75, 0.5, 0.125, 0.05)):
        counts = method.schedule(share, free, blocks)
        left, own = cost(counts, free, others, depth, asking, **size)
        rows.append({"network": name, "share": share, "left": round(left, 4), "IGA adds": round(own, 4)})
    return pd.DataFrame(rows)


def build(out: Path, work: Path, seeds: int) -> list[Path]:
    from nbkit import runtime

    runtime.deterministic(seed=0)
    kept = Work(work)
    rows = [
        kept.once(f"garments-{seed}-{setting}-{share}-{arm}", partial(garments, seed, setting, share, arm))
        for (setting, share), (_, arms) in {("whole", 1.0): ((), ("dense",)), **GARMENTS}.items()
        for arm, seed in product(arms, range(seeds))
    ]
    cosines = pd.DataFrame(
        {(share, arm): kept.once(f"photos-{share}-{arm}", partial(photographs, share, arm))
         for share, arm in product(PHOTO_SHARES, PHOTO_ARMS)}
    )  # fmt: skip
    cosines = cosines.rename_axis("photo").stack(0, future_stack=True).rename_axis(["photo", "share"]).reset_index()
    texts = [
        row
        for (task, share), article in product(TEXTS, range(ARTICLES))
        for row in kept.once(f"text-{task}-{share}-{article}", partial(text, task, share, article))
    ]
    texts = pd.DataFrame(texts)
    tenths = [f"tenth {i}" for i in range(BINS)]
    places = texts[texts["arm"] != "dense"].drop(columns="nll").astype(dict.fromkeys(tenths, int))
    table = pd.DataFrame(rows)
    bits = np.array([[int(c) for c in found] for found in table.pop("right")], dtype=np.uint8)
    found = cases(table, bits, cosines, texts)
    tables = {"results": table, "photos": cosines, "text": texts.drop(columns=tenths), "places": places}
    tables |= {"leads": leads(found), "means": means(found), "uneven": uneven(places), "costs": costs()}
    for name, content in tables.items():
        write_table(out / f"{name}.csv", content)
    write_tensors(out / "right.safetensors", {"right": torch.from_numpy(np.packbits(bits, axis=1))})
    return [*(out / f"{name}.csv" for name in tables), out / "right.safetensors"]


if __name__ == "__main__":
    run(build, __doc__, work=work_option("trans-prune"), seeds=seeds_option(3, "networks"))
