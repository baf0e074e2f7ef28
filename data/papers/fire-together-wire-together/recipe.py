"""results.csv, heads.csv, settings.csv, longer.csv, nets.safetensors: what the notebook on gates for filters compares.

Three networks, three r, 125 steps of fine-tuning for every method, each at its own learning rate (settings.csv: by the
loss on held-back training images, one network, one r). results.csv: accuracy and measured multiply-adds (a share of the
dense network's) on test images. heads.csv: how well the heads of each layer foresee the true masks. longer.csv: four
times as many. nets.safetensors: three of the networks, seed 0. The functions are the method cells of
notebooks/06-pruning/11-fire-together-wire-together. About 10 minutes on one busy core; a run that was stopped goes on
where it was (delete the folder --work for a fresh start).
"""

from __future__ import annotations

import functools
import itertools
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from sklearn.metrics import balanced_accuracy_score

from nbkit.recipes import Work, round_to_half, run, seeds_option, work_option, write_table, write_tensors

SLUG = "fire-together-wire-together"
RS = (0.9, 0.75, 0.6)
MIDDLE = 0.75  # where settings are chosen
STEPS = 125  # of 64 images; the 9,000 are not quite seen once
RATES = (0.01, 0.03, 0.1)
EDGE = 0.3  # measured as well, never chosen: does the end of the grid matter?
HEADS = {"plain": {}, "softmax": {"softmax": True}, "joint": {"joint": True}, "to the end": {}}  # settings of Wired
RIVALS = ("magnitude", "response", "random", "once", "gates")
STORED = ("plain-0.75", "plain-0.6", "joint-0.75")


@functools.cache
def data() -> dict:
    """(x, y) to train on, 1,000 held back for the choice of settings, and 2,000 to test."""
    from nbkit import datasets

    garments = datasets.load("fashion-mnist")
    held = torch.arange(len(garments.y_train)) % 10 == 9
    return {
        "train": (garments.x_train[~held], garments.y_train[~held]),
        "held": (garments.x_train[held], garments.y_train[held]),
        "test": (garments.x_test, garments.y_test),
    }


def static(method, model, scores: list, fired: list, cost: float) -> list[torch.Tensor]:
    """The same filters for all images: masks [1, C'] of the highest scores [C'], by the same r in all layers.

    The smallest that need at least ``cost`` multiply-adds (without heads). Raises: ValueError.
    """
    one = [f._replace(b=f.b[:1]) for f in fired]
    for step in range(1, 501):
        masks = [method.kept(score[None], step / 500).float() for score in scores]
        if method.multiply_adds(model, one, masks, heads=False).item() >= cost:
            return masks
    raise ValueError(f"even the whole network needs fewer than {cost} multiply-adds")


def shuffled(masks: list, generator: torch.Generator) -> list[torch.Tensor]:
    """As many filters in every layer and for every image, drawn at random: masks [N, C']."""
    deals = [torch.rand(b.shape, generator=generator).argsort(1) for b in masks]
    return [b.gather(1, deal) for b, deal in zip(masks, deals, strict=True)]


def straight(model, p: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """The heads' mask, as a source for ``trace`` that hands the task's gradient straight through to them."""
    s = p.sigmoid()
    return (s > model.threshold).to(s) + (s - s.detach())


def balanced(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Balanced accuracy over all places of two masks."""
    return float(balanced_accuracy_score(truth.bool().flatten(), found.bool().flatten()))


class Cell:
    """One network at one r: its rivals are held to the multiply-adds of the network with plain heads."""

    def __init__(self, method, seed: int, r: float, steps: int = STEPS):
        from nbkit import models

        self.method, self.seed, self.r, self.steps = method, seed, r, steps
        self.net = models.load("small-cnn", variant="thin", seed=seed)
        self.some = data()["train"][0][::9]  # 1,000 images to count on
        self.whole = method.Wired(self.net, r, seed=seed)
        self.fired = method.watch(self.whole, self.some, "all")[1]  # dense
        self.dense = method.multiply_adds(self.whole, self.fired, heads=False)[0].item()
        self.plain = None

    def cost(self, model, masks="heads") -> float:
        """Multiply-adds of a network with heads on training images."""
        return self.method.multiply_adds(model, self.method.watch(model, self.some, masks)[1]).mean().item()

    def estimate(self) -> float:
        return self.method.foretold(self.whole, self.fired, self.r) / self.dense

    def masks(self, arm: str):
        """What ``trace`` takes: the heads, fixed masks, or a function that deals random ones of the same sizes.

        random: anew for every image and step; once: fixed ones, as many in a layer as the plain heads' mean.
        """
        if arm == "random":
            dealt = torch.Generator().manual_seed(self.seed)
            return lambda x: shuffled([f.b for f in self.method.watch(self.plain, x)[1]], dealt)
        if arm == "once":
            dealt = torch.Generator().manual_seed(self.seed)
            sizes = [f.b.sum(1).mean().round() for f in self.method.watch(self.plain, self.some)[1]]
            return [(torch.rand(1, f.a.shape[1], generator=dealt).argsort(1) < n).float()
                    for f, n in zip(self.fired, sizes, strict=True)]  # fmt: skip
        if arm == "gates":
            self.method.SOURCES["gates"] = straight
            return "gates"
        if arm in ("magnitude", "response"):
            weights = [self.net.get_submodule(f.layer).weight.detach().abs().sum((1, 2, 3)) for f in self.fired]
            scores = weights if arm == "magnitude" else [f.a.mean(0) for f in self.fired]
            return static(self.method, self.whole, scores, self.fired, self.cost(self.plain))
        return "heads"

    def train(self, arm: str, lr: float):
        """(network with its weights rounded to float16, its masks)."""
        model = self.method.Wired(self.net, self.r, seed=self.seed, **HEADS.get(arm, {}))
        masks, extra = self.masks(arm), None
        if arm == "gates":
            goal = self.cost(self.plain) / self.dense
            extra = lambda fired, _: 10 * (self.method.multiply_adds(model, fired).mean() / self.dense - goal) ** 2  # noqa: E731
        elif arm == "to the end":  # the heads never rest
            extra = lambda fired, _: self.method.mask_loss(fired, self.r)  # noqa: E731
        elif arm in RIVALS:
            extra = lambda fired, done: 0.0  # noqa: E731
        self.method.fine_tune(
            model, *data()["train"], steps=self.steps, lr=lr, masks=masks, extra=extra, seed=self.seed
        )
        round_to_half(model)
        if arm == "gates":
            self.match(model)
        if arm == "plain" and self.plain is None:
            self.plain = model
        return model, masks

    def match(self, model) -> None:
        """The threshold at which gates need on training images what the plain heads need."""
        goal, low, high = self.cost(self.plain), 0.0, 1.0
        for _ in range(7):
            model.threshold = (low + high) / 2
            low, high = (model.threshold, high) if self.cost(model) > goal else (low, model.threshold)

    def row(self, arm: str, model, masks, **more) -> dict:
        """Accuracy and cost on the test images."""
        x, y = data()["test"]
        logits, fired = self.method.watch(model, x, masks)
        with_heads = arm in HEADS or arm == "gates"
        cost = self.method.multiply_adds(model, fired, heads=with_heads).mean().item() / self.dense
        accuracy = (logits.argmax(1) == y).float().mean().item()
        found = {"accuracy": round(accuracy, 4), "cost": round(cost, 4)}
        return {"seed": self.seed, "r": self.r, "arm": arm} | found | more

    def others(self, arm: str, model) -> list[dict]:
        """The same network with the masks of another image, and with the true masks."""
        x = data()["test"][0]
        own = [f.b for f in self.method.watch(model, x)[1]]
        deal = torch.randperm(len(x), generator=torch.Generator().manual_seed(self.seed))
        queue = iter([b[deal].split(500) for b in own])
        batches = iter(list(zip(*queue, strict=True)))
        return [
            self.row(f"{arm}, masks of another image", model, lambda _: next(batches)),
            self.row(f"{arm}, true masks", model, "truth"),
        ]

    def heads(self, arm: str, model) -> list[dict]:
        """How well the heads foresee the true masks of test images, a row a layer."""
        before = self.method.watch(model, self.some)[1]
        rows = []
        for f, train in zip(self.method.watch(model, data()["test"][0])[1], before, strict=True):
            truth, often = self.method.kept(f.a, self.r), self.method.kept(train.a, self.r).float().mean(0)
            majority = (often > 0.5).expand_as(truth)
            on = f.b.mean(0)
            rows.append(
                {
                    "seed": self.seed, "r": self.r, "arm": arm, "layer": f.layer,
                    "balanced": round(balanced(f.b, truth), 4),
                    "majority": round(balanced(majority, truth), 4),
                    "on": round(on.mean().item(), 4), "truth": round(truth.float().mean().item(), 4),
                    "filters": len(on), "varying": int(((on > 0.01) & (on < 0.99)).sum()),
                    "truth_varying": int(((often > 0.01) & (often < 0.99)).sum()),
                }  # fmt: skip
            )
        return rows


def tune(method) -> list[dict]:
    """The held-back loss of every method at every learning rate, seed 0."""
    cell, rows = Cell(method, 0, MIDDLE), []
    for arm in ("plain", "softmax", *RIVALS):
        best = {}
        for lr in (*RATES, EDGE):
            cell.plain = None if arm == "plain" else cell.plain
            model, masks = cell.train(arm, lr)
            logits, _ = method.watch(model, data()["held"][0], masks)
            loss = F.cross_entropy(logits, data()["held"][1]).item()
            if lr in RATES:
                best[loss] = model
            rows.append({"arm": arm, "lr": lr, "loss": round(loss, 4)})
        if arm == "plain":
            cell.plain = best[min(best)]
    return rows


def measure(method, rates: dict, work: Path, seed: int, r: float) -> dict:
    """All methods on one network at one r."""
    cell = Cell(method, seed, r)
    found = {"results": [], "heads": []}
    for arm in (*HEADS, *RIVALS):
        if arm in ("joint", "to the end") and r != MIDDLE:
            continue
        model, masks = cell.train(arm, rates[arm])
        if f"{arm}-{r}" in STORED and seed == 0:
            torch.save(model.state_dict(), work / f"{arm}-{r}.pt")
        found["results"].append(cell.row(arm, model, masks))
        if arm in HEADS:
            found["results"][-1]["estimate"] = round(cell.estimate(), 4)
            found["results"] += cell.others(arm, model)
            found["heads"] += cell.heads(arm, model)
    if r == RS[0]:
        found["results"].append(cell.row("dense", cell.whole, "all"))
    return found


def longer(method, rates: dict) -> list[dict]:
    """Four times as many steps, seed 0."""
    cell, rows = Cell(method, 0, MIDDLE, 4 * STEPS), []
    for arm in ("plain", "response"):
        model, masks = cell.train(arm, rates[arm])
        varying = sum(row["varying"] for row in cell.heads(arm, model)) if arm in HEADS else 0
        rows.append(cell.row(arm, model, masks, varying=varying))
    return rows


def build(out: Path, work: Path, seeds: int) -> list[Path]:
    from nbkit import papers, runtime

    runtime.deterministic(seed=0)
    method, done = papers.method(SLUG), Work(work)
    settings = pd.DataFrame(done.once("settings", lambda: tune(method)))
    chosen = settings[settings["lr"].isin(RATES)]
    best = chosen.loc[chosen.groupby("arm", sort=False)["loss"].idxmin()]
    rates = dict(zip(best["arm"], best["lr"], strict=True))
    rates["joint"] = rates["to the end"] = rates["plain"]
    found = [
        done.once(f"cell-{seed}-{r}", lambda s=seed, r=r: measure(method, rates, work, s, r))
        for seed, r in itertools.product(range(seeds), RS)
    ]
    tables = {
        "results": itertools.chain(*(part["results"] for part in found)),
        "heads": itertools.chain(*(part["heads"] for part in found)),
        "settings": settings.to_dict("records"),
        "longer": done.once("longer", lambda: longer(method, rates)),
    }
    paths = [out / f"{name}.csv" for name in tables] + [out / "nets.safetensors"]
    for path, rows in zip(paths, tables.values(), strict=False):
        write_table(path, pd.DataFrame(list(rows)))
    states = {name: torch.load(work / f"{name}.pt") for name in STORED}
    write_tensors(paths[-1], {f"{n.replace('plain', 'decoupled')}/{k}": v.half() if v.is_floating_point() else v
                              for n, state in states.items() for k, v in state.items()})  # fmt: skip
    return paths


if __name__ == "__main__":
    run(build, __doc__, work=work_option(SLUG), seeds=seeds_option(3))
