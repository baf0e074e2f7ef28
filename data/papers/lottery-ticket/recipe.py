"""results.csv, survived.safetensors, chance.csv: all trainings of notebooks/06-pruning/01-lottery-ticket.

For LeNet-300-100 and a small convolutional network, three seeds each: iterative magnitude pruning, and controls at some
rounds. For LeNet also one mask (round 15) with three times the training iterations and with three larger learning
rates, parts of the initial values taken apart, and twelve more dense networks. The functions are the notebook's own
method cells. About 25 minutes on one core; a run that was stopped goes on where it was (delete the folder --work for a
fresh start). Of the masks those of LeNet with seed 0 are stored; initial values are not, since `draw` makes them again.

chance.csv says how often noise passes the rules of the notebook's claims; ``--part chance`` makes it alone.

Sums round differently from machine to machine, and training lets that grow. ``--part again``, on another machine, makes
again.csv of two searches and a dense network. results.csv was made on both: on the second came "both redrawn", one-shot
at rounds 9, 13 and 17, the values taken apart, the other learning rates and more dense networks, for seeds 1 and 2 with
the masks that were found again there.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file

from nbkit.recipes import Work, part_option, run, seeds_option, work_option, write_table, write_tensors

LENET = "LeNet-300-100"
CONTROLS = {
    LENET: {
        "reinit": (1, 3, 5, 6, 7, 8, 9, 11, 13, 15, 17),
        "random mask": (1, 3, 5, 7, 9, 11, 13, 15, 17),
        "both redrawn": (3, 7, 11, 15),
        "one-shot": (3, 7, 9, 11, 13, 15, 17),
        "no last reset": (3, 7, 11, 15),
        "old signs": (15,),
        "old sizes": (15,),
        "shuffled values": (15,),
        "largest at birth": (15,),
    },
    "small conv": {"reinit": (3, 6, 9, 12, 15), "random mask": (3, 6, 9, 12, 15)},
}
LAST = 15  # the round that is also trained longer, and at other learning rates
LONG = 6000  # iterations
LR, RATES = 1.2e-3, (2.4e-3, 4.8e-3, 9.6e-3)
DENSE = 15  # seeds of the dense network
EVALUATIONS = 40
ORDER = ["network", "j", "lr", "seed", "round", "control"]


def conv(method, seed: int):
    """Two 5 x 5 convolutions of stride 2 (8 and 16 maps), then 64 units: 54,216 weights."""
    from nbkit import models

    return method.draw(models.build("lenet-conv", seed=0), seed)


def settings(method) -> dict[str, tuple]:
    """Network -> how it is built, layers with a pruning rate of their own, iterations j, rounds of pruning."""
    half = method.P / 2
    return {
        LENET: (method.lenet, {"fc3": half}, 2000, 17),
        "small conv": (partial(conv, method), {"conv1": half, "conv2": half, "fc2": half}, 1000, 15),
    }


class Trainings:
    """Every training of one network and seed, each kept in a file of ``work`` so that none is done twice."""

    def __init__(self, method, name: str, seed: int, data: dict, work: Work):
        self.method, self.name, self.seed, self.data, self.work = method, name, seed, data, work
        self.build, self.per_layer, self.j, self.rounds = settings(method)[name]
        self.rows: list[dict] = []

    def once(self, control: str, r: int, model, m, *, j: int = 0, lr: float = LR, keep: bool = False) -> None:
        """Train ``model`` under ``m`` unless that was done; ``keep`` stores the trained weights as well."""
        j = j or self.j
        every = max(50, j // EVALUATIONS)
        key = f"{self.name}-{self.seed}-{control}-{r}-{j}-{lr}".replace(" ", "_")
        weights = self.work.folder / f"{key}.safetensors" if keep else None
        settings = {"j": j, "lr": lr, "every": every}
        history = pd.DataFrame(self.work.once(key, partial(self.train, model, m, weights, **settings)))
        if weights:
            model.load_state_dict(load_file(weights))
        best, last = history.loc[history["val_loss"].idxmin()], history.iloc[-1]
        row = {"network": self.name, "seed": self.seed, "control": control, "round": r}
        row |= {"p_m": round(100 * (1 - m.sparsity), 3), "j": j, "lr": lr, "every": every, "stop": int(best["step"])}
        row |= {"accuracy": round(best["test_accuracy"], 4), "final": round(last["test_accuracy"], 4)}
        self.rows.append(row | {f"v{i}": round(loss, 4) for i, loss in enumerate(history["val_loss"], 1)})

    def train(self, model, m, weights: Path | None, **settings) -> list[dict]:
        from nbkit import training

        history = self.method.train(model, m, self.data, seed=self.seed, **settings)
        if weights:
            write_tensors(weights, training.state(model))
        return history.to_dict("records")

    def search(self) -> list:
        """Iterative magnitude pruning; fills ``rows`` with the tickets' and returns the rounds."""
        from nbkit import sparsity

        done = []

        def train(model, m):
            self.once("ticket", len(done), model, m, keep=True)
            done.append(m)

        return sparsity.iterative_magnitude(
            self.build(self.seed), train, rounds=self.rounds, rate=self.method.P, per_layer=self.per_layer
        )

    def control(self, found: list, r: int, controls: Iterable[str], **settings) -> None:
        from nbkit import training

        theta_0, fresh = (training.state(self.build(seed)) for seed in (self.seed, 1000 * r + self.seed))
        begun = starts(found, r, theta_0, fresh, seed=1000 * r + self.seed)
        for control in controls:
            m, state = begun[control]
            self.once(control, r, m.rewind(self.build(self.seed), state), m, **settings)

    def again(self, found: list) -> None:
        """The dense network and round 15, with other settings."""
        cases = [(["ticket", "reinit", "random mask", "both redrawn"], {"j": LONG})]
        cases += [(["ticket", "reinit", "random mask"], {"lr": lr}) for lr in RATES]
        for controls, settings in cases:
            self.once("ticket", 0, self.build(self.seed), found[0].masks, **settings)
            self.control(found, LAST, controls, **settings)

    def all(self) -> list:
        """Fill ``rows``; returns the rounds of the search."""
        found = self.search()
        for r in range(1, self.rounds + 1):
            self.control(found, r, [c for c, rounds in CONTROLS[self.name].items() if r in rounds])
        if self.name == LENET:
            self.again(found)
        return found


def starts(found: list, r: int, theta_0: dict, fresh: dict, seed: int) -> dict[str, tuple]:
    """{name: (mask, initial values)} of round ``r``'s ticket and of its controls, equally sparse in every layer.

    fresh: another draw of initial values; seed: of what is shuffled.
    """
    from nbkit import sparsity

    m, dense = found[r].masks, found[0].trained
    sizes = {"one-shot": dense, "largest at birth": theta_0}
    masks = {
        control: sparsity.mask_from_densities({name: values[name].abs() for name in m}, m.densities())
        for control, values in sizes.items()
    }
    return {
        "ticket": (m, theta_0),
        "reinit": (m, fresh),
        "random mask": (m.shuffled(seed), theta_0),
        "both redrawn": (m.shuffled(seed), fresh),
        "one-shot": (masks["one-shot"], theta_0),
        "no last reset": (m, found[r - 1].trained),
        "old signs": (m, {name: value.abs() * theta_0[name].sign() for name, value in fresh.items()}),
        "old sizes": (m, {name: theta_0[name].abs() * value.sign() for name, value in fresh.items()}),
        "shuffled values": (m, shuffled_values(theta_0, m, seed)),
        "largest at birth": (masks["largest at birth"], theta_0),
    }


def shuffled_values(theta_0: dict, m, seed: int) -> dict:
    """``theta_0`` with the surviving values of each layer dealt anew among the surviving places."""
    chance, state = torch.Generator().manual_seed(seed), dict(theta_0)
    for name, mask in m.items():
        values = theta_0[name][mask]
        order = torch.randperm(len(values), generator=chance)
        state[name] = theta_0[name].masked_scatter(mask, values[order])
    return state


# How often noise passes a rule: labels (the last axis of `values`: which training is called ticket, which reinit ...)
# are dealt anew within each round and seed. Values are [rounds, seeds, labels]; accuracies in percent.


def by_chance(rule, values: np.ndarray, draws: int = 10_000) -> float:
    generator = np.random.default_rng(0)
    passed = sum(bool(rule(generator.permuted(values, axis=-1))) for _ in range(draws))
    return max(passed, 1) / draws  # never counts as once


def comparable(values) -> bool:
    """Claim 1, (ticket or control) minus dense; round 15 last."""
    mean = values[..., 0].mean(axis=1)
    return mean[:-1].min() >= -0.3 and mean[-1] >= -1


def better(values) -> bool:
    """Claim 2, [seeds, trainings]: the dense one first."""
    gain = values[:, 1:].mean(axis=1) - values[:, 0]
    return gain.mean() >= 0.3 and gain.min() > 0


def behind(values) -> bool:
    """Claim 4: rounds 3 and 15; ticket, reinit and random mask."""
    lead = values[..., :1] - values[..., 1:]
    mean = lead.mean(axis=1)
    return mean[1].min() >= 1.5 and (mean[1] > mean[0]).all() and lead[1].min() > 0


def quicker(values) -> bool:
    """Claim 5: early-stop iterations of ticket and reinit."""
    return values[..., 0].mean() <= 0.75 * values[..., 1].mean() and (values[..., 0] < values[..., 1]).all()


def declining(values) -> bool:
    """Claim 6, one mean a round: Spearman's correlation with the round (ranks, no ties)."""
    ranks = values.argsort().argsort()
    return np.corrcoef(np.arange(len(values)), ranks)[0, 1] >= 0.9 - 1e-9


def finds(values) -> bool:
    """Claim 7, one-shot and reinit minus dense."""
    return values[..., 0].mean(axis=1).min() >= -0.3 and (values[..., 0] > values[..., 1]).all()


def smaller(values) -> bool:
    """Claim 7: iterative and one-shot."""
    lead = values[..., 0] - values[..., 1]
    return lead.mean() >= 0.5 and lead.min() > 0


def signs(values) -> bool:
    """Claim 8, [seeds, labels]: ticket, old signs, old sizes, reinit."""
    mean, ahead = values.mean(axis=0), values[:, 1] - values[:, 2]
    return ahead.mean() >= 1 and ahead.min() > 0 and abs(mean[1] - mean[0]) < abs(mean[1] - mean[3])


def chances(table: pd.DataFrame) -> pd.DataFrame:
    """Claim, case, by_chance."""
    usual = table[(table["lr"] == LR) & (table["j"] < LONG) & (table["seed"] < 3)]

    def of(network: str, rounds: Iterable[int], *controls: str, measure: str = "accuracy") -> np.ndarray:
        """[rounds, seeds, controls]"""
        rows = usual[(usual["network"] == network) & usual["round"].isin([*rounds])]
        wide = [rows[rows["control"] == c].pivot(index="round", columns="seed", values=measure) for c in controls]
        return np.stack(wide, axis=-1) * (1 if measure == "stop" else 100)

    common = {LENET: (1, 3, 5, 7, 9, 11, 15), "small conv": (3, 6, 9, 12, 15)}
    faster = {LENET: (5, 6, 7, 8, 9), "small conv": (6, 9)}
    pair = ("ticket", "reinit")
    found = {}
    for network, measure in itertools.product(CONTROLS, ("accuracy", "final")):
        dense = of(network, [0], "ticket", measure=measure)
        case = f"{network}, {measure}"
        found["accuracy", case] = by_chance(comparable, of(network, common[network], *pair, measure=measure) - dense)
        ten = of(network, range(10), "ticket", measure=measure)[..., 0]
        found["better than dense", case] = by_chance(better, ten.T)
    for network in CONTROLS:
        labels = (*pair, "random mask")
        found["initial values", network] = by_chance(behind, of(network, (3, LAST), *labels))
        stops = of(network, faster[network], *pair, measure="stop")
        found["faster than reinit", network] = by_chance(quicker, stops)
        found["reinit declines", network] = by_chance(declining, np.arange(len(CONTROLS[network]["reinit"])))
    dense = of(LENET, [0], "ticket")
    found["one-shot", "found at once"] = by_chance(finds, of(LENET, (3, 7, 9), "one-shot", "reinit") - dense)
    found["one-shot", "smaller by rounds"] = by_chance(smaller, of(LENET, (13, 17), "ticket", "one-shot"))
    four = of(LENET, [LAST], "ticket", "old signs", "old sizes", "reinit")[0]
    found["signs", LENET] = by_chance(signs, four)
    return pd.DataFrame([{"claim": claim, "case": case, "by_chance": p} for (claim, case), p in found.items()])


def build(out: Path, work: Path, seeds: int, part: str) -> list[Path]:
    from nbkit import runtime

    runtime.deterministic(seed=0)
    results, survived, chance, again = (
        out / name for name in ("results.csv", "survived.safetensors", "chance.csv", "again.csv")
    )
    if part == "again":
        write_table(again, trained_again(work))
        return [again]
    if part == "all":
        write_table(results, trainings(work, seeds, survived))
    write_table(chance, chances(pd.read_csv(results)))
    return [results, survived, chance] if part == "all" else [chance]


def method_and_data():
    from nbkit import datasets, papers

    method = papers.method("lottery-ticket")
    return method, method.split(datasets.load("mnist"))


def trained_again(work: Path) -> pd.DataFrame:
    """The dense LeNet of seed 0, and all tickets of seeds 1 and 2."""
    from nbkit import sparsity

    (method, data), rows = method_and_data(), []
    for seed in range(3):
        one = Trainings(method, LENET, seed, data, Work(work))
        if seed:
            one.search()
        else:
            net = one.build(0)
            ones = {name: torch.ones(weight.shape) for name, weight in sparsity.prunable(net).items()}
            one.once("ticket", 0, net, sparsity.Masks(ones), keep=True)
        rows += one.rows
    return pd.DataFrame(rows)[["network", "seed", "control", "round", "stop", "accuracy", "final"]]


def trainings(work: Path, seeds: int, survived: Path) -> pd.DataFrame:
    from nbkit import sparsity

    (method, data), rows = method_and_data(), []
    for name in CONTROLS:
        for seed in range(seeds):
            one = Trainings(method, name, seed, data, Work(work))
            found = one.all()
            rows += one.rows
            if (name, seed) == (LENET, 0):
                write_tensors(survived, sparsity.rounds_survived([r.masks for r in found]))
                ones = found[0].masks
    for seed in range(seeds, DENSE):
        one = Trainings(method, LENET, seed, data, Work(work))
        one.once("ticket", 0, one.build(seed), ones)
        rows += one.rows
    return pd.DataFrame(rows).sort_values(ORDER)


if __name__ == "__main__":
    run(build, __doc__, work=work_option("lottery-ticket"), seeds=seeds_option(3), part=part_option("chance", "again"))
