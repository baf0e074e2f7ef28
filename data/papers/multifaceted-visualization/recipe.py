"""What notebooks/02-concepts/04-multifaceted-visualization measures, and the network it looks into.

- net.safetensors: the first of three networks that learn three groups of Fashion-MNIST's ten classes.
- members.safetensors: of it, the training images of the five facets of each unit.
- results.csv: network, unit and kind of start, for five pictures: how many of the unit's own labels the judge
  names and all that it names, the distance to the nearest real image, the activation, the share of pictures over the
  95th percentile of real images and the share over their own start, the share that has the label of its start.
  Facets are those of 600 training images that the network gives the unit.
- facets.csv: how well clusters agree with the hidden labels (adjusted Rand index), and the real images' percentile.

    python data/papers/multifaceted-visualization/recipe.py

The functions are the notebook's own method cells. One thread; about five minutes of processor time. A run that was
stopped goes on where it was (delete the folder --work for a fresh start).
"""

from __future__ import annotations

import dataclasses
from itertools import product
from pathlib import Path

import pandas as pd
import torch
from sklearn.metrics import adjusted_rand_score

from nbkit import datasets, models, papers, training
from nbkit.recipes import Work, round_to_half, run, seeds_option, work_option, write_table, write_tensors

SLUG = "multifaceted-visualization"
GROUPS = (0, 2, 0, 0, 0, 1, 0, 1, 2, 1)  # tops, footwear, other: of the ten labels
UNITS = {"tops": 0, "footwear": 1}
WIDTHS = [16, 32, 64]
K, M, POOL = 5, 15, 600
STRENGTHS = (1.0, 0.3)
GREY, SPREAD = 175 / 255, 8 / 255  # the public code's noise


def train(data, seed: int) -> tuple[torch.nn.Module, float]:
    net = models.build("small-cnn", seed=seed, widths=WIDTHS, classes=3)
    labels = torch.tensor(GROUPS)
    rate = {"optimizer": "adamw", "lr": 2e-3, "weight_decay": 1e-4, "schedule": training.cosine(warmup=0.1)}
    training.fit(net, (data.x_train, labels[data.y_train]), epochs=6, batch=64, seed=seed, **rate)
    round_to_half(net)
    return net, training.accuracy(net, data.x_test, labels[data.y_test])


def network(data, seed: int, folder: Path) -> torch.nn.Module:
    """Trained once; in evaluation mode and in double precision, in which a run can be repeated digit by digit."""
    path = folder / f"net{seed}.safetensors"
    if not path.is_file():
        net, accuracy = train(data, seed)
        facts = {"dataset": "fashion-mnist", "groups": list(GROUPS), "seed": seed, "test_accuracy": accuracy}
        config = {"widths": WIDTHS, "classes": 3}
        models.save_checkpoint(path, net.half(), "small-cnn", config, recipe=f"data/papers/{SLUG}/recipe.py", **facts)
    return models.load_checkpoint(path)[0].double().requires_grad_(False)


@torch.no_grad()
def called(net, x: torch.Tensor, unit: int) -> torch.Tensor:
    """Numbers of the images that the network gives a class."""
    return (torch.cat([net(part).argmax(1) for part in x.split(500)]) == unit).nonzero()[:, 0]


@torch.no_grad()
def features(judge: torch.nn.Sequential, images: torch.Tensor) -> torch.Tensor:
    """What enters the judge's last layer, [N, q]."""
    return torch.cat([judge[:-1](part) for part in images.split(200)])


@torch.no_grad()
def judged(judge: torch.nn.Sequential, images: torch.Tensor, real: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The judge's label of each image [N], and the distance of its features to the nearest of `real` [M, q], [N]."""
    codes = features(judge, images)
    return judge[-1](codes).argmax(1), torch.cdist(codes, real).amin(1)


def starts(method, pool: torch.Tensor, members: list, seed: int) -> dict[str, torch.Tensor]:
    """Five starts of every kind, [5, 1, 28, 28]."""
    lot = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(pool), generator=lot)
    noise = SPREAD * torch.randn(K, 1, 28, 28, generator=lot).double()
    sizes = list(map(len, members))
    return {
        "facets": method.mean_images(pool, members),
        "random groups": method.mean_images(pool, order[: sum(sizes)].split(sizes)),
        "global mean": pool.mean(0).expand(K, -1, -1, -1),
        "noise": (pool.mean() + noise).clamp(0, 1),
        "noise of the code": (GREY + noise).clamp(0, 1),
        "uniform noise": torch.rand(K, 1, 28, 28, generator=lot).double(),
    }


RIVALS = ("random groups", "global mean", "noise", "uniform noise")
AS_USUAL = {"strength": 1.0, "coded": False}
RUNS = [
    ("facets", {}),
    ("facets", {"coded": True}),
    ("early facets", {}),
    ("noise of the code", {}),
    *((kind, {"strength": s}) for kind, s in product(RIVALS, STRENGTHS)),
]


def measure(method, data, net, other, judge, seed: int, unit: int, runs=RUNS) -> dict:
    """The rows of one network and unit; `other`: a network that was never trained."""
    x, own = data.x_train, torch.tensor(GROUPS) == unit
    lot = torch.Generator().manual_seed(100 * seed)
    found = called(net, x, unit)
    where = found[torch.randperm(len(found), generator=lot)[:POOL]]
    pool = x[where]
    with torch.no_grad():
        points = method.embed(net[:-1](pool))
    labels, members = method.facets(points, K, M)
    with torch.no_grad():
        early = method.facets(method.embed(net[:6](pool).flatten(1)), K, M)
    real = data.x_test[torch.isin(data.y_test, own.nonzero()[:, 0])]
    with torch.no_grad():
        high = net(real)[:, unit].quantile(0.95).item()
    real = features(judge, real)
    begun = starts(method, pool, members, 100 * seed)
    begun["early facets"] = method.mean_images(pool, early[1])

    def row(kind: str, images: torch.Tensor, start: torch.Tensor | None = None, **settings) -> dict:
        named, far = judged(judge, images, real)
        with torch.no_grad():
            a = net(images)[:, unit]
            facts = {} if start is None else {
                "over start": (a > net(start)[:, unit]).double().mean().item(),
                "kept": (judged(judge, start, real)[0] == named).double().mean().item(),
            }  # fmt: skip
        return {"seed": seed, "unit": unit, "kind": kind, **settings,
                "coverage": len(set(named[own[named]].tolist())), "named": "".join(map(str, named.tolist())),
                "distance": far.mean().item(), "activation": a.mean().item(),
                "over": (a > high).double().mean().item(), **facts}  # fmt: skip

    rows = [row(f"{kind}, not optimised", begun[kind]) for kind in ("facets", "early facets", "random groups")]
    rows.append(row("real images by lot", pool[:K]))
    for kind, settings in runs:
        grey = begun[kind].mean().item() if "noise" in kind else 0.0
        how = {"steps": method.schedule(**settings), "background": grey}
        images = method.synthesise(net, begun[kind], unit, **how)[0]
        rows.append(row(kind, images, begun[kind], **AS_USUAL | settings))
    images = method.synthesise(other, begun["facets"], unit, steps=method.schedule())[0]
    rows.append(row("facets, untrained", images, begun["facets"], **AS_USUAL))
    clusters = {"last": labels, "early": early[0]}
    agreement = {layer: adjusted_rand_score(data.y_train[where], each) for layer, each in clusters.items()}
    return {"rows": rows, "facts": {"seed": seed, "unit": unit, "high": high, **agreement},
            "members": [where[own].tolist() for own in members]}  # fmt: skip


def build(out: Path, seeds: int = 3, work: Path | None = None) -> list[Path]:
    from nbkit import runtime

    runtime.deterministic(seed=0)
    data, method, kept = datasets.load("fashion-mnist"), papers.method(SLUG), Work(work)
    nets = [network(data, seed, work) for seed in range(seeds)]
    data = dataclasses.replace(data, x=data.x.double())
    done = {}
    for seed, (unit, number) in product(range(seeds), UNITS.items()):
        other = models.build("small-cnn", seed=1000 + seed, widths=WIDTHS, classes=3).double()
        judge = models.load("small-cnn", seed=seed).double()
        a = (nets[seed], other, judge, seed, number)
        done[seed, unit] = kept.once(f"{seed}-{unit}", lambda a=a: measure(method, data, *a))
    names = {number: unit for unit, number in UNITS.items()}
    tables = {"results": [row for part in done.values() for row in part["rows"]],
              "facets": [part["facts"] for part in done.values()]}  # fmt: skip
    for name, rows in tables.items():
        frame = pd.DataFrame(rows)
        write_table(out / f"{name}.csv", frame.assign(unit=frame["unit"].map(names)), float_format="%.5g")
    members = {unit: torch.tensor(done[0, unit]["members"]) for unit in UNITS}
    write_tensors(out / "members.safetensors", members)
    (out / "net.safetensors").write_bytes((work / "net0.safetensors").read_bytes())
    return [out / f"{name}.csv" for name in tables] + [out / f"{n}.safetensors" for n in ("members", "net")]


if __name__ == "__main__":
    run(build, __doc__, work=work_option(SLUG), seeds=seeds_option(3, "networks"))
