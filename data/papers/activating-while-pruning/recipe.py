"""results.csv, cuts.csv, masks.safetensors: all trainings of notebooks/06-pruning/05-activating-while-pruning.

An MLP on 5,000 Fashion-MNIST pictures of 14 x 14 pixels, fourteen cycles, five ways to choose the last tenth of each
cut, three seeds. Seed 0 is run at three learning rates; the one that is best on held-back pictures is used for the
other seeds, for each way its own. The functions are the notebook's own method cells. About 5 minutes on one core; a run
that was stopped goes on where it was.

cuts.csv says what a cut alone does to the dead neuron rate: on the networks of the AP runs, before they are trained
again, the last tenth is chosen in every way, the random ones nine times. chance.csv says how often noise passes the
rules of claims 1, 4 and 5 (``--part chance`` makes it alone).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from nbkit.recipes import Work, part_option, run, work_option, write_table

SLUG = "activating-while-pruning"
NUMBER = 13  # cycles after the dense one
SPARSE = (11, 12, 13)  # those with at most 10 % of the weights left
STEPS, EVERY = 260, 52  # of one training
RATES = (0.025, 0.05, 0.1)
SHOWN = ("X", "AP", "negative")  # the masks of these are stored ...
DRAWS = 9  # random cuts beside each AP cut
STORED = (6, 12)  # ... for seed 0, after so many cuts


class Runs:
    """Every run of cycles, each kept in a file of ``work`` so that none is done twice."""

    def __init__(self, method, work: Work):
        from nbkit import datasets

        self.method, self.work, self.data = method, work, method.pictures(datasets.load("fashion-mnist"))

    def once(self, arm: str, seed: int, lr: float) -> dict:
        return self.work.once(f"{arm}-{seed}-{lr}-one", lambda: self.measure(arm, seed, lr))

    def measure(self, arm: str, seed: int, lr: float) -> dict:
        """``rows`` of results.csv, ``cuts`` of cuts.csv, ``masks`` as hexadecimal bits."""
        from nbkit import training

        method, data = self.method, self.data
        net, found = method.mlp(seed), {"rows": [], "cuts": [], "masks": {}}

        def train(model, masks):
            return method.train(model, masks, data["train"], steps=STEPS, lr=lr, seed=seed, watch=data["watch"],
                                every=EVERY)  # fmt: skip

        label = {"arm": arm, "seed": seed, "lr": lr}
        runs = method.cycles(net, train, number=NUMBER, step=arm, seed=seed)
        for cycle, (masks, start, result) in enumerate(runs):
            rates = method.dnr(net, data["watch"])
            row = label | {"cycle": cycle, "left": round(100 * (1 - masks.sparsity), 3)}
            row |= {"accuracy": round(100 * training.accuracy(net, *data["test"]), 2)}
            row |= {"held back": round(100 * training.accuracy(net, *data["val"]), 2)}
            row |= {f"dynamic {name}": round(value, 5) for name, value in rates["dynamic"].items()}
            row |= {"cut off": sum(int((~m.any(1)).sum()) for m in list(masks.values())[:-1])}
            row |= {"static": round(rates.loc["all", "static"], 5), "during": round(result["dynamic"].mean(), 5)}
            found["rows"].append(row)
            if arm == "AP" and cycle < NUMBER:
                found["cuts"] += self.cuts(net, masks, start, cycle, label)
            if seed == 0 and arm in SHOWN and cycle in STORED:
                bits = {name: np.packbits(mask.numpy()).tobytes().hex() for name, mask in masks.items()}
                found["masks"] |= {f"{arm}/{cycle}/{name}": text for name, text in bits.items()}
        return found

    def cuts(self, net, masks, start, cycle: int, label: dict) -> list[dict]:
        """What the last tenth of the cut after ``cycle`` does to the dynamic DNR, chosen in every way."""
        from nbkit import training

        method, now, rows = self.method, training.state(net), []

        def rate(cut) -> float:
            cut.rewind(net, now)
            return method.dnr(net, self.data["watch"]).loc["all", "dynamic"]

        before = rate(method.prune(masks, now, start, p=method.P - method.Q, q=0))
        for step in method.STEPS:
            for draw in range(DRAWS if step in ("random", "negative") else 1):
                after = rate(method.prune(masks, now, start, step=step, seed=100 * cycle + draw))
                rows.append(label | {"cycle": cycle, "step": step, "draw": draw, "drop": round(before - after, 6)})
        net.load_state_dict(now)
        return rows


def best_rate(rows: pd.DataFrame) -> dict[str, float]:
    """Arm -> the rate with the best held-back accuracy at the sparse cycles of seed 0."""
    sparse = rows[rows["cycle"].isin(SPARSE) & rows["seed"].eq(0)]
    return sparse.pivot_table("held back", "arm", "lr").idxmax(axis=1).to_dict()


def trainings(method, work: Path) -> tuple[pd.DataFrame, pd.DataFrame, dict]:
    """results.csv, cuts.csv and the masks."""
    runs = Runs(method, Work(work))
    found = {(arm, 0, lr): runs.once(arm, 0, lr) for lr in RATES for arm in method.STEPS}
    best = best_rate(pd.DataFrame([row for part in found.values() for row in part["rows"]]))
    for seed in (1, 2):
        found |= {(arm, seed, best[arm]): runs.once(arm, seed, best[arm]) for arm in method.STEPS}
    own = {key: part for key, part in found.items() if key[2] == best[key[0]]}
    masks = {name: bits for (arm, *_), part in own.items() if arm in SHOWN for name, bits in part["masks"].items()}
    rows = pd.DataFrame([row for part in found.values() for row in part["rows"]])
    cuts = pd.DataFrame([row for part in own.values() for row in part["cuts"]])
    return rows.drop(columns="trainings", errors="ignore"), cuts[["seed", "cycle", "step", "draw", "drop"]], masks


def unpacked(bits: dict[str, str], weights: dict):
    """Masks named arm/cycle/parameter."""
    import torch

    from nbkit import sparsity

    masks = {}
    for name, text in bits.items():
        shape = weights[name.rpartition("/")[2]].shape
        flat = np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8), count=shape.numel())
        masks[name] = torch.from_numpy(flat.astype(bool)).view(shape)
    return sparsity.Masks(masks)


# How often noise passes a rule: labels are dealt anew within each seed.


def falls(values: np.ndarray) -> bool:
    """Claim 1, [seeds, cycles]: all sparse cycles below the dense one, and the means fall with the cycle."""
    ranks = values.mean(axis=0).argsort().argsort()
    correlation = np.corrcoef(np.arange(values.shape[1]), ranks)[0, 1]
    return bool((values[:, SPARSE] < values[:, :1]).all() and correlation <= -0.6)


def lowest(values: np.ndarray) -> bool:
    """Claim 4, [seeds, arms]: the first arm below the others in every seed."""
    return bool((values[:, :1] < values[:, 1:]).all())


def best(values: np.ndarray) -> bool:
    """Claim 5, [seeds, arms]: the first arm above the others in every seed, and by 0.3 points in the mean."""
    lead = values[:, :1] - values[:, 1:]
    return bool((lead > 0).all() and lead.mean(axis=0).min() >= 0.3)


def by_chance(rule, values: np.ndarray, draws: int = 10_000) -> float:
    generator = np.random.default_rng(0)
    passed = sum(rule(generator.permuted(values, axis=1)) for _ in range(draws))
    return max(passed, 1) / draws  # never counts as once


def chances(table: pd.DataFrame) -> pd.DataFrame:
    """Claim, case, by_chance."""
    rates = best_rate(table)
    own = table[table["lr"] == table["arm"].map(rates)]
    rows = []
    for measure, case in (("dynamic all", "after training"), ("during", "during training")):
        x = own[own["arm"] == "X"].pivot(index="seed", columns="cycle", values=measure)
        rows.append(["DNR falls", case, by_chance(falls, x.to_numpy())])
    sparse = own[own["cycle"].isin(SPARSE)]
    for claim, rule, measure in (("lower DNR", lowest, "dynamic all"), ("accuracy", best, "accuracy")):
        arms = sparse.pivot_table(measure, "seed", "arm")[["AP", "X", "negative"]]
        rows.append([claim, "sparse cycles", by_chance(rule, arms.to_numpy())])
    return pd.DataFrame(rows, columns=["claim", "case", "by_chance"])


def build(out: Path, work: Path, part: str) -> list[Path]:
    from nbkit import papers, runtime, sparsity

    runtime.deterministic(seed=0)
    results, cuts, masks, chance = (out / n for n in ("results.csv", "cuts.csv", "masks.safetensors", "chance.csv"))
    if part == "all":
        method = papers.method(SLUG)
        rows, drops, bits = trainings(method, work)
        write_table(results, rows)
        write_table(cuts, drops)
        unpacked(bits, sparsity.prunable(method.mlp(0))).save(masks)
    write_table(chance, chances(pd.read_csv(results)))
    return [results, cuts, masks, chance] if part == "all" else [chance]


if __name__ == "__main__":
    run(build, __doc__, work=work_option(SLUG), part=part_option("chance"))
