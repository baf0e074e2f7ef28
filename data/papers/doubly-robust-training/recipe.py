"""The tables and networks of this folder, for notebooks/05-data/03-doubly-robust-training.

A small convolutional network is trained on 3,000 long-tailed images of Fashion-MNIST: four epochs of plain adversarial
training, from which seven ways go on for two more with a falling learning rate; five seeds each. A seed draws the
images, which classes are rare, the start, the order and the attack's random places, for all ways alike.

- tuning.csv: the settings tried, seed 100, judged on 1,000 training images that nothing was trained on, and which was
  taken: the largest sum of robust accuracy and Tail-30 under PGD.
- accuracy.csv: share of right answers by class on the 2,000 test images: clean, under PGD and under PGD with the margin
  loss, for each half of the test set (100 images a class).
- training.csv: by epoch the loss, the mean weight, and the share of a batch that counts.
- entropy.csv: entropy of the weights over the training set, over log M, for networks trained with several r, first
  order: at the network's own losses, and with the same r at the losses of plain adversarial training; their robust
  accuracy and Tail-30 under PGD.
- longer.csv: three arms with six epochs in place of the two: clean and under PGD.
- strong.csv: three arms of seed 0 on 300 test images with more steps and tries.
- AT-seed0, DONE-seed0: two networks in float16.

One thread, about 10 minutes; a run that was stopped goes on where it was (--work). The method is
the notebook's method cells; the arms beside it, the long tail and the training loop are here.
"""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from nbkit import datasets, forward, models, papers, runtime, training
from nbkit.errors import UnknownName
from nbkit.recipes import Work, round_to_half, run, seeds_option, work_option, write_bytes, write_table

SLUG = "doubly-robust-training"
TUNED_ON = 100  # the seed of tuning and pilots
HELD_OUT = 100  # images of each class
EPS, STEPS = 0.1, 10  # of the attack that measures
MORE = {"images": 300, "steps": 40, "restarts": 3}
KEPT = ("AT", "DONE")
CLOSER = ("AT", "resampled AT", "DONE")  # arms of strong.csv
LONGER = {"epochs": 6, "arms": ("AT", "DONE, first order", "DONE")}
FIRST = 4  # epochs of plain adversarial training (or clean training) that come first
GRID = {
    "AT": [{"lr": 0.05}, {"lr": 0.1}, {"lr": 0.15}],
    "resampled AT": [{"lr": 0.05}, {"lr": 0.1}],
    "inverse frequency": [{"power": 0.5, "lr": 0.1}, {"power": 1.0, "lr": 0.1}, {"power": 1.0, "lr": 0.05}],
    "GAIRAT": [{"lam": -1.0, "lr": 0.1}, {"lam": 0.0, "lr": 0.1}, {"lam": 0.0, "lr": 0.05}],
    "MAIL": [
        {"steep": 10.0, "bias": -0.5, "lr": 0.1},
        {"steep": 10.0, "bias": -0.5, "lr": 0.05},
        {"steep": 2.0, "bias": 0.0, "lr": 0.1},
    ],
    "DONE, first order": [{"r": r, "lr": lr} for r in (2.0, 5.0) for lr in (0.05, 0.1)],
    "DONE": [
        {"r": 2.0, "c": 1e-4, "lr": 0.05},
        {"r": 5.0, "c": 1e-4, "lr": 0.1},
        {"r": 5.0, "c": 1e-3, "lr": 0.1},
        {"r": 5.0, "c": 1e-2, "lr": 0.1},
    ],
}
COLLAPSED = 1.9  # a loss near that of always answering by class frequency, 2.0
RS = (1.0, 2.0, 5.0)  # of entropy.csv


# --- the arms


def long_tail(y: Tensor, total: int = 3000, ratio: float = 0.1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Indices [total] into y, and the classes from common to rare: counts fall exponentially.

    ratio: the rarest class to the most common. The order of classes is drawn by the seed.
    Raises: ValueError (a ratio, or a class with too few examples)."""
    classes = int(y.max()) + 1
    if not 0 < ratio <= 1 or classes < 2 or total < classes:
        raise ValueError(f"0 < ratio <= 1 and total >= classes >= 2, not {ratio=}, {total=}")
    falling = ratio ** (torch.arange(classes) / (classes - 1))
    edges = (total * falling.cumsum(0) / falling.sum()).round().long()
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(classes, generator=g)
    shuffled = torch.randperm(len(y), generator=g)
    parts = []
    for k, n in zip(order.tolist(), edges.diff(prepend=edges[:1] * 0).tolist(), strict=True):
        found = shuffled[y[shuffled] == k]
        if len(found) < n:
            raise ValueError(f"class {k} has {len(found)} examples, {n} are needed")
        parts.append(found[:n])
    return torch.cat(parts), order


def gairat(kappa: Tensor, steps: int, lam: float) -> Tensor:
    """[B], mean 1: large where few of the attack's steps were enough. Raises: ValueError."""
    if kappa.ndim != 1 or not 0 <= kappa.min() <= kappa.max() <= steps:
        raise ValueError(f"kappa is [B], from 0 to {steps}, not {kappa}")
    raw = (1 + torch.tanh(lam + 5 * (1 - 2 * kappa / steps))) / 2
    return raw / raw.mean()


def mail(logits: Tensor, y: Tensor, bias: float, steep: float) -> Tensor:
    """[B], mean 1: large where another class is more probable than y. Raises: NotFinite."""
    gap = papers.method(SLUG).margin(forward.check_inputs(logits, name="logits").softmax(1), y)
    raw = torch.sigmoid(steep * (gap + bias))
    return raw / raw.mean()


def inverse_frequency(y: Tensor, counts: Tensor, power: float) -> Tensor:
    """[B]: count ** -power of each label's class, of mean 1 over the training set.

    Raises: ValueError (power)."""
    if not math.isfinite(power):
        raise ValueError(f"power must be a number, not {power}")
    raw = counts.clamp(min=1).float() ** -power
    return (raw * counts.sum() / (counts * raw).sum())[y]


ARMS = {  # their knobs
    "clean": {},
    "AT": {},
    "resampled AT": {},
    "inverse frequency": {"power": 1.0},
    "GAIRAT": {"lam": 0.0},
    "MAIL": {"bias": 0.0, "steep": 2.0},
    "DONE, first order": {"r": 5.0, "eta": 0.1},
    "DONE": {"r": 5.0, "eta": 0.1, "c": 1e-4},
}
BUDGET = {"eps": 0.1, "steps": 4, "step": 0.06}  # of the attack in training


def weighing(arm: str, knobs: dict, counts: Tensor, steps: int):
    """The arm's weights, as a function (logits, y, kappa, state) -> weights [B], state."""
    if arm.startswith("DONE"):
        return papers.method(SLUG).done(knobs["r"], knobs["eta"])
    if arm == "GAIRAT":
        return lambda logits, y, kappa, state: (gairat(kappa, steps, knobs["lam"]), state)
    if arm == "MAIL":
        return lambda logits, y, kappa, state: (mail(logits, y, knobs["bias"], knobs["steep"]), state)
    power = knobs.get("power", 0.0)
    return lambda logits, y, kappa, state: (inverse_frequency(y, counts, power), state)


def batches(arm, y: Tensor, batch: int, g: torch.Generator) -> tuple[Tensor, ...]:
    """Of an epoch; resampled AT draws, with every class equally likely."""
    if arm == "resampled AT":
        drawn = torch.multinomial(1 / y.bincount()[y], len(y), replacement=True, generator=g)
        return drawn.split(batch)
    return torch.randperm(len(y), generator=g).split(batch)


def train(x, y, arm="DONE", *, start=None, epochs=2, lr=0.1, batch=64, seed=0, knobs=None):
    """A trained lenet-conv, and [epochs, 3]: loss, mean weight, share of the batch that counts.

    start: weights to go on from, with a falling rate; None starts afresh, at a constant one.
    Raises: UnknownName (arm, knob), ValueError."""
    method = papers.method(SLUG)
    if unknown := {arm} - set(ARMS) or set(knobs or {}) - set(ARMS[arm]):
        raise UnknownName(f"{arm}: no {sorted(unknown)} in {ARMS}")
    knobs = ARMS[arm] | (knobs or {})
    budget = BUDGET | ({"steps": 0} if arm == "clean" else {})
    model = models.build("lenet-conv", seed=seed)
    model.load_state_dict(start or training.state(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    weigh = weighing(arm, knobs, y.bincount(), budget["steps"])
    g = torch.Generator().manual_seed(seed + (start is not None) * 1000)
    log, state = [], None
    for at in range(epochs):
        rows = []
        for place, index in enumerate(batches(arm, y, batch, g)):
            done = (at + place * batch / len(y)) / epochs
            optimizer.param_groups[0]["lr"] = lr * (training.cosine()(done) if start else 1)
            weight, logits, state = method.one_step(
                model, optimizer, x[index], y[index], weigh, state, budget=budget, g=g, c=knobs.get("c", 0.0)
            )
            share = weight.sum() ** 2 / weight.square().sum() / len(weight)
            rows.append(torch.stack([method.cross_entropy(logits, y[index]).mean(), weight.mean(), share]))
        log.append(torch.stack(rows).mean(0))
    return model.eval(), torch.stack(log)


# --- data and measures


def data(seed: int):
    """Training images and labels of a seed, and 100 others of each class."""
    whole = datasets.load("fashion-mnist")
    taken, _ = long_tail(whole.y_train, seed=seed)
    free = torch.ones(len(whole.y_train), dtype=torch.bool)
    free[taken] = False
    left = free.nonzero().flatten()
    left = left[torch.randperm(len(left), generator=torch.Generator().manual_seed(seed))]
    held = torch.cat([left[whole.y_train[left] == k][:HELD_OUT] for k in range(10)])
    x, y = whole.x_train, whole.y_train
    return x[taken], y[taken], x[held], y[held]


def halves(y: torch.Tensor) -> list[torch.Tensor]:
    """Two masks: the first and second half of each class's images, as they come."""
    first = torch.zeros(len(y), dtype=torch.bool)
    for k in range(10):
        found = (y == k).nonzero().flatten()
        first[found[: len(found) // 2]] = True
    return [first, ~first]


def right(net, x, y, name: str, steps: int = STEPS, restarts: int = 1) -> torch.Tensor:
    """[N], true where the answer is right under the attack; only what is right without it is attacked."""
    with torch.no_grad():
        found = net(x).argmax(1) == y
    if name != "clean" and found.any():
        loss = {"PGD": papers.method(SLUG).cross_entropy, "margin": papers.method(SLUG).margin}[name]
        g = torch.Generator().manual_seed(0)
        among = found.nonzero().flatten()
        attacked = training.pgd(
            net, x[among], y[among], eps=EPS, steps=steps, restarts=restarts, loss=loss, generator=g
        )
        with torch.no_grad():
            found[among] = net(attacked).argmax(1) == y[among]
    return found


def by_class(found: torch.Tensor, y: torch.Tensor) -> list[list[float]]:
    """Shares of right answers: a list of ten for each half."""
    return [
        [round(found[half & (y == k)].double().mean().item(), 4) for k in range(10)] for half in halves(y)
    ]


def measured(net, x, y) -> dict:
    return {name: by_class(right(net, x, y, name), y) for name in ("clean", "PGD", "margin")}


def judged(found: list[list[float]]) -> dict[str, float]:
    first, second = (torch.tensor(half) for half in found)
    average = ((first + second) / 2).mean().item()
    return {"average": round(average, 4), "tail": round(papers.method(SLUG).tail_30(first, second), 4)}


# --- tuning


def tried(work: Work, arm: str, setting: dict) -> dict:
    x, y, x_held, y_held = data(TUNED_ON)
    start = common(work, arm, TUNED_ON)
    net, _ = train(x, y, arm, start=start, seed=TUNED_ON, **split(setting))
    return judged(by_class(right(net, x_held, y_held, "PGD"), y_held))


def common(work: Work, arm: str, seed: int) -> dict[str, torch.Tensor]:
    """Where the arms of a seed start: FIRST epochs of plain adversarial training, for the clean network of clean."""
    arm = "clean" if arm == "clean" else "AT"
    path = work.folder / f"first_{arm}_{seed}.safetensors"
    if not path.is_file():
        x, y, *_ = data(seed)
        net, rows = train(x, y, arm, seed=seed, epochs=FIRST)
        if rows[-1, 0] > COLLAPSED:  # one answer for all: again, at half the rate
            net, _ = train(x, y, arm, seed=seed, epochs=FIRST, lr=0.05)
        models.save_checkpoint(path, net, "lenet-conv", seed=seed)
    return training.state(models.load_checkpoint(path)[0])


def split(setting: dict) -> dict:
    """What ``train`` takes: the learning rate, and the knobs of the arm."""
    return {"lr": setting["lr"], "knobs": {name: value for name, value in setting.items() if name != "lr"}}


def tune(work: Work) -> tuple[pd.DataFrame, dict[str, dict]]:
    """The table, and the setting taken for each arm."""
    rows, taken = [], {}
    for arm, settings in GRID.items():
        found = [work.once(f"try {arm} {json.dumps(s)}", partial(tried, work, arm, s)) for s in settings]
        sums = [one["average"] + one["tail"] for one in found]
        best = sums.index(max(sums))
        taken[arm] = settings[best]
        for i, (setting, one) in enumerate(zip(settings, found, strict=True)):
            text = " ".join(f"{name}={value:g}" for name, value in setting.items())
            rows.append({"arm": arm, "setting": text, **one, "taken": i == best})
    return pd.DataFrame(rows), taken | {"clean": {"lr": 0.1}}


# --- the seeds


def trained(work: Work, arm: str, seed: int, setting: dict):
    """The network, rounded to float16, trained or as it was kept, and its log by epoch."""
    stem = f"{arm} {json.dumps(setting)} {seed}".replace(" ", "_").replace("'", "").replace('"', "")
    path, log = work.folder / f"{stem}.safetensors", work.folder / f"{stem}.log"
    if not log.is_file():
        x, y, *_ = data(seed)
        start = common(work, arm, seed)
        net, rows = train(x, y, arm, start=start, seed=seed, **split(setting))
        round_to_half(net)
        facts = {"dataset": "fashion-mnist", "variant": arm, "seed": seed, **setting}
        models.save_checkpoint(path, net.half(), "lenet-conv", **facts)
        write_bytes(log, json.dumps(rows.double().tolist()).encode())
    return models.load_checkpoint(path)[0], json.loads(log.read_text()), path


def entropy(net, seed: int, rs) -> list[float]:
    """Entropy of the weights over the training set, over log M, for each r."""
    method = papers.method(SLUG)
    x, y, *_ = data(seed)
    attacked = training.pgd(net, x, y, eps=EPS, steps=5, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        losses = method.cross_entropy(net(attacked), y).double()
    found = []
    for r in rs:
        w = method.worst_mixture(losses, r)[0]
        found.append(round(-torch.special.xlogy(w, w).sum().item() / math.log(len(w)), 5))
    return found


def mixtures(work: Work, seed: int, taken: dict) -> list[dict]:
    """A row an r: entropies and robustness of one seed."""
    net = trained(work, "AT", seed, taken["AT"])[0]
    fixed = work.once(f"entropy AT {seed}", partial(entropy, net, seed, RS))
    rows = []
    for r, at_fixed in zip(RS, fixed, strict=True):
        net = trained(work, "DONE, first order", seed, {"r": r, "lr": 0.05})[0]
        (own,) = work.once(f"entropy {r} {seed}", partial(entropy, net, seed, [r]))
        found = work.once(f"r {r} {seed}", partial(withstood, net))
        rows.append({"seed": seed, "r": r, "entropy": own, "AT's losses": at_fixed, **judged(found)})
    return rows


def withstood(net) -> list[list[float]]:
    whole = datasets.load("fashion-mnist")
    return by_class(right(net, whole.x_test, whole.y_test, "PGD"), whole.y_test)


def longer(work: Work, arm: str, seed: int, setting: dict) -> dict[str, float]:
    """Robustness and clean accuracy after more epochs with the arm's own weights."""
    x, y, *_ = data(seed)
    start = common(work, arm, seed)
    net, _ = train(x, y, arm, start=start, seed=seed, epochs=LONGER["epochs"], **split(setting))
    whole = datasets.load("fashion-mnist")
    clean, pgd = (
        judged(by_class(right(net, whole.x_test, whole.y_test, name), whole.y_test))
        for name in ("clean", "PGD")
    )
    return {"average": pgd["average"], "tail": pgd["tail"], "clean": clean["average"]}


def strong(net) -> dict[str, float]:
    whole = datasets.load("fashion-mnist")
    g = torch.Generator().manual_seed(0)
    some = torch.randperm(len(whole.y_test), generator=g)[: MORE["images"]]
    x, y = whole.x_test[some], whole.y_test[some]
    found = {"PGD-10": right(net, x, y, "PGD"), "margin-10": right(net, x, y, "margin")}
    for name in ("PGD", "margin"):
        found[f"{name}-40 x 3"] = right(net, x, y, name, MORE["steps"], MORE["restarts"])
    found["all"] = torch.stack(list(found.values())).all(0)
    return {name: round(one.double().mean().item(), 4) for name, one in found.items()}


def build(out: Path, work: Path, seeds: int) -> list[Path]:
    runtime.deterministic(seed=0)
    kept = Work(work)
    tuning, taken = tune(kept)
    whole = datasets.load("fashion-mnist")
    accuracy, log, entropies, strongest = [], [], [], []
    for seed in range(seeds):
        for arm in ARMS:
            net, rows, _ = trained(kept, arm, seed, taken[arm])
            found = kept.once(f"right {arm} {seed}", partial(measured, net, whole.x_test, whole.y_test))
            for name, both in found.items():
                for half, shares in enumerate(both):
                    columns = {f"class {k}": share for k, share in enumerate(shares)}
                    accuracy.append({"seed": seed, "arm": arm, "attack": name, "half": half, **columns})
            for at, (loss, mean, share) in enumerate(rows, start=1):
                log.append(
                    {"seed": seed, "arm": arm, "epoch": at, "loss": loss, "weight": mean, "share": share}
                )
            if seed == 0 and arm in CLOSER:
                strongest.append({"arm": arm, **kept.once(f"strong {arm}", partial(strong, net))})
    for seed in range(seeds):
        entropies += mixtures(kept, seed, taken)
    more = []
    for seed in range(seeds):
        for arm in LONGER["arms"]:
            found = kept.once(f"longer {arm} {seed}", partial(longer, kept, arm, seed, taken[arm]))
            more.append({"seed": seed, "arm": arm, **found})
    tables = {
        "tuning": tuning,
        "accuracy": pd.DataFrame(accuracy),
        "training": pd.DataFrame(log),
        "entropy": pd.DataFrame(entropies),
        "strong": pd.DataFrame(strongest),
        "longer": pd.DataFrame(more),
    }
    paths = [out / f"{name}.csv" for name in tables]
    for path, table in zip(paths, tables.values(), strict=True):
        write_table(path, table, float_format="%.5g")
    for arm in KEPT:
        paths.append(out / f"{arm}-seed0.safetensors")
        write_bytes(paths[-1], trained(kept, arm, 0, taken[arm])[2].read_bytes())
    return paths


if __name__ == "__main__":
    run(build, __doc__, work=work_option(SLUG), seeds=seeds_option(5))
