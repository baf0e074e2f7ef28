"""All tables and networks of this folder: what notebooks/09-representations/03-representation-biases measures first.

Networks with two outputs, on 32 random bits and on pairs of handwritten digits: how much of the variance of a hidden
layer each of the two features explains when both are known, twice as late and at the end. Six seeds an arm, trained
side by side. About 9 minutes on one core; a run that was stopped goes on where it was (delete the folder --work for a
fresh start). The functions are the notebook's method cells.
"""

from __future__ import annotations

import functools
from functools import partial
from pathlib import Path

import pandas as pd

from nbkit.recipes import Work, part_option, run, seeds_option, work_option, write_table, write_tensors

NAMES = ("easy", "hard")
BOTH, FIRST, SECOND = (1.0, 1.0), (1.0, 0.0), (0.0, 1.0)
ADAM = {"optimizer": "Adam", "lr": 1e-3}
PHASE = 60  # epochs of one feature alone
BITS = {  # epochs at most, and what differs from two features of bits (0) and (1, 2) under SGD
    "XOR": {"epochs": 100},
    "parity 3": {"hard": (1, 2, 3), "epochs": 260},
    "two easy": {"hard": (1,), "epochs": 40},
    "easy only": {"plan": [(FIRST, 80)], "on": True},
    "hard only": {"plan": [(SECOND, 100)]},
    "easy first": {"plan": [(FIRST, PHASE), (BOTH, 100)]},
    "hard first": {"plan": [(SECOND, PHASE), (BOTH, 100)]},
    "hard first, short": {"plan": [(SECOND, 38), (BOTH, 60)]},
    "second in 10 %": {"hard": (1,), "epochs": 130, "labelled": 0.1},
    "smoothed targets": {"epochs": 100, "how": {"smooth": 0.2}},
    "SGD, dropout 0.1": {"epochs": 140, "how": {"dropout": 0.1}},
    "rate 0.1": {"plan": [(BOTH, 100)], "on": True, "how": {"lr": 0.1}},
    "rate 0.02": {"epochs": 200, "how": {"lr": 0.02}},
    "Adam": {"epochs": 30, "how": ADAM},
    "Adam, dropout 0.1": {"epochs": 30, "how": ADAM | {"dropout": 0.1}},
    "Adam, dropout 0.25": {"epochs": 40, "how": ADAM | {"dropout": 0.25}},
    "Adam, parity 3": {"hard": (1, 2, 3), "epochs": 40, "how": ADAM},
    "Adam, parity 4": {"hard": (1, 2, 3, 4), "epochs": 60, "how": ADAM},
    "1 layer": {"epochs": 160, "hidden": (64,)},
    "2 layers": {"epochs": 100, "hidden": (64, 64)},
    "width 32": {"epochs": 100, "hidden": (32,) * 4},
    "width 128": {"epochs": 70, "hidden": (128,) * 4},
}
DIGITS = {  # labels of the easy and of the hard feature
    "digits": ("magnitude", "parity"),
    "digits, exchanged": ("parity", "magnitude"),
    "digits, two easy": ("magnitude", None),  # the same label of either digit
}
STORED = ("XOR", "hard first", "Adam, dropout 0.1")  # whose seed 0 is kept
COMPARED = ("XOR", "easy only", "hard only")
TRACKED = ("XOR", "parity 3", "easy only", "hard first", "Adam", "Adam, dropout 0.1", "digits")
LAYERED = ("XOR", "parity 3", "Adam, dropout 0.1", "digits")

LABELS = {"magnitude": lambda d: d >= 5, "parity": lambda d: d % 2 == 1}


@functools.cache
def method():
    from nbkit import papers

    return papers.method("representation-biases")


def bits(seeds, hard) -> dict:
    """{"train", "val", "test": (x [S, n, 32], f [S, n, 2])}, independent of each other."""
    m, found = method(), {}
    for place, (name, n) in enumerate((("train", 8192), ("val", 2048), ("test", 2048))):
        x = m.draw_bits([seed + place * 10**6 for seed in seeds], n)
        found[name] = (x, m.features(x, m.EASY, hard))
    return found


def pair_up(images, labels, n: int, seed: int) -> tuple:
    """x [n, 2 D], two images side by side, and their labels [n, 2]; drawn with replacement."""
    import torch

    chosen = torch.randint(len(images), (n, 2), generator=torch.Generator().manual_seed(seed))
    return images.flatten(1)[chosen].flatten(1), labels[chosen]


def signs(digits, label: str):
    """-1 or 1 for each digit: is it 5 or more (magnitude), is it odd (parity)?"""
    return 2 * LABELS[label](digits).float() - 1


def digits(seeds, easy: str, hard: str | None) -> dict:
    """Pairs of 8 x 8 digits. The easy feature is a label of the left one, the hard one says whether the other label
    differs; without one it is the easy label of the right digit. 1,149 images to train on and 288 to validate, another
    split for each seed; the kit's 360 to test."""
    import torch

    from nbkit import datasets

    data = datasets.load("digits")
    mean, sd = data.x_train.mean(0), data.x_train.std()
    images, tests = (data.x_train - mean) / sd, (data.x_test - mean) / sd
    found = {"train": [], "val": [], "test": []}
    for seed in seeds:
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        cut = len(images) * 4 // 5
        pools = {
            "train": (images[order[:cut]], data.y_train[order[:cut]], 8192),
            "val": (images[order[cut:]], data.y_train[order[cut:]], 2048),
            "test": (tests, data.y_test, 2048),
        }
        for place, (name, (pool, labels, n)) in enumerate(pools.items()):
            x, pair = pair_up(pool, labels, n, seed + place * 10**6)
            other = signs(pair, hard).prod(1) if hard else signs(pair[:, 1], easy)
            f = torch.stack([signs(pair[:, 0], easy), other], 1)
            found[name].append((x, f))
    return {name: tuple(map(torch.stack, zip(*parts, strict=True))) for name, parts in found.items()}


def weights(plan, labelled: float, shape, seeds):
    """For each epoch the weights of the features, [2] or [S, n, 2]; and the last epoch of the phase before the last."""
    import torch

    mask = torch.ones(shape)
    if labelled < 1:
        draws = [torch.rand(shape[1], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        mask[..., 1] = (torch.stack(draws) < labelled).float()
    every = [torch.tensor(weight) * (mask if labelled < 1 else 1.0) for weight, n in plan for _ in range(n)]
    return every, sum(n for _, n in plan[:-1])


def arm(name: str, n_seeds: int) -> dict:
    """Trains and measures the networks of an arm: rows, the course of training, the networks where wanted."""
    import torch

    m, seeds = method(), range(n_seeds)
    labels = DIGITS.get(name.partition(", Adam")[0])
    real = labels is not None
    spec = BITS[name] if not real else {"epochs": 25, "how": ADAM} if "Adam" in name else {"epochs": 100}
    data = digits(seeds, *labels) if real else bits(seeds, spec.get("hard", m.XOR))
    level = 0.9 if real else 0.999
    plan = spec.get("plan") or [(BOTH, spec["epochs"])]
    x, f = data["train"]
    nets = m.start(seeds, x.shape[-1], 2, spec.get("hidden", m.HIDDEN))
    every, before = weights(plan, spec.get("labelled", 1.0), f.shape, seeds)
    asked = torch.tensor(plan[-1][0]) > 0
    how = {"seeds": seeds} | spec.get("how", {})
    torch.manual_seed(0)  # dropout
    kept, reached, right = {0: nets}, {}, {}
    for epoch, now in m.train(nets, x, f, every, **how):
        kept[epoch] = now
        right[epoch] = ((m.layers(now, data["val"][0])[-1] > 0) == (data["val"][1] > 0)).float().mean(1)
        for seed in seeds:
            if epoch > before and seed not in reached and bool((right[epoch][seed, asked] > level).all()):
                reached[seed] = epoch
        last = before + 2 * (max(reached.values(), default=0) - before)
        if len(reached) == n_seeds and epoch >= last and len(plan) == 1 and not spec.get("on"):
            break
    rows, course, best = [], [], []
    for seed in seeds:
        there = reached.get(seed)
        places = {"start": 0} | ({"phase 1": before} if before else {})
        if there:
            places["criterion"] = there
            if (twice := before + 2 * (there - before)) <= epoch:
                places["twice"] = twice
        places["end"] = epoch
        for at, when in places.items():
            head = {"arm": name, "seed": seed, "at": at, "epoch": when}
            rows += [head | row for row in measured(kept[when], seed, data, at, name in LAYERED, real)]
        if name in TRACKED:
            course += tracked(name, seed, kept, right, data, there)
        best.append([p[seed].half().tolist() for p in kept[there or epoch]] if name in STORED + COMPARED else None)
    return {"rows": rows, "course": course, "nets": best}


def one(nets, seed: int) -> list:
    return [p[seed : seed + 1] for p in nets]


def both(nets, seed: int, data: dict) -> tuple[list, list]:
    """Responses of every layer of one network, to the validation and the test inputs."""
    m = method()
    return tuple([a[0] for a in m.layers(one(nets, seed), data[s][0][seed : seed + 1])] for s in ("val", "test"))


def measured(nets, seed: int, data: dict, at: str, layered: bool, real: bool) -> list[dict]:
    """A row for the last hidden layer, with all measures; for others, where wanted, with R2 alone."""
    m, (fit, shown) = method(), both(nets, seed, data)
    f_fit, f = (data[s][1][seed] for s in ("val", "test"))
    top, found = len(nets) // 2 - 1, []
    for layer in range(1, top + 1) if layered else (top,):
        row = {"layer": layer, "last": layer == top}
        for kind, place in (("", 2 * layer - 1), ("pre-ReLU ", 2 * layer - 2)):
            for k, name in enumerate(NAMES):
                row[f"{kind}{name}"] = m.explained(fit[place], f_fit[:, k], shown[place], f[:, k])
        if layer == top:
            row |= last_layer(fit[-2], f_fit, shown[-2], f)
            row |= {f"accuracy {n}": float((shown[-1][:, k] * f[:, k] > 0).float().mean()) for k, n in enumerate(NAMES)}
            row |= {f"margin {n}": float((shown[-1][:, k] * f[:, k]).mean()) for k, n in enumerate(NAMES)}
        if layer == top and real and at != "start":  # on inputs with both answers right
            known_fit, known = (((z[-1] * g) > 0).all(1) for z, g in ((fit, f_fit), (shown, f)))
            for k, name in enumerate(NAMES):
                sides = (fit[-2][known_fit], f_fit[known_fit, k], shown[-2][known], f[known, k])
                row[f"right {name}"] = m.explained(*sides)
        if layer == top - 1 or (layer == top and at != "start"):
            row |= steered(one(nets, seed), fit[2 * layer - 1], f_fit, shown[2 * layer - 1], f, layer)
        found.append(row)
    if not layered and top > 1 and at in ("criterion", "twice"):
        row = {"layer": top - 1, "last": False}
        place = 2 * top - 3
        row |= {n: m.explained(fit[place], f_fit[:, k], shown[place], f[:, k]) for k, n in enumerate(NAMES)}
        found.append(row | steered(one(nets, seed), fit[place], f_fit, shown[place], f, top - 1))
    return [{k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in found]


def live(fit):
    """The units that change more than hardly ever."""
    return fit.std(0) > 1e-3 * fit.std(0).max()


def last_layer(fit, f_fit, phi, f) -> dict:
    import torch
    from sklearn.linear_model import LogisticRegression

    m = method()
    row = {"variance": float((phi - fit.mean(0)).square().sum(1).mean())}
    used = live(fit)
    sd = fit.std(0)[used]
    fit_used, phi_used = fit[:, used], phi[:, used]
    pcs = m.project(fit, phi, 1)[:, 0]
    for k, name in enumerate(NAMES):
        row[f"scaled {name}"] = m.explained(fit_used / sd, f_fit[:, k], phi_used / sd, f[:, k])
        pairs = zip(fit_used.split(1, 1), phi_used.split(1, 1), strict=True)
        units = [m.explained(one_fit, f_fit[:, k], one, f[:, k]) > 0.1 for one_fit, one in pairs]
        row[f"dense {name}"] = sum(units) / len(units)
        row[f"PC 1 {name}"] = float(torch.corrcoef(torch.stack([pcs, f[:, k]]))[0, 1].square())
        design = torch.cat([fit, torch.ones(len(fit), 1)], 1).double()
        w = torch.linalg.lstsq(design, f_fit[:, k : k + 1].double(), driver="gelsd").solution
        read = torch.cat([phi, torch.ones(len(phi), 1)], 1).double() @ w
        row[f"decoded {name}"] = float((read[:, 0] * f[:, k] > 0).double().mean())
    agree, apart = f_fit[:, 0] == f_fit[:, 1], f[:, 0] != f[:, 1]
    clf = LogisticRegression(max_iter=2000).fit(fit[agree].double().numpy(), f_fit[agree, 0].numpy())
    row["follows easy"] = float((clf.predict(phi[apart].double().numpy()) == f[apart, 0].numpy()).mean())
    return row


def steered(nets, fit, f_fit, phi, f, layer: int) -> dict:
    """Of each feature the step against it that changes half of its answers: in units of its difference of means, its
    length, what the other feature's answers do, and what a random step of that length does."""
    import torch

    m, row = method(), {}
    noise = torch.randn(phi.shape[1], generator=torch.Generator().manual_seed(layer))
    for k, name in enumerate(NAMES):
        delta = m.direction(fit, f_fit[:, k])
        low, high = 0.0, 8.0
        if m.flips(nets, phi, f[:, k], high * delta, layer)[k] < 0.5:
            row[f"half {name}"] = None
            continue
        for _ in range(12):
            c = (low + high) / 2
            low, high = (low, c) if m.flips(nets, phi, f[:, k], c * delta, layer)[k] >= 0.5 else (c, high)
        other = m.flips(nets, phi, f[:, k], high * delta, layer)
        alike = noise * delta.norm() * high / noise.norm()
        row |= {
            f"half {name}": high,
            f"length {name}": float(high * delta.norm()),
            f"other of {name}": float(other[1 - k]),
            f"random {name}": float(m.flips(nets, phi, f[:, k], alike, layer)[k]),
        }
    return row


def tracked(name, seed: int, kept: dict, right: dict, data: dict, there: int | None) -> list[dict]:
    """R2, variance and validation accuracy through training: about forty epochs, and those around the criterion."""
    m, found = method(), []
    last = max(kept)
    until = min(last, 2 * there) if there and name not in ("easy only", "hard first") else last
    step = max(1, until // 30)
    for epoch in sorted({*range(0, until + 1, step), *([there] if there else [])}):
        fit, shown = both(kept[epoch], seed, data)
        fit, phi = fit[-2], shown[-2]
        f_fit, f = (data[s][1][seed] for s in ("val", "test"))
        row = {"arm": name, "seed": seed, "epoch": epoch, "criterion": there}
        row["variance"] = float((phi - fit.mean(0)).square().sum(1).mean())
        for k, n in enumerate(NAMES):
            row[n] = m.explained(fit, f_fit[:, k], phi, f[:, k])
            row[f"accuracy {n}"] = float(right[epoch][seed, k]) if epoch else None
        found.append({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()})
    return found


def tensors(nets: list) -> list:
    import torch

    return [torch.tensor(p)[None] for p in nets]


def alike(stored: dict[str, list]) -> list[dict]:
    """How alike a network is to those of another kind and other seeds, on the same 300 inputs: the mean."""
    import numpy as np
    from scipy.stats import rankdata

    from nbkit.representations import alignment, rdm

    m = method()
    x = m.draw_bits([999], 300)
    keys = [(kind, seed) for kind, every in stored.items() for seed in range(len(every))]
    phis = {(kind, seed): m.layers(tensors(stored[kind][seed]), x)[-2][0] for kind, seed in keys}
    measures = {}
    for metric in ("correlation", "euclidean"):
        ranks = np.stack([rankdata(rdm(phi, metric).numpy()) for phi in phis.values()])
        measures[f"RSA, {metric}"] = np.corrcoef(ranks)
    grams = [phi @ phi.T for phi in phis.values()]
    measures["CKA"] = np.array([[alignment(a, b) for b in grams] for a in grams])
    rows = []
    for measure, table in measures.items():
        for i, (kind, seed) in enumerate(keys):
            for other in stored:
                there = [table[i, j] for j, key in enumerate(keys) if key[0] == other and key[1] != seed]
                row = {"measure": measure, "kind": kind, "seed": seed, "other": other}
                rows.append(row | {"similarity": round(float(np.mean(there)), 4)})
    return rows


def linear(seed: int) -> list[dict]:
    """What a linear model of the inputs gets right: logistic regression, test accuracy."""
    from sklearn.linear_model import LogisticRegression

    rows = []
    sets = {"XOR": bits([seed], method().XOR)} | {name: digits([seed], *of) for name, of in DIGITS.items()}
    for name, data in sets.items():
        (x, f), (x_test, f_test) = ((t[0].numpy() for t in data[s]) for s in ("train", "test"))
        for k, feature in enumerate(NAMES):
            clf = LogisticRegression(max_iter=300, C=0.01).fit(x, f[:, k])
            corr = abs(float((f_test[:, 0] * f_test[:, 1]).mean() - f_test[:, 0].mean() * f_test[:, 1].mean()))
            score = round(float(clf.score(x_test, f_test[:, k])), 4)
            rows.append({"task": name, "seed": seed, "feature": feature, "linear": score, "covariance": round(corr, 4)})
    return rows


def build(out: Path, work: Path, seeds: int = 6, part: str = "all") -> list[Path]:
    import torch

    from nbkit import runtime

    runtime.deterministic(seed=0)
    kept, names = Work(work), []
    names += list(BITS) if part in ("all", "bits") else []
    if part in ("all", "digits"):
        names += [f"{name}{tail}" for name in DIGITS for tail in ("", ", Adam")]
    found = {name: kept.once(name, partial(arm, name, seeds)) for name in names}
    if part != "all":
        return []
    nets = {name: found[name]["nets"] for name in STORED + COMPARED}
    likeness = kept.once("likeness", lambda: alike({name: nets[name] for name in COMPARED}))
    floor = [row for seed in range(seeds) for row in kept.once(f"linear-{seed}", partial(linear, seed))]
    rows = pd.DataFrame([r for one in found.values() for r in one["rows"]])
    ends = rows["arm"].str.contains("first|digits|smoothed|rate") & rows["last"]  # elsewhere little comes after twice
    write_table(out / "networks.csv.gz", rows[rows["at"].ne("end") | ends].round(3))
    write_table(out / "courses.csv.gz", pd.DataFrame([r for one in found.values() for r in one["course"]]))
    write_table(out / "likeness.csv.gz", pd.DataFrame(likeness))
    write_table(out / "linear.csv", pd.DataFrame(floor))
    half = {
        f"{name}/{i}": torch.tensor(p).half()[None] for name in STORED for i, p in enumerate(nets[name][0])
    }
    write_tensors(out / "networks.safetensors", half)
    files = ("networks.csv.gz", "courses.csv.gz", "likeness.csv.gz", "linear.csv", "networks.safetensors")
    return [out / name for name in files]


if __name__ == "__main__":
    options = {"seeds": seeds_option(6), "part": part_option("bits", "digits")}
    run(build, __doc__, work=work_option("representation-biases"), **options)
