"""All tables of this folder: what notebooks/07-lean-transformers/02-lora-prune measures beforehand.

``fidelity.csv``: how well scores by LoRA's gradients, and by rivals, rank heads and channels as the weights' true
gradients do, over ranks and steps. ``runs.csv``, ``curves.csv``: perplexity and loss when tiny-llama (two base
networks) is pruned to half while it is tuned on Lee texts, eight ways, three fine-tuning seeds each; every way has its
own learning rate, chosen on validation texts in one run. ``noise.csv``: how often a random gradient passes the rule for
fidelity. ``wide.csv``: fidelity at the first step in six layers of SmolLM2.
About 10 minutes on one core; a run that was stopped goes on where it was (delete the folder --work for a fresh start).
"""

from __future__ import annotations

import functools
from functools import partial
from pathlib import Path

import pandas as pd

from nbkit.recipes import Work, load, run, work_option, write_table

BASES = (0, 1)
SEEDS = (0, 1, 2)
RANK = 4
LOOKS = (0, 10, 20)  # steps at which fidelity is looked at
STEPS = 100
BATCH = 4
LENGTH = 64
RATES = (3e-3, 1e-2, 3e-2)
ARMS = {  # metric, whether all goes at once, ratio
    "lora": ("lora", False, 0.5),
    "grad": ("grad", False, 0.5),
    "magnitude": ("magnitude", False, 0.5),
    "wanda": ("wanda", False, 0.5),
    "random": ("random", False, 0.5),
    "lora at once": ("lora", True, 0.5),
    "grad at once": ("grad", True, 0.5),
    "not pruned": ("magnitude", False, 0.0),
}
DRAWS = 200
WIDE_LAYERS = (2, 7, 12, 17, 22, 27)  # of SmolLM2
WIDE_RANKS = (2, 8, 32, 128)
VALIDATION = 285  # the first of the 300 texts that are not trained on


@functools.cache
def windows(which: str):
    """[N, 64] tokens: ``train`` and ``validation`` of Lee, ``Lee`` (50 other texts), ``own`` (the base's domain)."""
    import torch

    from nbkit import datasets, language, models

    read, lee = models.tokenizer("tiny-llama"), datasets.load("lee")
    if which == "own":
        base = load("models/tiny_llama.py")
        held = base.windows(read.backend_tokenizer, base.texts()[1], LENGTH)
        return held[torch.randperm(len(held), generator=torch.Generator().manual_seed(0))[:100]]
    texts = {"train": lee.texts[:VALIDATION], "validation": lee.texts[VALIDATION:], "Lee": lee.test}[which]
    return language.token_windows(read, texts, LENGTH, per_text=None, seed=0)[0]


def batches(seed: int, steps: int = STEPS):
    """[steps, BATCH, 64], drawn from the training windows; the same for every way of pruning."""
    import torch

    train = windows("train")
    return train[torch.randint(len(train), (steps, BATCH), generator=torch.Generator().manual_seed(seed))]


def network(base: int, seed: int, rank: int = RANK):
    from nbkit import models, papers

    return papers.method("lora-prune").adapted(models.load("tiny-llama", seed=base), rank, seed)


def tuned(arm: str, base: int, seed: int, lr: float):
    """The network, its masks and the losses of one run."""
    from nbkit import papers

    metric, once, ratio = ARMS[arm]
    model = network(base, seed)
    if metric == "random":
        metric = by_lot(1000 + 10 * base + seed)
    if metric == "wanda":
        metric = by_inputs(model)
    settings = {"lr": lr, "ratio": ratio, "once": once}
    masks, _, losses = papers.method("lora-prune").train(model, batches(seed), metric, **settings)
    return model, masks, losses


def nats(model, masks, which: str) -> float:
    """Nats a token of the masked network."""
    from nbkit import language, papers

    with papers.method("lora-prune").masked(model, masks):
        return language.nll(model, windows(which), batch=32).double().mean().item()


def measured(arm: str, base: int, seed: int, lr: float) -> dict:
    """One run: nats a token on three sets of texts, groups removed, losses."""
    model, masks, losses = tuned(arm, base, seed, lr)
    found = {which: nats(model, masks, which) for which in ("validation", "Lee", "own")}
    removed = {"heads": 0, "channels": 0}
    for (_, kind), mask in masks.items():
        removed[kind] += (mask == 0).sum().item()
    return {"arm": arm, "base": base, "seed": seed, "lr": lr, **found, **removed, "losses": losses}


def by_lot(seed: int):
    """Scores drawn anew at every step."""
    import torch

    from nbkit import papers

    generator = torch.Generator().manual_seed(seed)
    return lambda layer, kind: torch.rand(papers.method("lora-prune").members(layer, kind)[0], generator=generator)


def by_inputs(model):
    """Wanda's criterion in groups, |W| times the norm of the input over all tokens; remembered by hooks."""
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.register_forward_pre_hook(remember)
    return lambda layer, kind: weighted(layer, kind, lambda module, W: module.norms.expand_as(W))


def by_noise(seed: int):
    """Random numbers in place of the gradient."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return lambda layer, kind: weighted(layer, kind, lambda _, W: torch.randn(W.shape, generator=generator))


def remember(module, inputs) -> None:
    module.norms = inputs[0].detach().flatten(0, 1).norm(dim=0)


def weighted(layer, kind: str, gradient):
    """The method's group scores with something else in place of the gradient."""
    import torch

    from nbkit import papers

    method = papers.method("lora-prune")
    groups, matrices = method.members(layer, kind)
    total = torch.zeros(groups)
    for name, module in matrices.items():
        W, A, B, s = method.parts(module)
        W = (W + s * B @ A).detach()
        total += method.by_group((gradient(module, W) * W).abs(), method.AXES[kind][name], groups)
    return total


def spearman(a, b) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(a.numpy(), b.numpy()).statistic)


def followed(base: int, seed: int, rank: int, lr: float):
    """Yields after each of 21 steps of tuning without pruning: the step, S of every metric, the matrices' S."""
    import torch

    from nbkit import papers

    method = papers.method("lora-prune")
    model = network(base, seed, rank)
    masks = method.everything(model)
    metrics = {"lora": "lora", "grad": "grad", "magnitude": "magnitude", "wanda": by_inputs(model)}
    adapters = method.trainable(model, "grad")
    optimizer = torch.optim.AdamW(adapters, lr, fused=True)
    S: dict[tuple, torch.Tensor] = {}
    for t, ids in enumerate(batches(seed, max(LOOKS) + 1)):
        optimizer.param_groups[0]["lr"] = lr * (1 - t / STEPS)
        method.loss_of(model, ids).backward()
        torch.nn.utils.clip_grad_norm_(adapters, 1.0)
        now = {}
        for n, kind in masks:
            layer = model.model.layers[n]
            groups, matrices = method.members(layer, kind)
            for metric, score in metrics.items():
                now[n, kind, metric] = method.group_scores(layer, kind, score)
            for name, module in matrices.items():
                for metric in ("lora", "grad"):
                    scores = method.weight_scores(module, metric).detach()
                    now[n, name, metric] = method.by_group(scores, method.AXES[kind][name], groups)
        S = {key: 0.9 * S.get(key, 0) + 0.1 * scores for key, scores in now.items()}
        yield t, S, model
        optimizer.step()
        model.zero_grad()


def fidelity(base: int, seed: int, rank: int, lr: float) -> list[dict]:
    """Spearman with the true gradient's scores, within a layer, in the mean over layers; S so far."""
    rows = []
    for t, S, _ in followed(base, seed, rank, lr):
        if t not in LOOKS:
            continue
        found: dict[tuple[str, str], list[float]] = {}
        for (n, what, metric), scores in S.items():
            if metric != "grad":
                found.setdefault((what, metric), []).append(spearman(scores, S[n, what, "grad"]))
        for (what, metric), values in found.items():
            if metric == "lora" or rank == RANK:
                row = {"base": base, "seed": seed, "rank": rank, "step": t, "what": what, "metric": metric}
                rows.append(row | {"spearman": round(sum(values) / len(values), 4)})
    return rows


def noise(base: int, seed: int, lr: float) -> list[dict]:
    """How often random numbers in place of the gradient, |N * W|, pass the rule for fidelity in one run."""
    rows = []
    for t, S, model in followed(base, seed, RANK, lr):
        if t not in (0, max(LOOKS)):
            continue
        drawn = by_noise(seed)
        for kind in ("heads", "channels"):
            layers = sorted({n for n, k, _ in S if k == kind})
            size = sum(spearman(S[n, kind, "magnitude"], S[n, kind, "grad"]) for n in layers) / len(layers)
            leads = []
            for _ in range(DRAWS):
                one = {n: drawn(model.model.layers[n], kind) for n in layers}
                leads.append(sum(spearman(one[n], S[n, kind, "grad"]) for n in layers) / len(layers) - size)
            row = {"base": base, "seed": seed, "step": t, "what": kind, "passes": sum(x > 0.1 for x in leads)}
            rows.append(row | {"mean": round(sum(leads) / DRAWS, 4), "largest": round(max(leads), 4)})
    return rows


def wide(seed: int) -> list[dict]:
    """The same in SmolLM2, at the first step, where B = 0 and the surrogate is G A^T A; query heads without keys."""
    import torch
    import torch.nn.functional as F

    from nbkit import datasets, language, models, papers

    method = papers.method("lora-prune")
    model = models.load("smollm2").requires_grad_(False)
    ids, _ = language.token_windows(models.tokenizer("smollm2"), datasets.load("lee").texts, LENGTH, n=2, seed=seed)
    groups = {"query heads": {"q_proj": 0, "o_proj": 1}, "channels": method.AXES["channels"]}
    modules = {}
    for n in WIDE_LAYERS:
        for kind, axes in groups.items():
            part = model.model.layers[n].self_attn if kind == "query heads" else model.model.layers[n].mlp
            for name in axes:
                modules[n, kind, name] = getattr(part, name)
                modules[n, kind, name].weight.requires_grad_(True)
                modules[n, kind, name].register_forward_pre_hook(remember)
    F.cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    generator = torch.Generator().manual_seed(seed)
    found: dict[tuple, list[float]] = {}
    for n in WIDE_LAYERS:
        for kind, axes in groups.items():
            size = 9 if kind == "query heads" else 1536
            S: dict[tuple, torch.Tensor] = {}
            for name, axis in axes.items():
                module = modules[n, kind, name]
                W, G = module.weight.detach(), module.weight.grad
                stand_ins = {("grad", 0): G, ("magnitude", 0): torch.ones_like(W)}
                stand_ins["wanda", 0] = module.norms.expand_as(W)
                for rank in WIDE_RANKS:
                    A = (2 * torch.rand(rank, W.shape[1], generator=generator) - 1) / W.shape[1] ** 0.5
                    stand_ins["lora", rank] = G @ A.T @ A
                for key, stand_in in stand_ins.items():
                    one = method.by_group((stand_in * W).abs(), axis, size)
                    S[kind, *key] = S.get((kind, *key), 0) + one
                    S[name, *key] = one
            for (what, metric, rank), scores in S.items():
                if metric != "grad":
                    found.setdefault((what, metric, rank), []).append(spearman(scores, S[what, "grad", 0]))
    return [
        {"batch": seed, "what": what, "metric": metric, "rank": rank, "spearman": round(sum(v) / len(v), 4)}
        for (what, metric, rank), v in found.items()
    ]


def table_of_runs(found: list[dict]) -> pd.DataFrame:
    """A row a run: perplexities."""
    import math

    rows = []
    for one in found:
        row = {k: v for k, v in one.items() if k not in ("losses", "validation", "Lee", "own")}
        rows.append(row | {which: round(math.exp(one[which]), 2) for which in ("validation", "Lee", "own")})
    return pd.DataFrame(rows)


def curves(found: list[dict]) -> pd.DataFrame:
    """The training loss of ten steps at a time."""
    rows = []
    for one in found:
        for start in range(0, STEPS, 10):
            loss = sum(one["losses"][start : start + 10]) / 10
            rows.append({k: one[k] for k in ("arm", "base", "seed")} | {"step": start, "loss": round(loss, 3)})
    return pd.DataFrame(rows)


def build(out: Path, work: Path) -> list[Path]:
    from nbkit import runtime

    runtime.deterministic(seed=0)
    kept = Work(work)
    chosen, found, tried = {}, [], []

    def one_run(arm: str, base: int, seed: int, lr: float) -> dict:
        return kept.once(f"{arm}-{base}-{seed}-{lr:g}", partial(measured, arm, base, seed, lr))

    lr = min(RATES, key=lambda lr: one_run("lora", 0, 0, lr)["validation"])
    jobs = [(base, seed, rank) for rank in (4, 1, 16) for base in BASES for seed in SEEDS]
    scores = [r for job in jobs for r in kept.once("fidelity-{}-{}-{}".format(*job), partial(fidelity, *job, lr))]
    chance = [r for base in BASES for r in kept.once(f"noise-{base}", partial(noise, base, 0, lr))]
    larger = [r for batch in SEEDS for r in kept.once(f"wide-{batch}", partial(wide, batch))]
    for arm in ARMS:
        grid = [one_run(arm, 0, 0, rate) for rate in (RATES if arm != "not pruned" else [lr])]
        chosen[arm] = min(grid, key=lambda one: one["validation"])["lr"]
        tried += [one for one in grid if one["lr"] != chosen[arm]]
    for base in BASES:
        for seed in SEEDS:
            found += [one_run(arm, base, seed, chosen[arm]) for arm in ARMS if arm != "not pruned" or seed == 0]
    runs = table_of_runs(found + tried)
    runs["chosen"] = runs["lr"] == runs["arm"].map(chosen)
    tables = {"runs": runs, "curves": curves(found), "fidelity": pd.DataFrame(scores)}
    tables |= {"noise": pd.DataFrame(chance), "wide": pd.DataFrame(larger)}
    for name, table in tables.items():
        write_table(out / f"{name}.csv", table)
    return [out / f"{name}.csv" for name in tables]


if __name__ == "__main__":
    run(build, __doc__, work=work_option("lora-prune"))
