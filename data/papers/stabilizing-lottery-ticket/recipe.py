"""results.csv: LeNet-300-100 on MNIST, wound back to the steps 0, 8 and 40 of 400; how far apart its trainings end.

For three seeds and each k: the masks of five rounds of magnitude pruning, and for those of two rounds, with shuffled
masks beside them, two trainings in fresh orders of the data and the dense network in the first of them. At the last k
also with as many steps after winding back as from step 0, and at k = 0 the mask of the lottery-ticket paper's recipe.
The functions are the method cells of notebooks/06-pruning/02-stabilizing-lottery-ticket. About 4 minutes on one core; a
run that was stopped goes on where it was (delete the folder --work for a fresh start).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from nbkit.recipes import Work, run, seeds_option, work_option, write_table

KS = (0, 8, 40)
ROUNDS = (2, 5)
SHIPPED = 10  # the round of the lottery ticket's masks that keeps as many weights


def fresh(seed: int) -> tuple[int, int]:
    """Two orders of the data that no mask was chosen under."""
    return 100 + seed, 200 + seed


class Cell:
    """One seed and one k; ``rows`` measures it."""

    def __init__(self, seed: int, k: int):
        from nbkit import datasets, papers

        self.seed, self.k = seed, k
        self.method = papers.method("stabilizing-lottery-ticket")
        parts = papers.method("lottery-ticket").split(datasets.load("mnist"))
        self.data, self.test = parts["train"], parts["test"]
        self.model = self.method.lenet(seed)

    def rows(self) -> list[dict]:
        f, k, u1 = self.method, self.k, fresh(self.seed)[0]
        where = {"k": k, "T": f.T, "u": self.seed}
        self.w_k, masks = f.find(self.model, self.data, **where, rounds=max(ROUNDS), rate=f.P, per_layer=f.OUTPUT)
        whole = masks[0].rewind(self.model, self.w_k)
        self.dense = f.train(whole, masks[0], self.data, k=k, T=f.T, u=u1)
        found = [{"mask": "dense", "round": 0, "accuracy": self.accuracy(self.dense)}]
        for r in ROUNDS:
            found.append({"mask": "IMP", "round": r} | self.measured(masks[r]))
            for draw in range(2 if r == ROUNDS[-1] else 1):
                m = masks[r].shuffled(1000 * (draw + 1) + 10 * self.seed + r)
                found.append({"mask": "random", "draw": draw, "round": r} | self.measured(m))
            if k == KS[-1]:
                found.append({"mask": "IMP, T steps", "round": r} | self.longer(masks[r]))
        if k == 0 and self.seed == 0:
            found.append({"mask": "shipped", "round": SHIPPED} | self.measured(shipped()))
        return [{"seed": self.seed, "k": k} | row for row in found]

    def accuracy(self, state: dict) -> float:
        from nbkit import training

        self.model.load_state_dict(state)
        return round(training.accuracy(self.model, *self.test), 4)

    def measured(self, m) -> dict:
        f, orders = self.method, fresh(self.seed)
        d, angles, subs = f.stability(self.model, self.w_k, m, self.dense, self.data, k=self.k, T=f.T, orders=orders)
        row = {"kept": round(100 * (1 - m.sparsity), 3), "norm": norm(f, subs[0], m)}
        row["accuracy"] = round(float(np.mean([self.accuracy(sub) for sub in subs])), 4)
        for pair, layers in d.items():
            row |= {f"{pair} {name.removesuffix('.weight')}": round(value, 4) for name, value in layers.items()}
            row[f"{pair} angle"] = round(angles[pair], 3)
        return row

    def longer(self, m) -> dict:
        """T steps after W_k, as many as from step 0."""
        f = self.method
        settings = {"k": self.k, "T": f.T + self.k}
        subs = [f.train(m.rewind(self.model, self.w_k), m, self.data, **settings, u=u) for u in fresh(self.seed)]
        return {"kept": round(100 * (1 - m.sparsity), 3), "order all": round(f.distance(*subs, m)["all"], 4)}


def norm(f, state: dict, m) -> float:
    """||m * W||_2."""
    return round(f.distance(state, {name: 0 * value for name, value in state.items()}, m)["all"], 4)


def shipped():
    """The mask that the lottery ticket's recipe found for seed 0: ten rounds of 20 %, 2,000 steps each."""
    from nbkit import papers, sparsity

    return sparsity.mask_of_round(papers.tensors("lottery-ticket", "survived"), SHIPPED)


def by_chance(rows: int, least: float, draws: int = 100_000) -> float:
    """How often Spearman's correlation of ``rows`` pairs in chance order is at least ``least``."""
    generator = np.random.default_rng(0)
    order = generator.permuted(np.tile(np.arange(rows), (draws, 1)), axis=1)
    apart = ((order - np.arange(rows)) ** 2).sum(1)
    return float(np.mean(1 - 6 * apart / (rows * (rows**2 - 1)) >= least - 1e-9))


def build(out: Path, work: Path, seeds: int) -> list[Path]:
    from nbkit import runtime

    runtime.deterministic(seed=0)
    done = Work(work)
    rows = []
    for seed in range(seeds):
        for k in KS:
            rows += done.once(f"seed {seed} k {k}", Cell(seed, k).rows)
    path = out / "results.csv"
    write_table(path, pd.DataFrame(rows))
    return [path]


if __name__ == "__main__":
    run(build, __doc__, work=work_option("stabilizing-lottery-ticket"), seeds=seeds_option(3))
