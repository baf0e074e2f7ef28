"""results.csv, rates.csv, elsewhere.csv, budgets.csv, times.csv: the trainings of notebooks/06-pruning/04-sparseland.

Four ways to a sparse 784-512-256-10, and two small dense nets, on 9,000 pictures of Fashion-MNIST, at four densities,
three seeds, 160 iterations each. rates.csv: how each learning rate was chosen, on 1,000 pictures held back and with
another seed (100), at 20 and 2 % (a rate serves 50 and 20 %, or 5 and 2 %; the small dense nets have one a density).
elsewhere.csv: three times the iterations, a larger rate, the digits. budgets.csv: equal training cost at 20 %.
times.csv: one layer's forward pass, of no use on another machine. The functions are the notebook's method cells. About
4 minutes on one core; a run that was stopped goes on where it was.
"""

from __future__ import annotations

import time
from pathlib import Path

import pandas as pd

from nbkit.recipes import Work, part_option, run, seeds_option, work_option, write_table

DENSITIES = (0.02, 0.05, 0.2, 0.5)
RATES = (0.01, 0.03, 0.1, 0.3)  # above 5 % the first three, else the last three; small dense nets get all
STEPS = 160
TUNED = {0.5: 0.2, 0.2: 0.2, 0.05: 0.02, 0.02: 0.02}  # density -> where its learning rate is chosen
TRIAL = 100  # the seed of that
ARMS = {"static ERK": "static", "SET": "SET", "RigL": "RigL", "GMP": "GMP"}
SMALL = ("small dense", "small dense, even")
FIXED = {"dense": 1.0}  # of one density
SHARE = 0.2  # the density of the equal budgets
LONGER = 480  # iterations, with masks that move every 30


def where(name: str, density: float) -> float:
    """The density at which this method's learning rate was chosen."""
    return density if name in SMALL or name in FIXED else TUNED[density]


class Trainings:
    def __init__(self, work: Work):
        from nbkit import datasets, papers

        self.method, self.work = papers.method("sparseland"), work
        self.data = self.method.split(datasets.load("fashion-mnist"))

    def once(self, name: str, density: float, seed: int, lr: float, steps: int) -> dict:
        """One training; test accuracy only where the seed is not the trial's."""
        key = f"{name}-{density}-{seed}-{lr}-{steps}".replace(",", "")
        return self.work.once(key, lambda: self.train(name, density, seed, lr, steps))

    def train(self, name: str, density: float, seed: int, lr: float, steps: int) -> dict:
        from nbkit import sparsity, training

        settings = {"lr": lr, "seed": seed, "steps": steps}
        settings |= {"dt": LONGER // 16} if steps == LONGER else {}
        model, history, held = self.method.experiment(ARMS.get(name, name), density, self.data, **settings)
        last = history.evaluations[-1]
        row = {"method": name, "density": density, "seed": seed, "lr": lr, "steps": steps}
        row |= {"val": last["val_accuracy"], "weights": sum(held[-1].kept().values())}
        row["cost"] = round(self.cost(name, density, held), 3)
        row["explored"] = 1.0 if name in SMALL else round(self.method.explored(held), 6)
        if seed != TRIAL:
            row["test"] = last["test_accuracy"]
        if name == "dense" and seed != TRIAL:  # pruned, not tuned
            for d in DENSITIES:
                masks = sparsity.magnitude_mask(model, 1 - d, min_keep=1)
                masks.apply(model)
                row[f"pruned {d}"] = training.accuracy(model, *self.data["test"])
                masks.remove(model)
        return row

    def digits(self, name: str, density: float, seed: int, lr: float) -> dict:
        """As the notebook's explorer: 64-128-64-10 on the digits, 200 iterations, moves 20 apart."""
        key = f"digits-{name}-{density}-{seed}-{lr}"
        return self.work.once(key, lambda: self.train_digits(name, density, seed, lr))

    def train_digits(self, name: str, density: float, seed: int, lr: float) -> dict:
        from nbkit import datasets

        digits = datasets.load("digits")
        parts = {"train": slice(0, 1197), "val": slice(1197, 1497), "test": slice(1497, None)}
        data = {part: (digits.x[rows], digits.y[rows]) for part, rows in parts.items()}
        settings = {"lr": lr, "seed": seed, "steps": 200, "dt": 20, "widths": (64, 128, 64, 10)}
        _, history, held = self.method.experiment(ARMS[name], density, data, **settings)
        row = {"method": name, "density": density, "seed": seed, "lr": lr, "steps": 200}
        row |= {"val": history.evaluations[-1]["val_accuracy"], "explored": round(self.method.explored(held), 6)}
        return row | ({"test": round(history.evaluations[-1]["test_accuracy"], 4)} if seed != TRIAL else {})

    def cost(self, name: str, density: float, held: list) -> float:
        """Multiply-adds of the training, in iterations of the wide dense net; RigL pays for its dense gradients."""
        weights = {id(m): sum(m.kept().values()) for m in held}
        spent = sum(weights[id(m)] for m in held) / self.method.weights_of(self.method.WIDTHS)
        moves = sum(a is not b for a, b in zip(held, held[1:], strict=False))
        return spent + (moves * (1 - density) / 3 if name == "RigL" else 0)


def grid(name: str, density: float) -> tuple[float, ...]:
    return RATES if name in SMALL else RATES[:3] if density > 0.05 else RATES[1:]


def rates(trainings: Trainings) -> pd.DataFrame:
    """The validation accuracy of every method at every learning rate."""
    cases = [(name, d) for name in ARMS for d in sorted(set(TUNED.values()))]
    cases += [(name, d) for name in SMALL for d in DENSITIES] + list(FIXED.items())
    rows = [trainings.once(name, d, TRIAL, lr, STEPS) for name, d in cases for lr in grid(name, d)]
    return pd.DataFrame(rows)[["method", "density", "lr", "val"]]


def best(table: pd.DataFrame) -> dict[tuple[str, float], float]:
    """(method, density) -> the learning rate of the highest validation accuracy; the smaller of equals."""
    table = table.sort_values(["val", "lr"], ascending=[False, True]).groupby(["method", "density"]).first()
    return table["lr"].to_dict()


def results(trainings: Trainings, lr: dict, seeds: int) -> pd.DataFrame:
    cases = list(FIXED.items()) + [(name, d) for d in DENSITIES for name in (*ARMS, *SMALL)]
    rows = [trainings.once(n, d, s, lr[n, where(n, d)], STEPS) for n, d in cases for s in range(seeds)]
    dense = [row for row in rows if row["method"] == "dense"]
    rows += [
        {"method": "prune only", "density": d, "seed": row["seed"], "lr": row["lr"], "steps": STEPS,
         "test": row[f"pruned {d}"], "explored": 1.0, "cost": row["cost"], "weights": round(d * row["weights"])}
        for d in DENSITIES for row in dense
    ]  # fmt: skip
    columns = ["method", "density", "seed", "lr", "steps", "val", "test", "explored", "cost", "weights"]
    return pd.DataFrame(rows)[columns]


def elsewhere(trainings: Trainings, lr: dict, seeds: int) -> pd.DataFrame:
    """Does it hold with three times the iterations (as many moves, three times as far apart), with a larger rate than
    the grid has, and on the digits? What is not static is compared with it from the same first masks."""
    names, random = ("static ERK", "SET", "RigL", "small dense, even"), ("static ERK", "SET", "RigL")
    cases = [("480 iterations, 2 %", n, 0.02, lr[n, 0.02], LONGER) for n in names]
    cases += [(f"rate 0.5, {d:.0%}".replace("%", " %"), n, d, 0.5, STEPS) for d in (0.02, 0.05) for n in random[:2]]
    rows = [{"case": c[0]} | trainings.once(*c[1:3], seed, *c[3:]) for c in cases for seed in range(seeds)]
    for name in random:
        for d in (0.02, 0.05):
            trials = {rate: trainings.digits(name, d, TRIAL, rate)["val"] for rate in grid(name, d)}
            case = {"case": f"digits, {d:.0%}".replace("%", " %")}
            rows += [case | trainings.digits(name, d, seed, max(trials, key=trials.get)) for seed in range(seeds)]
    return pd.DataFrame(rows)[["case", "method", "density", "seed", "lr", "steps", "explored", "test"]]


def budgets(trainings: Trainings, lr: dict, seeds: int) -> pd.DataFrame:
    """What a fifth of the iterations makes of the dense net, at the best of three rates for so few, and what the same
    multiply-adds buy at 20 %: all iterations."""
    few = round(SHARE * STEPS)
    trials = {rate: trainings.once("dense", 1.0, TRIAL, rate, few)["val"] for rate in grid("dense", 1.0)}
    cases = [("dense", 1.0, max(trials, key=trials.get), few)]
    cases += [(n, SHARE, lr[n, SHARE], STEPS) for n in (*ARMS, *SMALL) if n != "GMP"]
    rows = [trainings.once(n, d, seed, rate, steps) for n, d, rate, steps in cases for seed in range(seeds)]
    return pd.DataFrame(rows)[["method", "seed", "steps", "lr", "cost", "test"]]


def times(trainings: Trainings) -> pd.DataFrame:
    """Medians of 40 forward passes of a 512 x 784 layer with 64 pictures, in turn, in microseconds."""
    import torch

    method, x = trainings.method, trainings.data["train"][0][:64].flatten(1)
    rows = []
    for density in (0.5, 0.2, 0.1, 0.05, 0.02, 0.01):
        layer = torch.nn.Sequential(torch.nn.Linear(784, 512))
        weight = layer[0].weight.detach()
        mask = method.random_masks(layer, density, "uniform")["0.weight"].float()
        csr, fewer = (weight * mask).to_sparse_csr(), weight[: round(512 * density)].contiguous()
        ways = {
            "dense": lambda w=weight: x @ w.T,
            "masked dense": lambda w=weight, m=mask: x @ (w * m).T,
            "sparse (CSR)": lambda w=csr: w @ x.T,
            "fewer units": lambda w=fewer: x @ w.T,
        }
        taken = {name: [] for name in ways}
        for _ in range(45):
            for name, call in ways.items():
                began = time.perf_counter()
                call()
                taken[name].append(1e6 * (time.perf_counter() - began))
        for name, each in taken.items():
            rows.append({"way": name, "density": density, "microseconds": round(pd.Series(each[5:]).median())})
    return pd.DataFrame(rows)


def build(out: Path, work: Path, seeds: int = 3, part: str = "all") -> list[Path]:
    from nbkit import runtime

    runtime.deterministic(seed=0)
    trainings = Trainings(Work(work))
    if part == "times":
        write_table(out / "times.csv", times(trainings))
        return [out / "times.csv"]
    chosen = rates(trainings)
    lr = best(chosen)
    tables = {"rates": chosen, "results": results(trainings, lr, seeds), "budgets": budgets(trainings, lr, seeds)}
    tables |= {"elsewhere": elsewhere(trainings, lr, seeds), "times": times(trainings)}
    for name, table in tables.items():
        write_table(out / f"{name}.csv", table)
    return [out / f"{name}.csv" for name in tables]


if __name__ == "__main__":
    run(build, __doc__, work=work_option("sparseland"), seeds=seeds_option(3), part=part_option("times"))
