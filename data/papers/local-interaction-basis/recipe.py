"""All files of this folder: what notebooks/03-neurons/08-local-interaction-basis measures beforehand.

Six networks that add modulo 31, trained here (three are stored), and six small MNIST networks, three of the kit and
three more of the same plan: in seven bases, how many edges each section needs, test accuracy by the number of edges,
loss by the number of nodes; and how much of a direction of the adders lies at one frequency. About 5 minutes
on one core; a run that was stopped goes on where it was (delete the folder --work for a fresh start). The functions
are the notebook's method cells.
"""

from __future__ import annotations

import functools
import itertools
from bisect import bisect_left
from functools import partial
from pathlib import Path

import pandas as pd
import torch

from nbkit.recipes import Work, round_to_half, run, seeds_option, work_option, write_table, write_tensors

P = 31  # the modulus
SEEN = 720  # of 961 pairs in training: 75 %
STORED = 3  # networks whose weights are stored
EDGES = (8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072)
NODES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
TOLERANCE = {"mod-add": 0.001, "MNIST": 0.002}
BUILT_ON = 2000  # MNIST training images behind the bases
TESTED = 1000  # MNIST test images
TURNED = {"random": "PCA", "LIB, turned": "LIB"}  # and the basis that is turned at random
TOP = 20  # directions of the adders whose frequencies are looked at


def pairs(seed: int):
    """x [961, 62], y [961], and the places of the training and of the test pairs."""
    table = torch.cartesian_prod(torch.arange(P), torch.arange(P))
    x = torch.nn.functional.one_hot(table, P).flatten(1).float()
    order = torch.randperm(P * P, generator=torch.Generator().manual_seed(seed))
    return x, table.sum(1) % P, order[:SEEN], order[SEEN:]


def adder(state=None, seed: int = 0) -> torch.nn.Sequential:
    """The 62-96-96-31 network, fresh or with these weights."""
    from nbkit import models

    model = models.build("lenet-300-100", seed=seed, inputs=2 * P, hidden=(96, 96), classes=P)
    if state is not None:
        model.load_state_dict({name: weight.float() for name, weight in state.items()})
    return model.eval()


def train(seed: int) -> torch.nn.Sequential:
    """Full batches, AdamW, decay 1.0; the weights rounded to 16 bits."""
    from nbkit import training

    x, y, seen, _ = pairs(seed)
    model = adder(seed=seed)
    training.fit(
        model, (x[seen], y[seen]), steps=2500, batch=SEEN, lr=3e-3, optimizer="adamw", weight_decay=1.0, seed=seed
    )
    round_to_half(model)
    return model.eval()


@functools.cache
def digits():
    """The kit's MNIST at 14 x 14: training x and y, test x and y."""
    from nbkit import datasets

    data, half = datasets.load("mnist"), torch.nn.AvgPool2d(2)
    return half(data.x_train), data.y_train, half(data.x_test[:TESTED]), data.y_test[:TESTED]


def stored(name: str, seed: int):
    """The network of a stored seed, the inputs that its bases are built on, test inputs and test labels."""
    from nbkit import models, papers

    if name == "mod-add":
        x, y, seen, rest = pairs(seed)
        tensors = papers.tensors("local-interaction-basis").items()
        state = {key.removeprefix(f"{seed}."): w for key, w in tensors if key.startswith(f"{seed}.")}
        return adder(state), x[seen], x[rest], y[rest]
    x, _, x_test, y_test = digits()
    return models.load("lenet-300-100", dataset="mnist", seed=seed), x[:BUILT_ON], x_test, y_test


def case(name: str, seed: int, work: Path):
    """As ``stored``, of any seed: trained where it has to be, and kept in ``work``."""
    from nbkit import models, recipes

    file = work / f"{name}-{seed}.pt"
    if name == "mod-add":
        x, y, seen, rest = pairs(seed)
        if not file.is_file():
            torch.save(train(seed).state_dict(), file)
        return adder(torch.load(file)), x[seen], x[rest], y[rest]
    if seed < 3:
        return stored(name, seed)
    theirs = recipes.load("models/train.py")
    plan = next(p for p in theirs.PLANS if p.name == "lenet-300-100" and p.variant is None)
    model = models.build("lenet-300-100", seed=seed, **plan.config)
    if not file.is_file():
        torch.save(theirs.train(plan, seed)[0].state_dict(), file)
    model.load_state_dict(torch.load(file))
    return model.eval(), *stored(name, 0)[1:]


def scores(logits, y) -> tuple[float, float]:
    """Accuracy and cross-entropy."""
    loss = torch.nn.functional.cross_entropy(logits, y).item()
    return (logits.argmax(1) == y).double().mean().item(), loss


def turned(a, seed: int):
    """A basis, all its directions but the constant turned by a random orthogonal matrix."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(len(a.size) - 1, len(a.size) - 1, generator=generator).to(a.size)
    q = torch.block_diag(a.size[:1], torch.linalg.qr(normal)[0])
    return type(a)(a.into @ q, q.T @ a.back, (q.T * a.size @ q).diag())


def bases(sections, f: list, kind: str, seed: int) -> list:
    """The notebook's bases, or one of ``TURNED``: of every layer but the outputs, turned."""
    from nbkit import papers

    method = papers.method("local-interaction-basis")
    found = method.bases(sections, f, TURNED.get(kind, kind))
    if kind in TURNED:
        found[:-1] = [turned(a, 10 * seed + layer) for layer, a in enumerate(found[:-1])]
    return found


def with_nodes(f, a, n: int):
    """f when the constant and the n largest directions are kept. Raises: ValueError."""
    if not 0 <= n < len(a.size):
        raise ValueError(f"n lies between 0 and {len(a.size) - 1}, not {n}")
    return f @ a.into[:, : n + 1] @ a.back[: n + 1]


def fewest(score, most: int, floor: float) -> int:
    """The fewest n of 1 to most with score(n) >= floor, by bisection (as if more were better)."""
    return bisect_left(range(1, most), True, key=lambda n: score(n) >= floor) + 1


def measure(name: str, seed: int, kind: str, work: Path) -> dict[str, list[dict]]:
    """Rows of edges, curves and nodes of one network in one basis."""
    from nbkit import papers

    method = papers.method("local-interaction-basis")
    model, x, x_test, y = case(name, seed, work)
    sections = method.fold(model)
    f, g = method.nodes(sections, x), method.nodes(sections, x_test)
    found = bases(sections, f, kind, seed)
    base, _ = scores(g[-1], y)
    key = {"model": name, "seed": seed, "basis": kind}
    needed, curves, nodes = [], [], []
    for k, section in enumerate(sections):
        e = method.edges(section, f[k], found[k], found[k + 1])
        most = e[:, 1:].numel()

        def with_edges(n, k=k, section=section, e=e):
            mask = method.keep_edges(e, n)
            out = method.with_edges(section, g[k], found[k], found[k + 1], mask)
            return scores(sections[k + 1 :](out), y)[0]

        def with_directions(n, k=k):
            return scores(sections[k:](with_nodes(g[k], found[k], n)), y)

        floor, rank = base - TOLERANCE[name], len(found[k].size) - 1
        few = fewest(with_edges, most, floor)
        directions = fewest(lambda n: with_directions(n)[0], rank, floor)
        half = (len(method.frame(f[k]).size) - 1) // 2
        row = key | {"section": k + 1, "edges": few, "of": most, "nodes": directions, "rank": rank}
        needed.append(row | {"half": half, "loss at half": with_directions(min(half, rank))[1]})
        curves += [key | {"section": k + 1, "edges": n, "accuracy": with_edges(min(n, most))} for n in EDGES]
        nodes += [key | {"layer": k, "nodes": n, "loss": with_directions(min(n, rank))[1]} for n in NODES]
    return {"edges": needed, "curves": curves, "nodes": nodes}


def sum_spectrum(features: torch.Tensor, p: int = P) -> torch.Tensor:
    """Shares of the variance at the frequencies 1 .. (p-1)/2 of a + b mod p: [(p-1)/2, r].

    ``features``: [p * p, r], of the pairs (a, b) in order, b the faster. Raises: ValueError.
    """
    if len(features) != p * p:
        raise ValueError(f"{p * p} pairs are needed, not {len(features)}")
    power = torch.fft.fft2(features.reshape(p, p, -1), dim=(0, 1)).abs().square()
    k = torch.arange(1, (p + 1) // 2)  # cos(2 pi k (a + b) / p) lies at (k, k) and (-k, -k)
    return (power[k, k] + power[-k, -k]) / (power.sum((0, 1)) - power[0, 0])


def frequencies(seed: int, work: Path) -> list[dict]:
    """Of the largest directions of an adder's last hidden layer: the mean of the largest share of the variance, over
    all pairs, that lies at one frequency of a + b."""
    from nbkit import papers

    method = papers.method("local-interaction-basis")
    model, x, _, _ = case("mod-add", seed, work)
    sections = method.fold(model)
    f, everything = method.nodes(sections, x), method.nodes(sections, pairs(seed)[0])[2]
    rows = []
    for kind in [*method.KINDS, *TURNED]:
        a = bases(sections, f, kind, seed)[2]
        share = sum_spectrum(everything @ a.into[:, 1 : TOP + 1]).max(0).values
        rows.append({"seed": seed, "basis": kind, "purest": round(share.mean().item(), 4)})
    return rows


def networks(seeds: int, work: Path) -> list[dict]:
    """Accuracies of every network."""
    rows = []
    for name, seed in itertools.product(TOLERANCE, range(seeds)):
        model, x, x_test, y_test = case(name, seed, work)
        _, y, seen, _ = pairs(seed)
        y = y[seen] if name == "mod-add" else digits()[1][:BUILT_ON]
        with torch.no_grad():
            train_accuracy, test_accuracy = scores(model(x), y)[0], scores(model(x_test), y_test)[0]
        rows.append({"model": name, "seed": seed, "train": round(train_accuracy, 4), "test": round(test_accuracy, 4)})
    return rows


def wide(rows: list[dict], value: str, digits: int) -> pd.DataFrame:
    """A column a basis."""
    table = pd.DataFrame(rows)
    index = [column for column in table if column not in ("basis", value)]
    flat = table.pivot(index=index, columns="basis", values=value)[list(dict.fromkeys(table["basis"]))]
    return flat.round(digits).reset_index()


def build(out: Path, work: Path, seeds: int) -> list[Path]:
    from nbkit import papers, runtime

    runtime.deterministic(seed=0)
    kept = Work(work)
    rows = {"edges": [], "curves": [], "nodes": []}
    tables = {"networks": pd.DataFrame(kept.once("networks", partial(networks, seeds, work)))}
    kinds = [*papers.method("local-interaction-basis").KINDS, *TURNED]
    for name, seed, kind in itertools.product(TOLERANCE, range(seeds), kinds):
        found = kept.once(f"{name}-{seed}-{kind}", partial(measure, name, seed, kind, work))
        for table, more in found.items():
            rows[table] += more
    tables["edges"] = pd.DataFrame(rows["edges"]).round(5)
    tables["curves"] = wide(rows["curves"], "accuracy", 4)
    tables["nodes"] = wide(rows["nodes"], "loss", 4)
    pure = [row for seed in range(seeds) for row in kept.once(f"pure-{seed}", partial(frequencies, seed, work))]
    tables["frequencies"] = pd.DataFrame(pure)
    for name, table in tables.items():
        write_table(out / f"{name}.csv", table)
    adders = {seed: case("mod-add", seed, work)[0].state_dict() for seed in range(min(seeds, STORED))}
    halves = {f"{seed}.{name}": w.half() for seed, state in adders.items() for name, w in state.items()}
    write_tensors(out / "tensors.safetensors", halves)
    return [*(out / f"{name}.csv" for name in tables), out / "tensors.safetensors"]


if __name__ == "__main__":
    run(build, __doc__, work=work_option("local-interaction-basis"), seeds=seeds_option(6))
