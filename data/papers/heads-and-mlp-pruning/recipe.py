"""All tables of this folder: what notebooks/07-lean-transformers/01-heads-and-mlp-pruning measures beforehand.

How well three language models predict texts after heads and MLP units were masked, without any training afterwards:
SmolLM2 on news texts (lee), two tiny-llamas on the held-out texts of theirs. Three splits a network: 50 calibration
prompts of 32 tokens, and other texts for evaluation. Several criteria at equal removed parameters, seven random draws a
split, heads alone or units alone; and how long SmolLM2 takes before and after surgery. About 8 minutes on one core; a
run that was stopped goes on where it was (delete the folder --work for a fresh start). The functions are the notebook's
method cells.
"""

from __future__ import annotations

import copy
import functools
import time
from functools import partial
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from nbkit.recipes import Work, load, part_option, run, work_option, write_table

NETWORKS = ("SmolLM2", "tiny-llama 0", "tiny-llama 1")
SPLITS = 3
PROMPTS = 50
PROMPT = 32  # tokens
PARTS = 8  # of the evaluation texts of a split
WINDOW = {"SmolLM2": 96, "tiny-llama": 128}  # tokens
BUDGETS = (0.1, 0.2, 0.3)  # share of the blocks' parameters
CRITERIA = ("AMP", "reversed", "magnitude", "projected")
DRAWS = {0.1: 2, 0.2: 7, 0.3: 2}  # random masks a split
SPARED = {"random, loud spared": 2, "magnitude, loud spared": 1}  # draws a split, at 20 %
LOUD = 0.01  # of the units
HEADS = {"SmolLM2": (3, 6), "tiny-llama": (2, 3)}  # that go alone
PAIRS = 5  # of timed passes


@functools.cache
def parts(network: str):
    """The notebook's method cells, the language model, its heads and the parameters of its parts."""
    from nbkit import models, papers

    method = papers.method("heads-and-mlp-pruning")
    model = models.load("smollm2") if network == "SmolLM2" else models.load("tiny-llama", seed=int(network[-1]))
    return method, model, model.config.num_attention_heads, method.Sizes(*sizes(model.model))


def sizes(body) -> tuple:
    """Of a Llama without biases: parameters of a head's rows of q and columns of o, of a K/V head, of a unit; and the
    K/V head of every head."""
    heads, per_kv = body.config.num_attention_heads, body.layers[0].self_attn.num_key_value_groups
    d, width = body.layers[0].self_attn.head_dim, body.config.hidden_size
    return 2 * d * width, 2 * d * width, 3 * width, torch.arange(heads) // per_kv


def rival(name: str, scores, body, seed: int = 0):
    """Scores by another criterion, of which the lowest go as well. Raises: ValueError."""
    if name not in ("AMP", "random", "reversed", "magnitude", "projected"):
        raise ValueError(f"no criterion {name!r}: AMP, random, reversed, magnitude or projected")
    if name == "AMP":
        return scores
    if name == "reversed":
        return scores._replace(heads=-scores.heads, units=-scores.units)
    if name == "random":
        generator = torch.Generator().manual_seed(seed)
        heads, units = (torch.rand(part.shape, generator=generator) for part in scores)
        return scores._replace(heads=heads, units=units)
    mlps = [layer.mlp for layer in body.layers]
    down = torch.stack([mlp.down_proj.weight.detach().abs().sum(0) for mlp in mlps])
    if name == "projected":
        return scores._replace(units=scores.units * down)
    into = [mlp.gate_proj.weight.abs().sum(1) + mlp.up_proj.weight.abs().sum(1) for mlp in mlps]
    o = torch.stack([layer.self_attn.o_proj.weight.detach().abs().sum(0) for layer in body.layers])
    heads = o.unflatten(1, (scores.heads.shape[1], -1)).sum(2)
    return scores._replace(heads=heads, units=down + torch.stack(into).detach())


def cut(layer, rows=slice(None), columns=slice(None)):
    """A linear layer, in place, with some of its outputs (rows) and inputs (columns) only."""
    layer.weight.data = layer.weight.data[rows][:, columns]
    layer.out_features, layer.in_features = layer.weight.shape
    return layer


class FewerHeads(nn.Module):
    """Llama's attention with some of its heads, each with its K/V head; no padding, no cache."""

    def __init__(self, attention: nn.Module, kept: torch.Tensor, group: torch.Tensor):
        super().__init__()
        self.d = attention.head_dim  # stays, whatever the number of heads
        alive, self.kv_of_head = group[kept].unique(return_inverse=True)
        rows, shared = (mask.repeat_interleave(self.d) for mask in (kept, torch.isin(group.unique(), alive)))
        self.q, self.o = cut(attention.q_proj, rows), cut(attention.o_proj, columns=rows)
        self.k, self.v = cut(attention.k_proj, shared), cut(attention.v_proj, shared)

    def forward(self, hidden_states, position_embeddings, **_):
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        made = [proj(hidden_states) for proj in (self.q, self.k, self.v)]
        q, k, v = [x.unflatten(-1, (-1, self.d)).transpose(1, 2) for x in made]
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        k, v = k[:, self.kv_of_head], v[:, self.kv_of_head]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(out.transpose(1, 2).flatten(2)), None


def surgery(model, kept):
    """A smaller copy of a Llama language model without biases. Raises: ValueError where ``kept`` does not fit."""
    heads, units = model.config.num_attention_heads, model.config.intermediate_size
    wanted = [(len(model.model.layers), n) for n in (heads, units)]
    if [tuple(mask.shape) for mask in kept] != wanted:
        raise ValueError(f"masks must be {wanted}, not {[tuple(mask.shape) for mask in kept]}")
    small, group = copy.deepcopy(model), sizes(model.model)[3]
    for layer, of_heads, of_units in zip(small.model.layers, *kept, strict=True):
        layer.self_attn = FewerHeads(layer.self_attn, of_heads, group)
        cut(layer.mlp.gate_proj, of_units)
        cut(layer.mlp.up_proj, of_units)
        cut(layer.mlp.down_proj, columns=of_units)
    return small


@functools.cache
def texts(network: str, split: int):
    """Calibration prompts [50, 32] and evaluation windows [8 n, T] from other texts."""
    from nbkit import datasets, language, models

    if network != "SmolLM2":
        source = load("models/tiny_llama.py")
        tokenizer = models.tokenizer("tiny-llama").backend_tokenizer
        held = source.windows(tokenizer, source.texts()[1])[split::SPLITS]
        return held[:PROMPTS, :PROMPT], held[-4 * PARTS :]
    lee, tokenizer = datasets.load("lee").texts[100 * split : 100 * (split + 1)], models.tokenizer("smollm2")
    prompts, _ = language.token_windows(tokenizer, lee[:PROMPTS], PROMPT, seed=split)
    windows, _ = language.token_windows(tokenizer, lee[PROMPTS:], WINDOW["SmolLM2"], n=PARTS, seed=split)
    return prompts, windows


@functools.cache
def scores(network: str, split: int):
    """AMP's, mean over prompts."""
    method, model, heads, _ = parts(network)
    prompts, _ = texts(network, split)
    found = method.measure(model.model, prompts.split(10), heads)
    return method.Pair(found.heads.mean(0), found.units.mean(0))


def kept(network: str, split: int, arm: str, budget, draw: int):
    """What an arm keeps; a budget is a share, or how many heads go where heads go alone."""
    method, model, heads, size = parts(network)
    amp = scores(network, split)
    lot = rival("random", amp, model.model, seed=1000 * split + draw)
    if arm == "AMP heads, random units":
        return method.amp(method.Pair(amp.heads, lot.units), budget, size)
    if arm == "random heads, AMP units":
        return method.amp(method.Pair(lot.heads, amp.units), budget, size)
    if arm.endswith("loud spared"):
        base = lot if arm.startswith("random") else rival("magnitude", amp, model.model)
        units = amp.units.shape[1]
        loud = method.lowest(amp.units, units - round(LOUD * units))
        spared = base.units.masked_fill(loud, base.units.max().item() + 1)
        return method.amp(method.Pair(base.heads, spared), budget, size)
    if arm == "MLP only" and budget < 1:
        return method.fill(amp, 0, budget * method.whole(amp, size), size)
    if arm in ("MLP only", "heads only", "both"):
        alone = method.fill(amp, int(budget), 0, size)
        target = method.gone(alone, size)
        share = target.double().mean().item() / method.whole(amp, size)
        n_h = max(1, round(share * heads)) if arm == "both" else 0
        return alone if arm == "heads only" else method.fill(amp, n_h, target, size)
    return method.amp(lot if arm == "random" else rival(arm, amp, model.model), budget, size)


def arms(network: str) -> list[tuple]:
    """(arm, budget, draw) of a split."""
    found = [("dense", 0.0, 0)]
    for p in BUDGETS:
        found += [(arm, p, 0) for arm in CRITERIA]
        found += [("random", p, draw) for draw in range(DRAWS[p])]
    found += [("MLP only", p, 0) for p in (0.2, 0.3)]
    found += [(arm, 0.2, 0) for arm in ("AMP heads, random units", "random heads, AMP units")]
    found += [(arm, 0.2, draw) for arm, draws in SPARED.items() for draw in range(draws)]
    alone = HEADS[network.split()[0]]
    return found + [(arm, n, 0) for n in alone for arm in ("heads only", "MLP only", "both")]


def judged(network: str, split: int, arm: str, budget, draw: int) -> dict:
    """Nats a token of every part of the evaluation texts, and the share of the blocks' parameters that is gone."""
    from nbkit import language

    method, model, _, size = parts(network)
    windows = texts(network, split)[1]
    if arm == "dense":
        nats, share = language.nll(model, windows), 0.0
    else:
        keeps = kept(network, split, arm, budget, draw)
        share = method.gone(keeps, size).double().mean().item() / method.whole(keeps, size)
        with method.masked(model.model, keeps):
            nats = language.nll(model, windows)
    labels = {"network": network, "split": split, "arm": arm, "budget": budget, "draw": draw}
    return labels | {"removed": share, "items": nats.double().view(PARTS, -1).mean(1).tolist()}


def overlap(network: str) -> list[dict]:
    """Of what AMP removes at 20 % in split 0: the share that goes in the other splits, and by other criteria, too."""
    method, model, _, size = parts(network)
    removed = [method.amp(scores(network, k), 0.2, size) for k in range(SPLITS)]
    others = {f"AMP, split {k}": removed[k] for k in (1, 2)}
    others |= {arm: kept(network, 0, arm, 0.2, 0) for arm in ("magnitude", "projected", "random")}
    rows = []
    for label, other in others.items():
        shares = {
            part: ((~mine & ~theirs).sum() / (~mine).sum()).item()
            for part, mine, theirs in zip(("heads", "units"), removed[0], other, strict=True)
        }
        rows.append({"network": network, "beside": label} | {part: round(share, 3) for part, share in shares.items()})
    return rows


def speed() -> list[dict]:
    """Processor seconds for four windows, before and after surgery at 20 %, in turn."""
    method, model, _, _ = parts("SmolLM2")
    small = surgery(model, kept("SmolLM2", 0, "AMP", 0.2, 0))
    ids = texts("SmolLM2", 0)[1][:4]
    rows = []
    for pair in range(-1, PAIRS):  # the first pair warms up
        row = {"pair": pair}
        for label, one in (("dense", model), ("pruned", small)):
            began = time.process_time()
            with torch.no_grad():
                one(input_ids=ids)
            row[label] = round(time.process_time() - began, 3)
        rows.append(row)
    return rows[1:]


def build(out: Path, work: Path, part: str = "all") -> list[Path]:
    from nbkit import runtime

    runtime.deterministic(seed=0)
    keep = Work(work)
    rows, beside = [], []
    for network in NETWORKS if part == "all" else [part]:
        for split in range(SPLITS):
            for arm, budget, draw in arms(network):
                key = f"{network}-{split}-{arm}-{budget}-{draw}"
                rows.append(keep.once(key, partial(judged, network, split, arm, budget, draw)))
        beside += keep.once(f"overlap-{network}", partial(overlap, network))
    if part != "all":
        return []
    items = [
        {k: row[k] for k in ("network", "split", "arm", "budget", "draw")} | {"part": i, "nats": round(item, 3)}
        for row in rows
        for i, item in enumerate(row["items"])
    ]
    nats = {(r["network"], r["split"], r["arm"], r["budget"], r["draw"]): sum(r["items"]) / PARTS for r in rows}
    means = [
        {k: v for k, v in row.items() if k != "items"}
        | {
            "removed": round(row["removed"], 5),
            "nats": round(nats[key], 4),
            "loss": round(nats[key] - nats[(*key[:2], "dense", 0.0, 0)], 4),
        }
        for key, row in zip(nats, rows, strict=True)
    ]
    write_table(out / "results.csv", pd.DataFrame(means))
    write_table(out / "parts.csv", pd.DataFrame(items))
    write_table(out / "overlap.csv", pd.DataFrame(beside))
    write_table(out / "speed.csv", pd.DataFrame(keep.once("speed", speed)))
    return [out / f"{name}.csv" for name in ("results", "parts", "overlap", "speed")]


if __name__ == "__main__":
    run(build, __doc__, work=work_option("heads-and-mlp-pruning"), part=part_option(*NETWORKS))
