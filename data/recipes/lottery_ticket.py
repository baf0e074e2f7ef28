"""results/lottery-ticket.csv, checkpoints/lottery-ticket-seed{0,1,2}.safetensors: all trainings of its notebook.

For LeNet-300-100 and a small convolutional network, three seeds each: iterative magnitude pruning, and controls at some
rounds; then one mask (round 15 of LeNet) with three times the training iterations. The functions are the method cells
of notebooks/06-pruning/01-lottery-ticket. About 25 minutes on one core; a run that was stopped goes on where it was
(delete the folder --work for a fresh start). The convolutional network's masks are not stored.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path

import pandas as pd
from _recipe import run, seeds_option, work_option, write_bytes, write_table
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

CONTROLS = {
    "LeNet-300-100": {
        "reinit": (1, 3, 5, 6, 7, 8, 9, 11, 13, 15, 17),
        "random mask": (1, 3, 5, 7, 9, 11, 13, 15, 17),
        "one-shot": (3, 7, 11, 15),
        "fine-tune": (3, 7, 11, 15),
    },
    "small conv": {"reinit": (3, 6, 9, 12, 15), "random mask": (3, 6, 9, 12, 15)},
}
LONG = 15, 6000  # round, iterations
EVALUATIONS = 40


class Trainings:
    """Every training of one network and seed, each kept in a file of ``work`` so that none is done twice."""

    def __init__(self, method, name: str, seed: int, data: dict, work: Path):
        self.method, self.name, self.seed, self.data, self.work = method, name, seed, data, work
        self.build, self.per_layer, self.j, self.rounds = method.SETTINGS[name]
        self.rows: list[dict] = []

    def once(self, control: str, r: int, j: int, model, m, *, keep: bool = False) -> None:
        """Train ``model`` under ``m`` unless that was done; ``keep`` stores the trained weights as well."""
        from nbkit.training import History

        key = f"{self.name}-{self.seed}-{control}-{r}-{j}".replace(" ", "_")
        path, every = self.work / f"{key}.safetensors", max(50, j // EVALUATIONS)
        if path.is_file():
            with safe_open(path, "pt") as file:
                history = History(evaluations=json.loads(file.metadata()["evaluations"]))
            if keep:
                model.load_state_dict(load_file(path))
        else:
            began = time.process_time()
            history = self.method.train(model, m, self.data, j=j, seed=self.seed, every=every)
            part = path.with_suffix(".part")
            state = self.method.state_of(model) if keep else {}
            save_file(state, part, {"evaluations": json.dumps(history.evaluations)})
            part.replace(path)
            print(f"{key}: {time.process_time() - began:.1f} s", flush=True)
        best, last = history.best("val_loss"), history.evaluations[-1]
        row = {"network": self.name, "seed": self.seed, "control": control, "round": r}
        row |= {"p_m": round(100 * (1 - m.sparsity), 3), "j": j, "every": every, "stop": best["step"]}
        row |= {"accuracy": round(best["test_accuracy"], 4), "final": round(last["test_accuracy"], 4)}
        self.rows.append(row | {f"v{i}": round(e["val_loss"], 4) for i, e in enumerate(history.evaluations, 1)})

    def all(self) -> tuple[dict, list]:
        """Fill ``rows``; returns theta_0 and the rounds of the search."""
        model, done = self.build(self.seed), []

        def train(model, m):
            self.once("ticket", len(done), self.j, model, m, keep=True)
            done.append(m)

        theta_0 = self.method.state_of(model)
        found = self.method.find_tickets(model, train, rounds=self.rounds, per_layer=self.per_layer)
        for r in range(1, self.rounds + 1):
            chosen = [control for control, rounds in CONTROLS[self.name].items() if r in rounds]
            self.control(found, r, theta_0, chosen, self.j)
        if self.name == "LeNet-300-100":
            self.once("ticket", 0, LONG[1], self.build(self.seed), found[0].m)
            self.control(found, LONG[0], theta_0, ["ticket", "reinit", "random mask"], LONG[1])
        return theta_0, found

    def control(self, found: list, r: int, theta_0: dict, controls: Iterable[str], j: int) -> None:
        fresh = self.method.state_of(self.build(1000 * r + self.seed))
        beginnings = self.method.starts(found, r, theta_0, fresh, seed=1000 * r + self.seed)
        for control in controls:
            m, state = beginnings[control]
            self.once(control, r, j, m.rewind(self.build(self.seed), state), m)


def store(theta_0: dict, found: list, path: Path) -> None:
    """theta_0 in float16, which is exact, and the number of rounds each weight survived."""
    from nbkit import sparsity

    survived = sparsity.rounds_survived([r.m for r in found])
    tensors = {f"theta_0.{name}": value.half() for name, value in theta_0.items()}
    tensors |= {f"survived.{name}": rounds for name, rounds in survived.items()}
    write_bytes(path, save(tensors, {"recipe": "lottery_ticket.py"}))


def build(out: Path, work: Path, seeds: int) -> list[Path]:
    from nbkit import datasets, papers, runtime

    runtime.deterministic(seed=0)
    method = papers.method("lottery-ticket")
    data = method.split(datasets.load("mnist"))
    work.mkdir(parents=True, exist_ok=True)
    rows, paths = [], []
    for name in method.SETTINGS:
        for seed in range(seeds):
            trainings = Trainings(method, name, seed, data, work)
            theta_0, found = trainings.all()
            rows += trainings.rows
            if name == "LeNet-300-100":
                paths.append(out / "checkpoints" / f"lottery-ticket-seed{seed}.safetensors")
                store(theta_0, found, paths[-1])
    path = out / "results" / "lottery-ticket.csv"
    write_table(path, pd.DataFrame(rows))
    return [path, *paths]


if __name__ == "__main__":
    run(build, __doc__, work=work_option("lottery-ticket"), seeds=seeds_option(3))
