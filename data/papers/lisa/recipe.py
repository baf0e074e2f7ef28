"""All tables of this folder: what notebooks/07-lean-transformers/05-lisa measures beforehand.

tiny-llama (two base networks) is fine-tuned on Lee news texts by LISA with several settings, by full AdamW, by LoRA of
several kinds, and with its middle layers frozen. Every arm first gets a learning rate of its own, doubled or halved on
base 0 and a fine-tuning seed that is used for nothing else, until the best loss on validation texts lies inside; then
it runs on both bases with three seeds. Within a run of base and seed all arms see the same texts in the same order.
LISA and LoRA 17 also run four times as long at those rates, with one seed.
About 13 minutes on one core; a run that was stopped goes on where it was (delete the folder --work for a fresh start).
The functions of the method are the notebook's method cells.
"""

from __future__ import annotations

import functools
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from nbkit.recipes import Work, part_option, run, widened, work_option, write_table

STEPS, BATCH, LENGTH = 100, 4, 64
TRAIN = 242  # of the 300 texts, counted from the first: no text after it repeats one before
WATCHED = 10  # steps between two looks at the weights
BASES, SEEDS, TUNING = (0, 1), (0, 1, 2), 9
ATTENTION_AND_MLP = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
EVERYWHERE = (*ATTENTION_AND_MLP, "embed_tokens", "lm_head")
LISA = {"gamma": 2, "period": 10}
LORA = {"rank": 8, "targets": ATTENTION_AND_MLP}
ARMS = {
    "full": {},
    "LoRA 14, E and H too": {"rank": 14, "targets": EVERYWHERE},
    "LISA": LISA,
    "LoRA 17": LORA | {"rank": 17},
    "LoRA 11, E trained": LORA | {"rank": 11, "embedding": True},
    "frozen middle": LISA | {"gamma": 0},
    "fixed layers": LISA | {"fixed": True},
    "LoRA 8": LORA,
    "LISA, gamma 1": LISA | {"gamma": 1},
    "LISA, gamma 4": LISA | {"gamma": 4},
    "LISA, K 4": LISA | {"period": 4},
    "LISA, K 50": LISA | {"period": 50},
    "LISA, state kept": LISA | {"keep": True},
    "LoRA 14, small start": {"rank": 14, "targets": EVERYWHERE, "small": True},
}
LONG, LONG_SEEDS, LONG_ARMS = 400, (0,), ("LISA", "LoRA 17")
START = {"full": 1e-3, "LISA": 2e-3, "LoRA": 4e-3}  # where the search for a learning rate begins


@functools.cache
def windows(part: str):
    """[N, 64] tokens of the training, validation or test texts."""
    from nbkit import datasets, language, models

    lee = datasets.load("lee")
    texts = {"train": lee.texts[:TRAIN], "validation": lee.texts[TRAIN:], "test": lee.test}[part]
    n = 96 if part == "validation" else None
    return language.token_windows(models.tokenizer("tiny-llama"), texts, LENGTH, n=n, per_text=None, seed=0)[0]


def batches(seed: int, steps: int = STEPS):
    """[T, N, L]: what a fine-tuning seed reads, no window twice."""
    import torch

    ids = windows("train")
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
    return ids[order[: steps * BATCH]].view(steps, BATCH, LENGTH)


def part_of(name: str) -> str | None:
    """E, 0 to 7 or H: the part of the model that a module belongs to."""
    words = name.split(".")
    numbers = [word for word in words if word.isdigit()]
    return numbers[0] if numbers else "E" if "embed_tokens" in words else "H" if "lm_head" in words else None


def weights(model) -> dict:
    """{module: what it multiplies by}, adapters added in."""
    found = {}
    for name, module in model.named_modules():
        inner = "lora_" in name or "base_layer" in name
        if part_of(name) is None or inner:
            continue
        if hasattr(module, "get_delta_weight"):
            found[name] = module.base_layer.weight.detach() + module.get_delta_weight("default").detach()
        elif "weight" in module._parameters:
            found[name] = module.weight.detach().clone()
    return found


def norms(now: dict, start: dict) -> dict[str, tuple[float, float]]:
    """{part: (norm of its weights, norm of what was added to them)}"""
    squares: dict[str, list[float]] = {}
    for name, weight in now.items():
        pair = squares.setdefault(part_of(name), [0.0, 0.0])
        pair[0] += weight.square().sum().item()
        pair[1] += (weight - start[name]).square().sum().item()
    return {part: (a**0.5, b**0.5) for part, (a, b) in squares.items()}


def with_adapters(model, rank: int, targets, embedding: bool = False, small: bool = False):
    """LoRA by peft, alpha twice the rank; with ``embedding`` E and the last norm are trained as they are.

    ``small``: the embedding's adapter starts from numbers as small as those of a linear layer of that width,
    a standard deviation of 1 / sqrt(3 width), not 1.
    """
    import warnings

    import peft

    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(targets))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied weights, which nothing here merges
        adapted = peft.get_peft_model(model, config)
    for name, weight in adapted.named_parameters() if small else ():
        if "lora_embedding_B" in name:  # [width, rank]
            weight.data /= (3 * len(weight)) ** 0.5
    if embedding:
        model.model.embed_tokens.requires_grad_(True)
        model.model.norm.requires_grad_(True)
    return adapted


def once(arm: str, base: int, seed: int, lr: float, steps: int = STEPS) -> dict:
    """One fine-tuning: losses afterwards and on the way, floats held, norms of the parts."""
    import torch

    from nbkit import language, models, papers

    method, settings, tuning = papers.method("lisa"), dict(ARMS[arm]), seed == TUNING
    torch.manual_seed(seed)  # of LoRA's first factors
    model, draws, how = models.load("tiny-llama", seed=base), None, {}
    if "rank" in settings:
        model = with_adapters(model, **settings)
    elif settings:
        how = {"period": settings["period"], "keep": settings.get("keep", False)}
        periods = -(-steps // settings["period"])
        draws = method.draw(8, settings["gamma"], periods, seed=seed, fixed=settings.get("fixed", False))
    start, seen = weights(model), []

    def watch(step):
        if (step + 1) % WATCHED == 0:
            seen.append(norms(weights(model), start))

    history = method.finetune(model, batches(seed, steps), lr=lr, draws=draws, watch=watch, **how)
    found = {"loss": language.nll(model, windows("validation" if tuning else "test"), batch=32).double().mean().item()}
    found["floats"] = max(floats for _, floats in history)
    found["mean floats"] = float(np.mean([floats for _, floats in history]))
    found["train"] = np.reshape([loss for loss, _ in history], (-1, 10)).mean(1).tolist()
    found["norms"] = {part: np.mean([one[part] for one in seen], 0).tolist() for part in seen[0]}
    return found


def search(kept: Work, arm: str) -> tuple[float, list[dict]]:
    """The learning rate of an arm, doubled or halved until the best lies inside; and all that were tried."""
    middle = START["full" if arm == "full" else "LoRA" if "rank" in ARMS[arm] else "LISA"]

    def measured(lr: float) -> float:
        return kept.once(f"tuning-{arm}-{lr}", partial(once, arm, 0, TUNING, lr))["loss"]

    found = widened(measured, (middle / 2, middle, 2 * middle))
    best = min(found, key=found.get)
    return best, [{"arm": arm, "lr": lr, "validation": round(found[lr], 4)} for lr in sorted(found)]


def build(out: Path, work: Path, part: str = "all") -> list[Path]:
    from nbkit import language, models, runtime

    runtime.deterministic(seed=0)
    kept = Work(work)
    lrs, tried = {}, []
    for arm in ARMS:
        lrs[arm], rows = search(kept, arm)
        tried += rows
    if part == "tuning":
        return []
    losses, steps, parts = [], [], []
    for base in BASES:
        for seed in SEEDS:
            for arm, lr in lrs.items():
                found = kept.once(f"{arm}-{base}-{seed}-{lr}", partial(once, arm, base, seed, lr))
                labels = {"arm": arm, "base": base, "seed": seed}
                sizes = {"floats": found["floats"], "mean floats": round(found["mean floats"])}
                losses.append(labels | {"lr": lr} | sizes | {"loss": round(found["loss"], 4)})
                steps += [labels | {"step": 10 * i + 5, "loss": round(v, 4)} for i, v in enumerate(found["train"])]
                parts += [
                    labels | {"part": one, "weights": float(f"{a:.4g}"), "update": float(f"{b:.3g}")}
                    for one, (a, b) in found["norms"].items()
                ]
    for base in BASES:
        loss = language.nll(models.load("tiny-llama", seed=base), windows("test"), batch=32).double().mean().item()
        none = dict.fromkeys(("seed", "lr", "floats", "mean floats"), 0)
        losses.append({"arm": "untrained", "base": base} | none | {"loss": round(loss, 4)})
    longer = []
    for seed in LONG_SEEDS:
        for base in BASES:
            for arm in LONG_ARMS:
                lr = lrs[arm]
                found = kept.once(f"long-{arm}-{base}-{seed}-{lr}", partial(once, arm, base, seed, lr, LONG))
                late = float(np.mean(found["train"][-4:]))  # of the last 40 steps
                labels = {"arm": arm, "base": base, "seed": seed, "lr": lr}
                longer.append(labels | {"loss": round(found["loss"], 4), "new windows": round(late, 4)})
    on_the_way = {(row["base"], row["seed"], row["step"]): row["loss"] for row in steps if row["arm"] == "full"}
    for row in steps:
        row["more"] = round(row["loss"] - on_the_way[row["base"], row["seed"], row["step"]], 4)
    tables = {"losses": losses, "steps": steps, "norms": parts, "tuning": tried, "longer": longer}
    for name, rows in tables.items():
        write_table(out / f"{name}.csv", pd.DataFrame(rows))
    return [out / f"{name}.csv" for name in tables]


if __name__ == "__main__":
    run(build, __doc__, work=work_option("lisa"), part=part_option("tuning"))
