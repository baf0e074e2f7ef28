"""All tables of this folder: what notebooks/09-representations/04-rich-lazy-connectivity measures beforehand.

Recurrent networks of 100 units read digits row by row, 1,500 steps of SGD from five seeds: starts of rank 1, 5, 20 and
100, brought to the size of the full one by three measures, and with two other gains; starts of 94 units with the fibre
counts of five people or with Dale's law, their shuffles and a Gaussian one, by the same three (results.csv: how large
the start was, what changed at the end and where the loss first was 0.15 or less; curves.csv: the same along training,
seed 0). weights.safetensors: the trained networks of seed 0 at four ranks, in half precision. About 9 minutes on one
core; a run that was stopped goes on where it was (delete the folder --work for a fresh start). The functions are the
notebook's method cells.
"""

from __future__ import annotations

import functools
import itertools
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from nbkit.recipes import Work, run, seeds_option, work_option, write_table, write_tensors

STEPS = 1500
LOSS = 0.15  # "equal loss": the first of every 25 steps at which the training loss is no more than that
PROBE = 40  # held-out series on which change is measured
UNITS = 100
REGIONS = 94
RANKS = (1, 5, 20)
GAIN = 1.25
MEASURES = ("Frobenius norm", "spectral norm", "spectral radius")
STRUCTURES = ("gaussian", "connectome", "connectome shuffled", "Dale", "Dale shuffled")
CURVE = (0, 25, 50, 100, 200, 300, 400, 500, 700, 900, 1100, 1300, 1500)


@functools.cache
def the_method():
    from nbkit import papers

    return papers.method("rich-lazy-connectivity")


@functools.cache
def series() -> dict[str, Tensor]:
    """Digits as eight steps of eight inputs: x, y to train on, x_test, y_test, and the probe."""
    from nbkit import datasets

    data = datasets.load("digits")
    x_test = data.x_test[:, 0]
    return {
        "x": data.x_train[:, 0], "y": data.y_train, "x_test": x_test, "y_test": data.y_test, "probe": x_test[:PROBE]
    }  # fmt: skip


def ranked(seed: int, rank: int, measure: str, gain: float) -> Tensor:
    """The start of a rank, as large as the full one of the same seed."""
    method = the_method()
    full = method.gaussian(UNITS, gain, torch.Generator().manual_seed(seed))
    return method.as_large_as(method.low_rank(full, rank), full, measure)


def dale(w: Tensor, generator: torch.Generator, excitatory: float = 0.8) -> Tensor:
    """Every unit excites or inhibits: columns of one sign, inhibition so strong that both kinds cancel."""
    inhibits = torch.rand(len(w), generator=generator) >= excitatory
    if not 0 < inhibits.sum() < len(w):
        raise ValueError("Dale's law needs units of both kinds")
    ratio = -(~inhibits).sum().double() / inhibits.sum()
    return w.abs() * torch.where(inhibits, ratio, torch.ones(len(w), dtype=torch.float64))


def shuffled(w: Tensor, generator: torch.Generator) -> Tensor:
    """The same entries off the diagonal in another order: structure gone, sizes kept."""
    off = ~torch.eye(len(w), dtype=torch.bool)
    mixed = w.clone()
    mixed[off] = w[off][torch.randperm(int(off.sum()), generator=generator)]
    return mixed


def structured(seed: int, kind: str, measure: str) -> Tensor:
    """A start of 94 units as large as a Gaussian one: person ``seed``'s fibre counts, Dale's law, or a shuffle."""
    from nbkit import datasets

    method = the_method()
    generator = torch.Generator().manual_seed(seed)
    plain = method.gaussian(REGIONS, GAIN, generator)
    w = plain
    if kind.startswith("connectome"):
        w = datasets.load("rest-fmri").fibres[seed].double()
    elif kind.startswith("Dale"):
        w = dale(plain, generator)
    if kind.endswith("shuffled"):
        w = shuffled(w, generator)
    return method.as_large_as(w, plain, measure)


def trained(w: Tensor, seed: int, record: tuple[int, ...] = ()) -> dict:
    """What one run gave: how it ended, its measures at the end and at equal loss, and those at the steps ``record``."""
    method, data = the_method(), series()
    net = method.start(w, 8, 10, seed)
    before = method.snapshot(net, data["probe"])
    found: dict = {"equal": None, "curve": []}

    def loss() -> float:
        with torch.no_grad():
            return F.cross_entropy(net(data["x"][:500]), data["y"][:500]).item()

    def measures() -> dict | None:
        after = method.snapshot(net, data["probe"])
        return method.laziness(before, after) if after["kernel"].any() and after["hidden"].any() else None

    def watch(step: int) -> None:
        if step in record:
            found["curve"].append({"step": step, "loss": loss(), **measures()})
        if found["equal"] is None and step % 25 == 0 and loss() <= LOSS:
            found["equal"] = {"step": step, **measures()}

    try:
        method.train(net, data["x"], data["y"], STEPS, seed=seed, watch=watch)
    except ValueError:
        return {**found, "ended": "diverged", "end": None}
    with torch.no_grad():
        accuracy = (net(data["x_test"]).argmax(1) == data["y_test"]).float().mean().item()
    end = measures()
    ended = "trained" if end else "silent"
    weights = {name: w.detach().tolist() for name, w in net.named_parameters()} if record else None
    return {**found, "ended": ended, "end": end and {"step": STEPS, **end}, "loss": loss(), "accuracy": accuracy,
            "weights": weights}  # fmt: skip


def rows_of(found: dict, w: Tensor, **where) -> list[dict]:
    """The run's rows of results.csv: one for the end, one for equal loss; with the three sizes of the start w."""
    sizes = (size(w).item() for size in the_method().SIZES.values())
    where |= dict(zip(("frobenius", "spectral", "radius"), sizes, strict=True))
    rows = []
    for at in ("end", "equal"):
        row = {**where, "at": at, "ended": found["ended"], **(found[at] or {})}
        if at == "end":
            row |= {name: found.get(name) for name in ("loss", "accuracy")}
        rows.append(row)
    return rows


def build(out: Path, work: Path, seeds: int) -> list[Path]:
    from nbkit import runtime

    runtime.deterministic(seed=0)
    kept = Work(work)
    rows, curves, weights = [], [], {}
    cases = [(rank, m, GAIN) for rank, m in itertools.product(RANKS, MEASURES)]
    cases += [(UNITS, "Frobenius norm", GAIN)]
    cases += [(rank, "Frobenius norm", gain) for rank, gain in itertools.product((1, UNITS), (0.75, 2.0))]
    for (rank, measure, gain), seed in itertools.product(cases, range(seeds)):
        shown = seed == 0 and (measure, gain) == ("Frobenius norm", GAIN)
        w = ranked(seed, rank, measure, gain)
        one = functools.partial(trained, w, seed, CURVE if shown else ())
        found = kept.once(f"rank-{rank}-{measure}-{gain}-{seed}", one)
        # the full one is what others are brought to: the same run by every measure
        for name in MEASURES if (rank, gain) == (UNITS, GAIN) else (measure,):
            rows += rows_of(found, w, start=f"rank {rank}", measure=name, gain=gain, seed=seed)
        curves += [{"start": f"rank {rank}", **row} for row in found["curve"]]
        if shown:
            weights |= {f"rank {rank}.{name}": torch.tensor(p).half() for name, p in found["weights"].items()}
    for kind, measure, seed in itertools.product(STRUCTURES, MEASURES[::-1], range(seeds)):
        # the Gaussian one is what the others are brought to: the same run by every measure
        key = "spectral radius" if kind == "gaussian" else measure
        w = structured(seed, kind, measure)
        found = kept.once(f"structure-{kind}-{key}-{seed}", functools.partial(trained, w, seed))
        rows += rows_of(found, w, start=kind, measure=measure, gain=GAIN, seed=seed)
    write_table(out / "results.csv", pd.DataFrame(rows).round(4))
    write_table(out / "curves.csv", pd.DataFrame(curves).round(4))
    write_tensors(out / "weights.safetensors", weights)
    return [out / name for name in ("results.csv", "curves.csv", "weights.safetensors")]


if __name__ == "__main__":
    run(build, __doc__, work=work_option("rich-lazy-connectivity"), seeds=seeds_option(5))
