"""All tables and the network of this folder: what notebooks/05-data/04-sep-clr measures beforehand.

Garments of Fashion-MNIST, half of them with a digit of MNIST laid over. Pairs of small encoders are trained with the
paper's objective, without parts of it and with other weights, beside SimCLR and contrastive PCA; then garment and digit
are read from the two spaces by probes. Learning rates and weights are chosen on seed 100, which is in no other table.
About 8 minutes on one core; a run that was stopped goes on where it was (delete the folder --work for a fresh start).
The functions are the notebook's method cells.
"""

from __future__ import annotations

import functools
import math
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from nbkit import forward
from nbkit.recipes import Work, run, seeds_option, work_option, write_table, write_tensors

EPOCHS, LONG, PILOT = 8, 16, 100
RATES, LOWER = (0.001, 0.003, 0.01), 0.0003
EQUAL = {"common": 1.0, "salient": 1.0, "null": 10.0, "joint": 10.0}
LARGE = {"common": 1.0, "salient": 1000.0, "null": 1000.0, "joint": 10.0}
TUNED = {  # of each method what is tried beside the learning rate; all on the pilot's validation images
    "SepCLR, lambda 10": [EQUAL],
    "SepCLR, lambda 100": [EQUAL | {"joint": 100.0}],
    "no k-JEM": [EQUAL | {"joint": 0.0, "null": weight} for weight in (10.0, 100.0)],
    "no null": [EQUAL | {"null": 0.0, "joint": 100.0}],
    "SimCLR": [{"common": 1.0}],
}
SHIPPED = "SepCLR, lambda 100"
A = (0.0, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 1000.0)


@functools.cache
def method():
    from nbkit import papers

    return papers.method("sep-clr")


class Single(nn.Module):
    """SimCLR: one encoder and projector with about the pair's weights, their output cut in halves called c and s."""

    def __init__(self):
        super().__init__()
        self.encoder = method().encoder(32, 18)
        self.projector = method().projector(32)

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        row = self.encoder(x)
        head = self.projector(row)
        return list(row.chunk(2, 1)), [head, head]


def contrastive_pca(target: Tensor, background: Tensor, a: float, k: int) -> Tensor:
    """[d, k]: the k directions of largest eigenvalue of cov(target) - a cov(background); rows [N, d].

    Raises: ValueError, NotFinite.
    """
    for part in (target, background):
        method().need(part.ndim == 2 and len(part) > 1, f"rows [N, d], N >= 2, not {list(part.shape)}")
        forward.check_inputs(part, name="rows")
    method().need(target.shape[1] == background.shape[1], "rows of one length d")
    method().need(0 <= a < math.inf and 1 <= k <= target.shape[1], f"a >= 0 and 1 <= k <= d, not {a}, {k}")
    contrast = torch.cov(target.double().T) - a * torch.cov(background.double().T)
    return torch.linalg.eigh(contrast).eigenvectors.flip(1)[:, :k].to(target)


def scenes(garments, digits, seed: int = 0, n: int = 3000, held: int = 1000) -> dict:
    """n background and n target images, and held more targets; divided first, so that no image is used twice.

    garments, digits: (x, y) each. Gives x, y (0, 1), the background, and (images, garment, digit) of the targets.
    """
    m = method()
    m.need(
        len(garments[0]) >= 2 * n + held and len(digits[0]) >= n + held, f"too few images for {n=}, {held=}"
    )
    random = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(garments[0]), generator=random)[: 2 * n + held]
    background, first, second = rows.split([n, n, held])
    shown = torch.randperm(len(digits[0]), generator=random)[: n + held].split([n, held])
    made = {}
    for name, under, over in (("train", first, shown[0]), ("validation", second, shown[1])):
        images = m.compose(garments[0][under], digits[0][over])
        made[name] = (images, garments[1][under], digits[1][over])
    made["background"] = m.compose(garments[0][background])
    made["x"] = torch.cat([made["background"], made["train"][0]])
    made["y"] = torch.arange(2 * n) // n
    return made


@functools.cache
def images(seed: int) -> dict:
    """Training and validation images of a seed; the test images are the same for all."""
    from nbkit import datasets

    m, garments, digits = method(), datasets.load("fashion-mnist"), datasets.load("mnist")
    made = scenes((garments.x_train, garments.y_train), (digits.x_train, digits.y_train), seed)
    shown = m.compose(garments.x_test[1000:], digits.x_test[:1000])
    made["test"] = (shown, garments.y_test[1000:], digits.y_test[:1000])
    made["test background"] = m.compose(garments.x_test[:1000])
    return made


def circles(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """x [2n, 4]: an angle u on a circle in the plane of columns 0 and 1; targets have a second
    angle w in columns 2 and 3, background has zeros there. y [2n] is 0, 1, 0, 1, ..."""
    method().need(n > 1, f"n is 2 or more, not {n}")
    random = torch.Generator().manual_seed(seed)
    u, w = 2 * math.pi * torch.rand(2, 2 * n, generator=random)
    y = torch.arange(2 * n) % 2
    return torch.stack([u.cos(), u.sin(), y * w.cos(), y * w.sin()], 1), y


def explained(rows: Tensor, factor: Tensor) -> float:
    """Share of the variance of rows [N, d] that a linear map of factor [N, k] gives, 0 to 1."""
    forward.check_inputs(rows, name="rows")
    method().need(len(rows) == len(factor), f"a factor a row, not {len(factor)} for {len(rows)}")
    known = torch.cat([factor, torch.ones(len(factor), 1)], 1)
    rest = rows - known @ torch.linalg.lstsq(known, rows).solution
    return 1 - (rest.square().sum() / (rows - rows.mean(0)).square().sum()).item()


def trained(name: str, seed: int, weights: dict, lr: float, epochs: int):
    m, data = method(), images(seed)
    torch.manual_seed(seed)
    net = Single() if name == "SimCLR" else m.Pair()
    course = m.fit(net, data["x"], data["y"], weights, epochs=epochs, lr=lr, seed=seed)
    return net.eval(), course


def probed(spaces: dict, data: dict, part: str, kinds=("linear",)) -> dict:
    """The four probes of two spaces, {part: [c, s]}; columns such as "C garment"."""
    from sklearn.svm import SVC

    found = {}
    if spaces[part][0] is spaces[part][1]:  # one space under both names: probed once
        spaces = {name: rows[:1] for name, rows in spaces.items()}
    for kind in kinds:
        four = method().matrix(
            spaces["train"], spaces[part], data["train"][1:], data[part][1:], SVC() if kind == "rbf" else None
        )
        found[kind] = {f"{space} {what}": round(value, 3) for (space, what), value in four.items()}
        found[kind] |= {
            f"S {what}": found[kind][f"C {what}"] for what in ("garment", "digit") if ("S", what) not in four
        }
    return found


def score(four: dict) -> float:
    """The sum of the two gaps."""
    return round(four["S digit"] - four["C digit"] + four["C garment"] - four["S garment"], 3)


def swapped(spaces: dict) -> dict:
    return {part: rows[::-1] for part, rows in spaces.items()}


def spaces_of(net, data: dict) -> dict:
    return {part: method().represent(net, data[part][0])[0] for part in ("train", "validation", "test")}


def tried(name: str, weights: dict, lr: float, epochs: int = EPOCHS) -> list[dict]:
    """One setting on the pilot's validation images."""
    data = images(PILOT)
    net, _ = trained(name, PILOT, weights, lr, epochs)
    spaces = spaces_of(net, data)
    found = [probed(way, data, "validation")["linear"] for way in (spaces, swapped(spaces))]
    four = max(found, key=score) if name == "SimCLR" else found[0]
    return [
        {"method": name, "epochs": epochs, "lr": lr}
        | {f"weight {k}": weights.get(k, 0.0) for k in LARGE}
        | four
        | {"gaps": score(four)}
    ]


def tuned(kept: Work, name: str) -> list[dict]:
    """All settings at all rates; the best goes on to 0.0003 where the lowest rate is its best."""
    rows = []
    for i, weights in enumerate(TUNED[name]):
        for lr in RATES:
            rows += kept.once(f"tune-{name}-{i}-{lr:g}", partial(tried, name, weights, lr))
    weights, lr = chosen(rows)[name]
    if lr == min(RATES):
        rows += kept.once(f"tune-{name}-{LOWER:g}", partial(tried, name, weights, LOWER))
    return rows


def norms(net, data: dict) -> dict:
    """Mean length of the salient head (where the null term acts) and representation: background over target."""
    shown = [method().represent(net, x) for x in (data["test background"], data["test"][0])]
    found = {}
    for name, place in (("representation", 0), ("head", 1)):
        background, target = (each[place][1].norm(dim=1).mean().item() for each in shown)
        found[f"norm, {name}"] = round(background / target, 3)
    return found


def rows_of(name: str, seed: int, spaces: dict, data: dict, **extra) -> list[dict]:
    kinds = probed(spaces, data, "test", ("linear", "rbf"))
    return [{"method": name, "seed": seed, "probe": kind} | four | extra for kind, four in kinds.items()]


def measured(name: str, seed: int, weights: dict, lr: float, out: str | None = None) -> dict:
    """A network of a seed on the test images, and its course; SimCLR also with contrastive PCA after it."""
    data = images(seed)
    net, course = trained(name, seed, weights, lr, EPOCHS)
    if out:
        from nbkit.recipes import round_to_half

        round_to_half(net)
        write_tensors(
            Path(out), {k: v.half() if v.is_floating_point() else v for k, v in net.state_dict().items()}
        )
    spaces = spaces_of(net, data)
    extra = {} if name == "SimCLR" else norms(net, data)
    if name == "SimCLR":
        ways = [spaces, swapped(spaces)]
        spaces = max(ways, key=lambda way: score(probed(way, data, "validation")["linear"]))
    rows = rows_of(name, seed, spaces, data, **extra)
    if name == "SimCLR":
        flat = {part: torch.cat(rows_, 1) for part, rows_ in spaces.items()}
        background = torch.cat(method().represent(net, data["background"])[0], 1)
        rows += contrasted("SimCLR, cPCA", seed, flat, background, data)
    points = [{"method": name, "seed": seed, "epoch": e + 1} | {k: round(v, 4) for k, v in row.items()}
              for e, row in enumerate(course)]  # fmt: skip
    return {"rows": rows, "points": points}


def contrasted(name: str, seed: int, flat: dict, background, data: dict) -> list[dict]:
    """C: the 16 main directions of the background; S: 16 directions of contrastive PCA, a by validation."""
    common = contrastive_pca(background, background, 0.0, 16)
    best = {}
    for a in A:
        salient = contrastive_pca(flat["train"], background, a, 16)
        spaces = {part: [rows @ common, rows @ salient] for part, rows in flat.items()}
        best[a] = score(probed(spaces, data, "validation")["linear"]), spaces
    a = max(best, key=lambda a: best[a][0])
    return rows_of(name, seed, best[a][1], data, a=a)


def untrained_and_plain(seed: int) -> list[dict]:
    """What needs no training: pixels, 16 principal components, contrastive PCA, encoders as drawn."""
    m, data = method(), images(seed)
    flat = {part: data[part][0].flatten(1) for part in ("train", "validation", "test")}
    background = data["background"].flatten(1)
    torch.manual_seed(seed)
    net = m.Pair()
    rows = rows_of("untrained", seed, spaces_of(net, data), data, **norms(net, data))
    rows += contrasted("cPCA", seed, flat, background, data)
    plain = contrastive_pca(flat["train"], background, 0.0, 16)
    rows += rows_of("16 PCs", seed, {k: [v @ plain] * 2 for k, v in flat.items()}, data)
    if seed == 0:  # for scale: what is there to be read
        rows += rows_of("all pixels", seed, {k: [v] * 2 for k, v in flat.items()}, data)
    return rows


def chosen(rows: list[dict]) -> dict:
    """Of each method the setting with the largest sum of gaps; ties go to the first tried."""
    best = {}
    for row in rows:
        if row["method"] not in best or row["gaps"] > best[row["method"]]["gaps"]:
            best[row["method"]] = row
    return {name: ({k: row[f"weight {k}"] for k in LARGE}, row["lr"]) for name, row in best.items()}


def build(out: Path, work: Path, seeds: int = 3) -> list[Path]:
    from nbkit import runtime

    runtime.deterministic(seed=0)
    kept = Work(work)
    tuning = [row for name in TUNED for row in tuned(kept, name)]
    best = chosen(tuning)
    longer = "SepCLR, lambda 10"  # for scale, not to choose by: the same for twice as long
    tuning += kept.once(f"long-{longer}", partial(tried, longer, *best[longer], LONG))
    best["SepCLR, beta 1000"] = (LARGE, 0.003)  # not tuned
    found = []
    for seed in range(seeds):
        for name, (weights, lr) in best.items():
            to = str(work / "net.safetensors") if (name, seed) == (SHIPPED, 0) else None
            key = f"{name}-{seed}-{lr:g}"
            found.append(kept.once(key, partial(measured, name, seed, weights, lr, to)))
    rows = [row for one in found for row in one["rows"]]
    for seed in range(seeds):
        rows += kept.once(f"plain-{seed}", partial(untrained_and_plain, seed))
    table = pd.DataFrame(rows).sort_values(["probe", "method", "seed"], kind="stable")
    write_table(out / "probes.csv", table)
    write_table(out / "courses.csv", pd.DataFrame([point for one in found for point in one["points"]]))
    write_table(out / "tuning.csv", pd.DataFrame(tuning))
    (out / "net.safetensors").write_bytes((work / "net.safetensors").read_bytes())
    return [out / name for name in ("probes.csv", "courses.csv", "tuning.csv", "net.safetensors")]


if __name__ == "__main__":
    run(build, __doc__, work=work_option("sep-clr"), seeds=seeds_option(3))
