"""All tables of this folder: what the notebook 04-importance-aware-tuning measures beforehand.

Six runs (tiny-llama's seeds 0 and 1, each in three orders of the texts) tune a LoRA on texts of lee in nine arms: on
all layers, on all with a quarter of the rank, and on two layers a step that are drawn by importance (as published, and
two quicker ways to learn it), at random, or fixed. Each arm has the learning rate of the lowest loss on texts kept for
that. About 12 minutes on one core; a run that was stopped goes on where it was (delete the folder --work for a fresh
start). The functions are the notebook's method cells.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import torch

from nbkit.recipes import Work, run, seeds_option, widened, work_option, write_table

NAME = "importance-aware-tuning"
RUNS = tuple((base, order) for order in range(3) for base in range(2))  # seed of the base model, order of the texts
GRID = (2e-3, 4e-3, 8e-3)
GRID_ORDER = 9  # the order of the runs that choose a learning rate
STEPS = 128  # of 4 windows: one pass
EVERY = 32
ALL = tuple(range(8))
ARMS = {
    "all layers": {"sampler": "fixed", "fixed": ALL},
    "all layers, r 2": {"sampler": "fixed", "fixed": ALL, "r": 2},
    "IST": {"sampler": "IST", "mu": 10},
    "IST, mu scaled": {"sampler": "IST", "mu": None},
    "IST, every 2": {"sampler": "IST", "mu": None, "T_I": 2},
    "RST": {"sampler": "RST"},
    "first two": {"sampler": "fixed", "fixed": (0, 1)},
    "last two": {"sampler": "fixed", "fixed": (6, 7)},
    "best two": {"sampler": "fixed"},  # by leaving out what was tuned on all layers
}
BUDGETS = {f"RST, N_u {n}": {"sampler": "RST", "N_u": n} for n in (1, 4)}


def begin(base: int, r: int = 8):
    """Method, base model with a LoRA, texts by their use."""
    from nbkit import datasets, models, papers

    method = papers.method(NAME)
    texts = method.lee_windows(models.tokenizer("tiny-llama"), datasets.load("lee"))
    return method, method.add_lora(models.load("tiny-llama", seed=base), r=r, target_modules=method.LINEARS), texts


def loss(model, ids: torch.Tensor) -> float:
    from nbkit import language

    return round(language.nll(model, ids, batch=32).mean().item(), 5)


def tuned(base: int, order: int, lr: float, settings: dict, on: str = "test") -> dict:
    """Losses on the texts `on`, a and the layers trained of one run, and what leaving out a layer costs."""
    settings = dict(settings)
    method, model, texts = begin(base, settings.pop("r", 8))
    rows, a_rows, layers = [], [], []
    last = None
    options = {"lr": lr, "steps": STEPS, "seed": order, **settings}
    for step, (a, chosen, _) in enumerate(method.tune(model, texts["train"], **options), start=1):
        layers.append(chosen)
        if last is None or not torch.equal(a, last):
            a_rows.append({"step": step, "a": [round(x, 5) for x in a.tolist()]})
            last = a
        if step == STEPS or (step % EVERY == 0 and on == "test"):
            rows.append({"step": step, "loss": loss(model, texts[on])})
    rises = left_out(method, model, texts["choose"]) if settings.get("fixed") == ALL else []
    return {"rows": rows, "a": a_rows, "layers": layers, "left out": rises}


def left_out(method, model, ids: torch.Tensor) -> list[float]:
    """How much the loss on ids rises without one layer's response, for each layer."""
    from nbkit import language

    layers = method.responses(model)
    whole = language.nll(model, ids, batch=32).mean().item()
    rises = []
    for i in range(len(layers)):
        with method.scaled(layers, [i], 0):
            rises.append(round(language.nll(model, ids, batch=32).mean().item() - whole, 5))
    return rises


def agreement(scores: pd.DataFrame, rises: pd.DataFrame) -> pd.DataFrame:
    """Rank correlation of -a at the end and the rises by run and arm, and what 95 % of 10,000 means over the six runs
    stay below where the layers of each base are shuffled."""
    last = scores.sort_values("step").groupby(["arm", "base", "order", "layer"])["a"].last().unstack("layer")
    R = rises.pivot(index=["base", "order"], columns="layer", values="rise").rank(axis=1)
    generator = np.random.default_rng(0)
    orders = [{base: generator.permutation(8) for base in (0, 1)} for _ in range(10_000)]
    rows = []
    for arm, a in last.groupby("arm"):
        ranks = a.droplevel("arm").mul(-1).rank(axis=1).loc[R.index]
        rho = ((ranks - 4.5) * (R - 4.5)).sum(axis=1) / 42  # 42: the sum of squares of eight ranks
        base = R.index.get_level_values("base")
        means = []
        for order in orders:
            mixed = np.stack([row[order[b]] for b, row in zip(base, R.to_numpy(), strict=True)])
            means.append(((ranks.to_numpy() - 4.5) * (mixed - 4.5)).sum() / 42 / len(R))
        limit = round(float(np.quantile(means, 0.95)), 3)
        rows += [{"arm": arm, "base": b, "order": o, "rho": round(v, 3), "limit": limit} for (b, o), v in rho.items()]
    return pd.DataFrame(rows)


def choose(kept: Work, arm: str, settings: dict) -> list[dict]:
    """Losses of base 0 by learning rate; the grid goes on while its best is at an end."""

    def measured(lr: float) -> float:
        found = kept.once(f"rate {arm} {lr:g}", lambda: tuned(0, GRID_ORDER, lr, settings, "choose"))
        return found["rows"][-1]["loss"]

    losses = widened(measured, GRID)
    return [{"arm": arm, "lr": lr, "loss": value} for lr, value in sorted(losses.items())]


def best_two(found: dict) -> tuple[int, ...]:
    """The two layers without whose adapters the loss rises most."""
    return tuple(sorted(torch.tensor(found["left out"]).topk(2).indices.tolist()))


def rated(kept: Work) -> tuple[list[dict], dict[str, float]]:
    """Losses by arm and learning rate, and the best rate of every arm."""
    rows = []
    for arm, settings in {**ARMS, **BUDGETS}.items():
        if arm == "best two":
            whole = min((row for row in rows if row["arm"] == "all layers"), key=lambda row: row["loss"])
            args = 0, GRID_ORDER, whole["lr"], ARMS["all layers"], "choose"
            settings = {**settings, "fixed": best_two(kept.once("whole", lambda args=args: tuned(*args)))}
        if arm not in ("IST", "IST, every 2"):  # both take the rate of the other IST
            rows += choose(kept, arm, settings)
    table = pd.DataFrame(rows)
    lrs = table.loc[table.groupby("arm")["loss"].idxmin()].set_index("arm")["lr"].to_dict()
    lrs |= dict.fromkeys(("IST", "IST, every 2"), lrs["IST, mu scaled"])
    return rows, lrs


def build(out: Path, work: Path, seeds: int) -> list[Path]:
    from nbkit import runtime

    runtime.deterministic(seed=0)
    torch.set_num_threads(1)
    kept = Work(work)
    rates, lrs = rated(kept)
    curves, scores, drawn, without = [], [], [], []
    for base, order in RUNS[:seeds]:
        key = {"base": base, "order": order}
        fixed = ()
        for arm, settings in {**ARMS, **(BUDGETS if order == 0 else {})}.items():
            args = base, order, lrs[arm], {**settings, "fixed": fixed} if arm == "best two" else settings
            found = kept.once(f"{base} {order} {arm}", lambda args=args: tuned(*args))
            if arm == "all layers":
                fixed = best_two(found)
                without += [{**key, "layer": i, "rise": rise} for i, rise in enumerate(found["left out"])]
            curves += [{**key, "arm": arm, **row} for row in found["rows"]]
            if arm.startswith("IST"):
                scores += [
                    {**key, "arm": arm, "step": row["step"], "layer": i, "a": value}
                    for row in found["a"]
                    for i, value in enumerate(row["a"])
                ]
            times = pd.Series([i for step in found["layers"] for i in step]).value_counts()
            drawn += [{**key, "arm": arm, "layer": i, "steps": int(times.get(i, 0))} for i in ALL]
    begun = [{"base": b, "loss": kept.once(f"{b} untuned", lambda b=b: loss(*_untuned(b)))} for b in (0, 1)]
    tables = {"rates": rates, "untuned": begun, "losses": curves, "scores": scores, "trained": drawn}
    tables |= {"left_out": without, "agreement": agreement(pd.DataFrame(scores), pd.DataFrame(without))}
    for name, rows in tables.items():
        write_table(out / f"{name}.csv", pd.DataFrame(rows))
    return [out / f"{name}.csv" for name in tables]


def _untuned(base: int):
    _, model, texts = begin(base)
    return model, texts["test"]


if __name__ == "__main__":
    run(build, __doc__, work=work_option(NAME), seeds=seeds_option(len(RUNS), "runs"))
