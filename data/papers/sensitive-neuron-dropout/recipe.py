"""All tables of this folder and tensors.safetensors: what the notebook 04-sensitive-neuron-dropout measures beforehand.

Four runs (tiny-llama's seeds 0 and 1, each in two orders of the texts) train on with lee in four arms: nothing
dropped, random coordinates, the sensitive ones, ordinary dropout. After each of eight passes: the loss on test texts
and the mean EigenScore of 15 prompts. On the last network of the normal arm: the same under masks; on those of all
arms but ordinary dropout: under other samplings. One learning rate serves all arms, that of the lowest loss on texts
kept for that. About 7 minutes on one core; a run that was stopped goes on where it was (delete the folder --work for
a fresh start). The functions are the notebook's method cells.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import torch
from scipy.stats import spearmanr

from nbkit.recipes import Work, run, seeds_option, work_option, write_table, write_tensors

NAME = "sensitive-neuron-dropout"
LAYER = "model.layers.6"
RATES = (5e-4, 1e-3, 2e-3, 4e-3)
ARMS = ("normal", "random", "SenD", "dropout")
RUNS = ((0, 0), (1, 0), (0, 1), (1, 1))  # seed of the base model, order of the texts
C = 3
CHECKPOINTS = 8
SAMPLING = 7  # the seed of all answers, so that checkpoints differ by their weights alone
NOISE = range(11, 16)  # other seeds, for how much sampling does
DRAWS = 9
WINDOWS = (1, 4, 6)  # the first of three checkpoints


def begin(base: int):
    """Method, base model, texts, prompts."""
    from nbkit import datasets, models, papers

    method = papers.method(NAME)
    texts = method.lee_windows(models.tokenizer("tiny-llama"), datasets.load("lee"))
    return method, models.load("tiny-llama", seed=base), texts, texts["test"][::4, :32]


def loss(model, ids: torch.Tensor) -> float:
    from nbkit import language

    return round(language.nll(model, ids, batch=32).mean().item(), 5)


def score(method, model, prompts, edits=(), seed: int = SAMPLING) -> float:
    from nbkit import hooks

    with hooks.edit(model, {LAYER: list(edits)} if edits else {}):
        Z = method.answers(model, prompts, LAYER, seed=seed)
    return round(method.eigenscore(Z).mean().item(), 5)


def rate(lr: float) -> list[dict]:
    """Four passes of the normal arm."""
    method, model, texts, _ = begin(0)
    settings = {"arm": "normal", "lr": lr, "seed": 0, "checkpoints": 4}
    passes = method.continual(model, texts["train"], texts["tracking"], LAYER, **settings)
    return [{"lr": lr, "checkpoint": t, "loss": loss(model, texts["rate"])} for t, _, _ in passes]


def masks(method, e: torch.Tensor) -> dict[str, torch.Tensor]:
    """Masks of a fifth of the coordinates, from the last three checkpoints e [3, N, d]."""
    generator = torch.Generator().manual_seed(0)
    draws = {f"random {k}": method.most(torch.rand(e.shape[-1], generator=generator)) for k in range(DRAWS)}
    return {"SEI": method.most(method.sensitivity(e)), "largest": method.most(e[-1].abs().mean(0)), **draws}


def masked(method, model, e: torch.Tensor, texts, prompts) -> list[dict]:
    """A row a mask: the score with it in every forward pass, and with its coordinates left out of Z alone."""
    from nbkit import hooks

    Z = method.answers(model, prompts, LAYER, seed=SAMPLING)
    rows = []
    for mask, indices in {"none": e.new_tensor([]).long(), **masks(method, e)}.items():
        read = Z.clone()
        read[..., indices] = 0
        edits = [hooks.zero(indices)] if len(indices) else []
        with hooks.edit(model, {LAYER: edits} if edits else {}):
            after = loss(model, texts["test"])
        reading = round(method.eigenscore(read).mean().item(), 5)
        row = {
            "mask": mask,
            "forward": score(method, model, prompts, edits),
            "reading": reading,
            "loss": after,
        }
        rows.append(row)
    return rows


def arm(base: int, order: int, name: str, lr: float) -> dict:
    """Rows of one arm, a checkpoint each, and the embeddings; of the normal arm also what its last network says."""
    from nbkit import hooks

    method, model, texts, prompts = begin(base)
    key = {"base": base, "order": order, "arm": name}
    rows, history = [], []
    if name == "normal":
        first = score(method, model, prompts)
        rows.append(
            {**key, "checkpoint": 0, "loss": loss(model, texts["test"]), "score": first, "masked": first}
        )
    settings = {"arm": name, "lr": lr, "seed": order, "C": C, "checkpoints": CHECKPOINTS}
    for t, e, indices in method.continual(model, texts["train"], texts["tracking"], LAYER, **settings):
        history.append(e)
        if t <= C and name != "normal":
            continue  # the same network as the normal arm's
        plain = score(method, model, prompts)
        edits = [hooks.zero(indices)] if len(indices) else []
        under = score(method, model, prompts, edits) if edits else plain
        rows.append(
            {**key, "checkpoint": t, "loss": loss(model, texts["test"]), "score": plain, "masked": under}
        )
    e = torch.stack(history)
    found = {"rows": rows, "e": e.half().tolist()}
    if name == "normal" or edits:  # with its mask on, where the arm has one
        found["noise"] = [score(method, model, prompts, edits, seed=seed) for seed in NOISE]
    if name == "normal":
        found["masks"] = masked(method, model, e[-C:], texts, prompts)
    return found


def changes(rows: list[dict]) -> pd.DataFrame:
    """A row an arm and checkpoint; the other arms begin with normal's, and scores are also given minus that at C."""
    table = pd.DataFrame(rows)
    first = table.query(f"arm == 'normal' and checkpoint <= {C}")
    table = pd.concat([table, *(first.assign(arm=name) for name in ARMS[1:])])
    keys = ["base", "order", "arm"]
    at = table[table["checkpoint"] == C].set_index(keys)["score"]
    table["change"] = table["score"] - table.set_index(keys).index.map(at)
    return table.sort_values([*keys, "checkpoint"])


def summary(table: pd.DataFrame, noise: pd.DataFrame) -> pd.DataFrame:
    """A row a run and arm: spread and level over the checkpoints after C, the last loss, and what sampling does to
    the last network of normal and, with its mask on, to the arm's own (where it has one)."""
    rows = []
    for (base, order, name), part in table.query(f"checkpoint > {C}").groupby(["base", "order", "arm"]):
        row = {"base": base, "order": order, "arm": name}
        for label, column in {"": "score", ", mask on": "masked"}.items():
            row |= {f"spread{label}": part[column].std(ddof=0), f"level{label}": part[column].mean()}
        row |= {"last loss": part["loss"].iloc[-1], "loss moves": part["loss"].max() / part["loss"].min() - 1}
        drawn = noise.query(f"base == {base} and order == {order}").groupby("arm")["score"].std(ddof=0)
        own = round(drawn.get(name, drawn["normal"]), 3)
        rows.append(row | {"sampling": drawn["normal"], "sampling, mask on": own})
    return pd.DataFrame(rows)


def falls(masks: pd.DataFrame) -> pd.DataFrame:
    """A row a run, mask and way of masking: what it changes."""
    keys = ["base", "order"]
    bare = masks[masks["mask"] == "none"].drop(columns="mask")
    table = masks[masks["mask"] != "none"].merge(bare, on=keys, suffixes=("", " bare"))
    table.insert(3, "set", table["mask"].str.split().str[0])
    parts = []
    for column, where in {"forward": "every forward pass", "reading": "reading only"}.items():
        part = table[[*keys, "mask", "set"]].assign(
            where=where, change=table[column] - table[f"{column} bare"]
        )
        part["loss change"] = table["loss"] - table["loss bare"] if column == "forward" else 0.0
        parts.append(part)
    return pd.concat(parts)


def overlaps(method, e: dict[str, torch.Tensor]) -> pd.DataFrame:
    """A row a run: how many of the SEI come back, and how they go with the size of a coordinate."""
    rows = []
    for base, order in [key.split()[1:] for key in e if key.startswith("V ")]:
        V, size = e[f"V {base} {order}"], e[f"size {base} {order}"]
        first, second, last = (set(method.most(v).tolist()) for v in V)
        big = set(method.most(size).tolist())
        row = {
            "base": base,
            "order": order,
            "SEI 1-3 and 4-6": len(first & second),
            "SEI 6-8 and largest": len(last & big),
        }
        rows.append(row | {"rank corr. of V 6-8 and size": round(spearmanr(V[2], size).statistic, 3)})
    return pd.DataFrame(rows)


def build(out: Path, work: Path, seeds: int) -> list[Path]:
    from nbkit import papers, runtime

    runtime.deterministic(seed=0)
    torch.set_num_threads(1)
    kept, method = Work(work), papers.method(NAME)
    rates = pd.DataFrame([row for lr in RATES for row in kept.once(f"rate {lr}", lambda lr=lr: rate(lr))])
    last = rates[rates["checkpoint"] == rates["checkpoint"].max()]
    lr = float(last.loc[last["loss"].idxmin(), "lr"])
    rows, noise, under, e = [], [], [], {}
    for base, order in RUNS[:seeds]:
        for name in ARMS:
            found = kept.once(f"{base} {order} {name}", lambda b=base, o=order, n=name: arm(b, o, n, lr))
            rows += found["rows"]
            key = {"base": base, "order": order}
            if (base, order) == (0, 0):
                e[name] = torch.tensor(found["e"]).half()
            drawn = zip(NOISE, found.get("noise", ()), strict=name != "dropout")
            noise += [{**key, "arm": name, "seed": s, "score": v} for s, v in drawn]
            if name == "normal":
                under += [{**key, **row} for row in found["masks"]]
                normal = torch.tensor(found["e"])
                parts = [normal[first - 1 : first - 1 + C] for first in WINDOWS]
                e[f"V {base} {order}"] = torch.stack([method.sensitivity(part) for part in parts])
                e[f"size {base} {order}"] = normal[-1].abs().mean(0)
            else:  # nothing is dropped yet
                assert torch.equal(torch.tensor(found["e"])[:C], normal[:C])
    table = changes(rows)
    tables = {"rates": rates, "checkpoints": table, "summary": summary(table, pd.DataFrame(noise))}
    tables |= {"masks": falls(pd.DataFrame(under)), "overlap": overlaps(method, e)}
    for name, table in tables.items():
        write_table(out / f"{name}.csv", table, float_format="%.6g")
    write_tensors(out / "tensors.safetensors", e)
    return [*(out / f"{name}.csv" for name in tables), out / "tensors.safetensors"]


if __name__ == "__main__":
    run(build, __doc__, work=work_option(NAME), seeds=seeds_option(len(RUNS), "runs"))
