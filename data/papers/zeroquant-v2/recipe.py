"""All tables of this folder: what notebooks/07-lean-transformers/07-zeroquant-v2 measures beforehand.

How far quantized weights move the outputs of MiniLM (50 Lee texts) and DINOv2 (40 Fashion-MNIST images): rounding,
GPTQ (MiniLM, three calibration splits), finer blocks, LoRC of several ranks and random corrections at 4, 3 and 2 bits;
8-bit activations against 8-bit weights, in SmolLM2 as well; and what LoRC or blocks remove of the error of every
matrix. About 6 minutes on one core; a run that was stopped goes on where it was (delete the folder --work for a fresh
start). The functions are the notebook's method cells.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from nbkit.recipes import Work, part_option, run, work_option, write_table

BITS = (4, 3, 2)
LOW = (3, 2)  # bits at which every matrix is looked at
DRAWS = 3  # random corrections; calibration splits
CALIBRATION = 32  # texts a split
TOKENS = 64  # of every text
IMAGES = 40
READOUT = 300  # training images of the linear readout
MODELS = {"MiniLM": "minilm", "DINOv2": "dinov2-small", "SmolLM2": "smollm2"}
MIXES = ((8, 16), (16, 8), (8, 8), (4, 8))  # bits of weights and of activations


@functools.cache
def parts(name: str):
    """The notebook's method cells, the model, its linear layers and their weights."""
    from nbkit import models, papers

    method, model = papers.method("zeroquant-v2"), models.load(MODELS[name])
    return method, model, {n: model.get_submodule(n).weight.detach() for n in method.linears(model)}


@functools.cache
def texts(split: int | None = None) -> dict:
    """The first tokens of the 50 texts that people compared, or of a split of the others, for calibration."""
    from nbkit import datasets, models

    lee = datasets.load("lee")
    chosen = lee.test if split is None else lee.texts[CALIBRATION * split : CALIBRATION * (split + 1)]
    read = models.tokenizer("minilm")
    return dict(read(list(chosen), padding=True, truncation=True, max_length=TOKENS, return_tensors="pt"))


@functools.cache
def pictures(n: int, train: bool = False):
    """n Fashion-MNIST images as DINOv2 takes them, and their classes."""
    from nbkit import datasets, models

    data = datasets.load("fashion-mnist")
    x, y = (data.x_train, data.y_train) if train else (data.x_test, data.y_test)
    return models.transform("dinov2-small", size=112, resize=112)(x[:n]), y[:n]


def class_tokens(pixels):
    """[N, D], what DINOv2 makes of pictures."""
    import torch

    _, model, _ = parts("DINOv2")
    with torch.no_grad():
        return model(pixel_values=pixels).last_hidden_state[:, 0]


def vectors(name: str):
    """[N, D], what the model makes of each text or image."""
    import torch

    from nbkit import models

    if name == "DINOv2":
        return class_tokens(pictures(IMAGES)[0])
    with torch.no_grad():
        return models.mean_pool(parts(name)[1](**texts()), texts()["attention_mask"])


@functools.cache
def reference(name: str):
    """The same by the full-precision model."""
    return vectors(name)


@functools.cache
def readout():
    """A linear classifier of DINOv2's class tokens, fitted at full precision."""
    from sklearn.linear_model import RidgeClassifier

    x, y = pictures(READOUT, train=True)
    return RidgeClassifier(alpha=100.0).fit(class_tokens(x).numpy(), y.numpy())


def task(name: str, found) -> float:
    """Spearman correlation with people's judgements of similarity, or accuracy of the readout."""
    import torch
    from scipy.stats import spearmanr

    from nbkit import datasets

    if name == "DINOv2":
        return float(readout().score(found.numpy(), pictures(IMAGES)[1].numpy()))
    unit = torch.nn.functional.normalize(found, dim=1)
    pairs = np.triu_indices(len(found), 1)
    return float(spearmanr((unit @ unit.T).numpy()[pairs], datasets.load("lee").similarity[pairs]).statistic)


def damage(name: str, found) -> np.ndarray:
    """1 - cosine of every text or image."""
    import torch

    return 1 - torch.nn.functional.cosine_similarity(found.double(), reference(name).double()).numpy()


def judged(name: str, matrices: dict) -> dict:
    method, model, _ = parts(name)
    with method.holding(model, matrices):
        found = vectors(name)
    return {"loss": float(f"{damage(name, found).mean():.5g}"), "task": round(task(name, found), 4)}


def size(name: str, bits: int, **settings) -> float:
    """Bits a weight over all matrices."""
    method, _, weights = parts(name)
    total = sum(w.numel() * method.bits_a_weight(w.shape, bits, **settings) for w in weights.values())
    return round(total / sum(w.numel() for w in weights.values()), 4)


def row(name: str, base: str, bits: int, block: int, kind: str, draw: int, matrices: dict, **factors) -> dict:
    stored = size(name, bits, block=block or None, **factors)
    labels = {"model": name, "base": base, "bits": bits, "block": block, "correction": kind}
    labels |= {"rank": factors.get("rank", 0), "factor_bits": factors.get("factor_bits", 16), "draw": draw}
    return labels | {"size": stored, **judged(name, matrices)}


def on_random_directions(E, rank: int, seed: int):
    """U [o, m], V [m, i]: the error of a matrix on ``rank`` random directions of its inputs."""
    import torch

    noise = torch.randn(E.shape[1], rank, generator=torch.Generator().manual_seed(seed))
    directions = torch.linalg.qr(noise).Q
    return E @ directions, directions.T


def corrected(name: str, quantized: dict, kind: str, rank: int, draw: int = 0, factor_bits: int = 16) -> dict:
    """Quantized matrices plus LoRC, or a random correction of the same rank."""
    method, _, weights = parts(name)
    made = {}
    for place, (n, W) in enumerate(weights.items()):
        E = W - quantized[n]
        if kind == "LoRC":
            U, V = method.lorc(E, rank, factor_bits=factor_bits)
        else:
            U, V = method.stored(*on_random_directions(E, rank, seed=1000 * draw + place), factor_bits)
        made[n] = quantized[n] + U @ V
    return made


def full(name: str) -> list[dict]:
    """The row of the model as it is."""
    labels = {"model": name, "base": "full", "bits": 32, "block": 0, "correction": "none", "rank": 0}
    quality = {"size": 32.0, "loss": 0.0, "task": round(task(name, reference(name)), 4)}
    return [labels | {"factor_bits": 16, "draw": 0} | quality]


def rounded(name: str, bits: int, block: int) -> list[dict]:
    """Rows of one grid: as it is, with LoRC, with random corrections."""
    method, _, weights = parts(name)
    quantized = {n: method.rtn(W, bits, block=block or None) for n, W in weights.items()}
    rows = [row(name, "RTN", bits, block, "none", 0, quantized)]
    wanted = {0: [(4, 16), (8, 16), (16, 16), (32, 16), (8, 8)], 128: [(8, 8)], 64: [(8, 16)]}
    for rank, factor_bits in wanted.get(block, []) if bits < 8 else []:
        made = corrected(name, quantized, "LoRC", rank, factor_bits=factor_bits)
        rows.append(row(name, "RTN", bits, block, "LoRC", 0, made, rank=rank, factor_bits=factor_bits))
    for draw in range(DRAWS) if (block == 0 and bits < 8) or (block, bits) == (64, 4) else ():
        made = corrected(name, quantized, "random", 8, draw)
        rows.append(row(name, "RTN", bits, block, "random", draw, made, rank=8))
    return rows


@functools.cache
def hessians(split: int) -> dict:
    method, model, weights = parts("MiniLM")
    batch = texts(split)
    return method.hessians(model, list(weights), batch, batch["attention_mask"].bool())


def calibrated(bits: int, split: int) -> list[dict]:
    """The same after GPTQ, of MiniLM: per row, with LoRC and a random correction, and in blocks of 64."""
    method, _, weights = parts("MiniLM")
    H = hessians(split)
    by_row = {n: method.gptq(W, H[n], bits) for n, W in weights.items()}
    blocks = {n: method.gptq(W, H[n], bits, block=64) for n, W in weights.items()}
    rows = [row("MiniLM", "GPTQ", bits, block, "none", split, q) for block, q in ((0, by_row), (64, blocks))]
    for kind in ("LoRC", "random"):
        made = corrected("MiniLM", by_row, kind, 8, split)
        rows.append(row("MiniLM", "GPTQ", bits, 0, kind, split, made, rank=8))
    return rows


def mixed(name: str, weight_bits: int, activation_bits: int, symmetric: bool) -> dict:
    """Damage of every text or image with quantized weights, activations or both; 16 bits: as they are."""
    from nbkit import hooks

    method, model, weights = parts(name)
    made = {} if weight_bits == 16 else {n: method.rtn(W, weight_bits, symmetric=symmetric) for n, W in weights.items()}
    one = None if activation_bits == 16 else method.per_token(activation_bits, symmetric)
    edits = nullcontext() if one is None else hooks.edit(model, dict.fromkeys(weights, one))
    with method.holding(model, made), edits:
        found = vectors(name)
    items = [float(f"{d:.4g}") for d in damage(name, found)]
    labels = {"model": name, "weights": weight_bits, "activations": activation_bits, "symmetric": symmetric}
    return labels | {"items": items}


def language(weight_bits: int, activation_bits: int, symmetric: bool, block: int = 0) -> dict:
    """Of SmolLM2: nats more than at full precision a token, in 16 windows of 64 tokens."""
    from nbkit import datasets, hooks, models
    from nbkit import language as lm

    method, model, weights = parts("SmolLM2")
    read = models.tokenizer("smollm2")
    ids, _ = lm.token_windows(read, datasets.load("lee").texts, 64, n=16, seed=0)
    made = {}
    if weight_bits < 16:
        made = {n: method.rtn(W, weight_bits, block=block or None, symmetric=symmetric) for n, W in weights.items()}
    one = None if activation_bits == 16 else method.per_token(activation_bits, symmetric)
    edits = nullcontext() if one is None else hooks.edit(model, dict.fromkeys(weights, one))
    with method.holding(model, made), edits:
        nats = lm.nll(model, ids, batch=16).mean(1)
    labels = {"model": "SmolLM2", "weights": weight_bits, "activations": activation_bits, "symmetric": symmetric}
    return labels | {"block": block, "items": [round(v, 5) for v in nats.double().tolist()]}


def spectra(name: str, bits: int) -> list[dict]:
    """Of every matrix: the share of the squared error per row that the top singular values hold, the same of its
    shuffled error, and the share that blocks of 64 take away."""
    import torch

    method, _, weights = parts(name)
    rows = []
    for place, W in enumerate(weights.values()):
        E = W - method.rtn(W, bits)
        mixed_up = E.flatten()[torch.randperm(E.numel(), generator=torch.Generator().manual_seed(place))].view_as(E)
        found = {"model": name, "matrix": place, "bits": bits}
        for label, error in (("LoRC", E), ("shuffled", mixed_up)):
            held = torch.linalg.svdvals(error).square().cumsum(0) / error.square().sum()
            found |= {f"{label} {m}": round(held[m - 1].item(), 4) for m in (4, 8, 32)}
        finer = W - method.rtn(W, bits, block=64)
        rows.append(found | {"block 64": round(1 - (finer.square().sum() / E.square().sum()).item(), 4)})
    return rows


def activations(kept: Work, names: list[str]) -> list[dict]:
    jobs = [(name, w, a, s) for name in names if name != "SmolLM2" for w, a in MIXES for s in (False, True)]
    found = [kept.once(f"mixed-{'-'.join(map(str, job))}", partial(mixed, *job)) for job in jobs]
    if "SmolLM2" not in names:
        return found
    jobs = [(w, a, s, 0) for w, a in ((16, 16), (8, 16), (16, 8)) for s in (False, True)[: 1 + (w + a < 32)]]
    jobs += [(4, 16, False, 32), (4, 16, False, 0)]  # on the grid its weights came from, and off it
    return found + [kept.once(f"language-{'-'.join(map(str, job))}", partial(language, *job)) for job in jobs]


def label(row: dict) -> str:
    """What is stored for a matrix, in words: ``row``, ``64``, ``row + LoRC 8``, ``128 + LoRC 8, INT8``."""
    words = str(row["block"] or "row")
    words += "" if row["correction"] == "none" else f" + {row['correction']} {row['rank']}"
    return words + (", INT8" if row["factor_bits"] == 8 else "")


def labelled(rows: list[dict]) -> pd.DataFrame:
    """The rows with these words, and the share removed of the loss that the same base has per row, same split."""
    table = pd.DataFrame(rows)
    table.insert(2, "what", [label(row) for row in rows])
    alone = {(r["model"], r["base"], r["bits"], r["draw"]): r["loss"] for r in rows if label(r) == "row"}
    before = [alone[r["model"], r["base"], r["bits"], r["draw"] * (r["base"] == "GPTQ")] for r in rows]
    table["removed"] = (1 - table["loss"] / pd.Series(before).where(lambda loss: loss > 0)).round(5)
    return table


def pairs(mixes: list[dict]) -> list[dict]:
    """A row a text, image or window: damage with 8-bit weights and with 8-bit activations, by kind of quantizer."""
    found = {(m["model"], m["weights"], m["activations"], m["symmetric"], m.get("block", 0)): m["items"] for m in mixes}
    rows = []
    for name in MODELS:
        for symmetric in (False, True):
            w8, a8 = (found[name, w, a, symmetric, 0] for w, a in ((8, 16), (16, 8)))
            dense = found["SmolLM2", 16, 16, False, 0] if name == "SmolLM2" else [0.0] * len(w8)
            labels = {"model": name, "kind": "symmetric" if symmetric else "asymmetric"}
            for item, at_full in enumerate(dense):
                damage = {"W8": w8[item] - at_full, "A8": a8[item] - at_full}
                rows.append(labels | {"item": item} | {k: float(f"{v:.4g}") for k, v in damage.items()})
    return rows


def means(mixes: list[dict]) -> list[dict]:
    """A row a setting: mean damage (nats a token for SmolLM2, with nothing taken off)."""
    rows = []
    for m in mixes:
        damage = float(f"{np.mean(m['items']):.5g}")
        labels = {"model": m["model"], "kind": "symmetric" if m["symmetric"] else "asymmetric"}
        labels |= {"weights": m["weights"], "activations": m["activations"], "block": m.get("block", 0)}
        rows.append(labels | {"damage": damage})
    return rows


def build(out: Path, work: Path, part: str = "all") -> list[Path]:
    from nbkit import runtime

    runtime.deterministic(seed=0)
    kept = Work(work)
    names = list(MODELS) if part == "all" else [part]
    quality, matrices = [], []
    for name in [n for n in names if n != "SmolLM2"]:
        quality += kept.once(f"full-{name}", partial(full, name))
        for bits in (8, *BITS):
            for block in (0, 128, 64, 32) if bits < 8 else (0,):
                quality += kept.once(f"rtn-{name}-{bits}-{block}", partial(rounded, name, bits, block))
        for bits in LOW:
            matrices += kept.once(f"spectra-{name}-{bits}", partial(spectra, name, bits))
    if "MiniLM" in names:
        for bits in BITS:
            for split in range(DRAWS):
                quality += kept.once(f"gptq-{bits}-{split}", partial(calibrated, bits, split))
    mixes = activations(kept, names)
    if part != "all":
        return []
    write_table(out / "quality.csv", labelled(quality))
    write_table(out / "matrices.csv", pd.DataFrame(matrices))
    write_table(out / "mixes.csv", pd.DataFrame(means(mixes)))
    write_table(out / "pairs.csv", pd.DataFrame(pairs(mixes)))
    return [out / f"{name}.csv" for name in ("quality", "matrices", "mixes", "pairs")]


if __name__ == "__main__":
    run(build, __doc__, work=work_option("zeroquant-v2"), part=part_option(*MODELS))
