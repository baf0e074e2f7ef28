"""All tables of this folder: what notebooks/09-representations/02-task-geometry measures beforehand.

Networks of 128 hidden units on simulated clusters (no structure; XOR made more or less separable; eight clusters with
one to seven targets) and on digits, by activation: how far the hidden responses to held-out examples follow the inputs
and the targets, at the end, at equal loss and at equal accuracy. About 4 minutes on one core; a run that was stopped
goes on where it was (delete the folder --work for a fresh start). The functions are the notebook's method cells.
"""

from __future__ import annotations

import functools
from functools import partial
from pathlib import Path

import pandas as pd

from nbkit.recipes import Work, part_option, run, work_option, write_table

SEEDS, FEWER = 10, 6
TRACKED = 3  # seeds whose course is kept for the pictures
ALL = ("W", "b", "R", "c")
PAIR = ("ReLU", "tanh")
THREE = (*PAIR, "linear")
UNSTRUCTURED = {
    "paper": {},
    "lr 0.3": {"lr": 0.3},
    "centred": {},
    "all trained": {"trained": ALL},
    "noise 2": {},  # where four clusters are hard enough for CCGP
}
XOR = [(0.0, 0.3), (0.5, 0.3), (1.0, 0.3), (1.0, 1.0), (1.0, 3.0)]  # eps, noise
MASKS = {1: (1,), 3: (1, 2, 4), 7: (1, 2, 3, 4, 5, 6, 7)}  # targets: parities of the bits of a condition
DIGITS = {"parity": (0, 2, 4, 6, 8), "magnitude": (0, 1, 2, 3, 4)}
RATES = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
CHOICE = 1200  # of the training images; the others choose a rate


@functools.cache
def method():
    from nbkit import papers

    return papers.method("task-geometry")


def random_means(conditions: int, seed: int):
    """[C, 100], cluster centres without structure."""
    import torch

    return torch.randn(conditions, 100, generator=torch.Generator().manual_seed(seed))


def clusters(means, noise: float, seed: int, dichotomies, centred: bool = False) -> dict:
    """1,000 training and 400 test examples of a toy task."""
    m, each = method(), 1000 // len(means)
    x, condition = m.sample(means, noise, each, seed=1000 + seed)
    x_test, condition_test = m.sample(means, noise, 400 // len(means), seed=2000 + seed)
    offset = x.mean(0) if centred else 0
    return {
        "x": x - offset, "y": m.targets(condition, *dichotomies), "x_test": x_test - offset, "means": means,
        "y_test": m.targets(condition_test, *dichotomies), "condition": condition_test, "dichotomies": dichotomies,
    }  # fmt: skip


def digits(name: str, first: int | None = None) -> dict:
    """Pixels less their mean; with ``first``, that many training images, and the other training images as test."""
    from nbkit import datasets

    m, data = method(), datasets.load("digits")
    n = len(data.x_train)
    pixels = data.x.flatten(1) - data.x[:n].flatten(1).mean(0)
    train, test = slice(0, first or n), slice(first or n, n if first else None)
    y = m.targets(data.y, DIGITS[name])
    return {
        "x": pixels[train], "y": y[train], "x_test": pixels[test], "y_test": y[test], "condition": data.y[test],
        "dichotomies": [DIGITS[name]],
    }  # fmt: skip


def course(task: dict, kept: dict) -> list[dict]:
    """Loss and accuracy on the training examples at every epoch kept."""
    return [{"epoch": epoch} | method().judge(net, task["x"], task["y"]) for epoch, net in kept.items()]


def measured(task: dict, kept: dict, epoch: int, generalise: bool) -> dict:
    """All that is stored of a network: judged on its training examples, its geometry on the test examples."""
    m, net = method(), kept[epoch]
    z = m.respond(net, task["x_test"])[0]
    by_condition = {k: m.condition_means(v, task["condition"]) for k, v in
                    (("z", z), ("x", task["x_test"]), ("y", task["y_test"]))}  # fmt: skip
    found = m.judge(net, task["x"], task["y"])
    found["test accuracy"] = m.judge(net, task["x_test"], task["y_test"])["accuracy"]
    found |= m.geometry(z, task["x_test"], task["y_test"])
    unbiased = m.geometry(z, task["x_test"], task["y_test"], debiased=True)
    found |= {f"{k}, debiased": v for k, v in unbiased.items()}
    found |= {f"{k}, means": v for k, v in m.geometry(*(by_condition[k] for k in "zxy")).items()}
    found["PS"] = mean(m.parallelism(by_condition["z"], d) for d in task["dichotomies"])
    if generalise:
        found["CCGP"] = mean(m.ccgp(z, task["condition"], d) for d in task["dichotomies"])
    found["dimension"] = dimension(z)
    if epoch and "means" in task and len(task["dichotomies"]) == 1:
        axes = m.axes_of(task["means"], task["dichotomies"][0])
        found["class share"] = m.class_share(net["W"] - kept[0]["W"], axes).mean().item()
    return {k: round(v, 4) for k, v in found.items()}


def dimension(z) -> float:
    """Participation ratio: how many directions hold the variance of z [n, N]; from 1 to N."""
    import torch

    variance = torch.linalg.svdvals((z - z.mean(0)).double()).square()
    return (variance.sum().square() / variance.square().sum()).item()


def read_at(tracks: dict, by: str) -> dict:
    """Of each track (rows with epoch, loss, accuracy) the epoch to read it at: the first at the loss or accuracy that
    all of them reach, the worst of their final ones."""
    if by not in ("loss", "accuracy") or not tracks or not all(tracks.values()):
        raise ValueError(f"tracks with rows, by loss or accuracy, not {by!r}")
    sign = 1 if by == "loss" else -1
    level = max(sign * track[-1][by] for track in tracks.values())
    return {name: next(r["epoch"] for r in track if sign * r[by] <= level) for name, track in tracks.items()}


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def compared(task: dict, labels: dict, names, seed: int, generalise: bool = True, track: bool = False, **how) -> dict:
    """Networks that differ in the activation alone, read at the start, the end, equal loss and equal accuracy.

    Those that stop short of the worse of ReLU and tanh set no level, and are read at the start and the end alone.
    """
    m = method()
    kept = {name: m.train(task["x"], task["y"], name, seed=seed, **how) for name in names}
    tracks = {name: course(task, nets) for name, nets in kept.items()}
    final = {name: rows[-1]["loss"] for name, rows in tracks.items()}
    level = max(final[name] for name in PAIR if name in final)
    near = {name: rows for name, rows in tracks.items() if final[name] <= level}
    rows, points = [], []
    for name, nets in kept.items():
        last = max(nets)
        places = {"start": 0, "end": last}
        for by in ("loss", "accuracy") if name in near else ():
            places[f"same {by}"] = read_at(near, by)[name]
        head = labels | {"activation": name, "seed": seed}
        once = {epoch: measured(task, nets, epoch, generalise) for epoch in set(places.values())}
        rows += [head | {"at": at, "epoch": epoch} | once[epoch] for at, epoch in places.items()]
        if track and seed < TRACKED and name in THREE:
            points += [head | {"epoch": row["epoch"]} | tracked(task, nets[row["epoch"]]) for row in tracks[name]]
    return {"rows": rows, "points": points}


def tracked(task: dict, net: dict) -> dict:
    m = method()
    z = m.respond(net, task["x_test"])[0]
    found = m.geometry(z, task["x_test"], task["y_test"]) | {"loss": m.judge(net, task["x"], task["y"])["loss"]}
    return {k: round(v, 4) for k, v in found.items()}


def unstructured(setting: str, seed: int) -> dict:
    m = method()
    noise = 2.0 if setting == "noise 2" else 0.5
    task = clusters(random_means(4, seed), noise, seed, [(0, 1)], centred=setting == "centred")
    names = {"paper": tuple(m.ACTIVATIONS), "noise 2": THREE}.get(setting, PAIR)
    labels = {"study": "unstructured", "setting": setting}
    return compared(task, labels, names, seed, track=setting == "paper", **UNSTRUCTURED[setting])


def xor(eps: float, noise: float, seed: int) -> dict:
    task = clusters(method().xor_means(eps, seed), noise, seed, [(1, 2)], centred=True)
    labels = {"study": "xor", "setting": f"eps {eps:g}, noise {noise:g}"}
    return compared(task, labels, PAIR, seed, trained=("W", "b"))


def many(K: int, seed: int) -> dict:
    """Eight unstructured clusters and K targets."""
    dichotomies = [tuple(c for c in range(8) if (c & mask).bit_count() % 2) for mask in MASKS[K]]
    task = clusters(random_means(8, seed), 0.5, seed, dichotomies)
    return compared(task, {"study": "targets", "setting": f"K = {K}"}, THREE, seed)


def rate(name: str, activation: str) -> list[dict]:
    """Loss on training images left out, by learning rate; seed 100."""
    m, task = method(), digits(name, CHOICE)
    rows = []
    for lr in RATES:
        kept = m.train(task["x"], task["y"], activation, lr=lr, seed=100)
        loss = m.judge(kept[max(kept)], task["x_test"], task["y_test"])["loss"]
        rows.append({"task": name, "activation": activation, "lr": lr, "loss": round(loss, 4)})
    return rows


def images(name: str, setting: str, rates: dict, seed: int) -> dict:
    labels, task = {"study": "digits", "setting": f"{name}, {setting}"}, digits(name)
    how = {"seed": seed, "generalise": False}
    if setting == "own rate":
        return own(task, labels, {a: rates[name, a] for a in PAIR}, seed)
    if setting == "all trained":
        return compared(task, labels, PAIR, lr=0.3, trained=ALL, **how)
    return compared(task, labels, (*THREE, "hard tanh"), lr=0.3, track=True, **how)


def own(task: dict, labels: dict, rates: dict, seed: int) -> dict:
    """Each activation at its own learning rate, at the end."""
    rows = []
    for name, lr in rates.items():
        kept = method().train(task["x"], task["y"], name, lr=lr, seed=seed)
        head = labels | {"activation": name, "seed": seed, "at": "end", "epoch": max(kept)}
        rows.append(head | measured(task, kept, max(kept), False))
    return {"rows": rows, "points": []}


def build(out: Path, work: Path, part: str = "all") -> list[Path]:
    from nbkit import runtime

    runtime.deterministic(seed=0)
    kept, found, rates = Work(work), [], []
    if part in ("all", "unstructured"):
        jobs = [(s, seed) for s in UNSTRUCTURED for seed in range(SEEDS)]
        found += [kept.once(f"unstructured-{s}-{seed}", partial(unstructured, s, seed)) for s, seed in jobs]
    if part in ("all", "xor"):
        jobs = [(*setting, seed) for setting in XOR for seed in range(FEWER)]
        found += [kept.once(f"xor-{e}-{n}-{seed}", partial(xor, e, n, seed)) for e, n, seed in jobs]
    if part in ("all", "targets"):
        jobs = [(K, seed) for K in MASKS for seed in range(FEWER)]
        found += [kept.once(f"targets-{K}-{seed}", partial(many, K, seed)) for K, seed in jobs]
    if part in ("all", "digits"):
        for name in DIGITS:
            for activation in PAIR:
                rates += kept.once(f"rate-{name}-{activation}", partial(rate, name, activation))
        best = {(r["task"], r["activation"]): r["lr"] for r in sorted(rates, key=lambda r: -r["loss"])}
        jobs = [(name, s, seed) for name in DIGITS for s in ("paper", "all trained", "own rate")
                for seed in range(FEWER)]  # fmt: skip
        found += [kept.once(f"digits-{n}-{s}-{seed}", partial(images, n, s, best, seed)) for n, s, seed in jobs]
    if part != "all":
        return []
    write_table(out / "networks.csv.gz", pd.DataFrame([row for one in found for row in one["rows"]]))
    write_table(out / "courses.csv.gz", pd.DataFrame([row for one in found for row in one["points"]]))
    write_table(out / "rates.csv", pd.DataFrame(rates))
    return [out / name for name in ("networks.csv.gz", "courses.csv.gz", "rates.csv")]


if __name__ == "__main__":
    run(build, __doc__, work=work_option("task-geometry"), part=part_option("unstructured", "xor", "targets", "digits"))
