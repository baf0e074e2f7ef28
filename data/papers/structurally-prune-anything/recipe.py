"""The six tables that notebooks/06-pruning/07-structurally-prune-anything draws.

Accuracy of three resnet-small, three mobilenet-small and three tiny-vit (channels of the MLPs) cut to shares of their
multiply-adds by every rule, with and without compensation and recalibrated BatchNorm, on 1,000 test images. AGG and
NORM, kinds of noise, one epoch of fine-tuning, latency and torch-pruning's groups. About 7 minutes on one core; a run
that was stopped goes on where it was (delete the folder --work for a fresh start). The method is the notebook's.
"""

from __future__ import annotations

import statistics
import time
from functools import partial
from pathlib import Path

import pandas as pd

from nbkit.recipes import Work, run, seeds_option, work_option, write_table

TARGETS = {"resnet-small": (0.85, 0.7, 0.5), "mobilenet-small": (0.7, 0.5), "tiny-vit": (0.7, 0.5)}
TESTED = 1000  # test images
N = 256  # calibration images
RATES = (1e-3, 4e-3)
PLAIN = ("group L1", "first L1", "last L1", "group SNIP", "torch-pruning", "random", "OBS choice")
UPDATED = {  # the choice, and the images that compensate; the first is the method itself
    "OBSPA": ("OBS choice", "training"),
    "OBSPA, digits": ("OBS choice, digits", "digits"),
    "OBSPA, noise": ("OBS choice, noise", "noise"),
    "L1 + update": ("group L1", "training"),
    "SNIP + update": ("group SNIP", "training"),
    "random + update": ("random", "training"),
}


def method_and_data():
    from nbkit import datasets, papers

    return papers.method("structurally-prune-anything"), datasets.load("fashion-mnist")


def calibration(data) -> dict:
    """{source: images [N, 1, 28, 28]}."""
    import torch

    from nbkit import datasets

    noise = torch.rand(N, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    return {"training": data.x_train[:N], "digits": datasets.load("mnist").x_train[:N], "noise": noise}


def groups_of(method, name: str, model) -> dict:
    """The groups of a network; of tiny-vit those inside its MLPs."""
    import torch

    if name != "tiny-vit":
        return method.coupled(model, torch.zeros(2, 1, 28, 28))
    found = {}
    for i in range(len(model.blocks)):
        inside = method.coupled(model.blocks[i].mlp, torch.zeros(1, 50, 64))
        ports = {(f"blocks.{i}.mlp.{layer}", side): mask for (layer, side), mask in inside["fc1"].items()}
        found[f"blocks.{i}.mlp.fc1"] = ports
    return found


def producer(groups: dict, size: dict, place: int) -> dict:
    """L1 of the filters of one layer of each group alone: of the first or the last that makes its channels."""
    found = {}
    for g, group in groups.items():
        makers = [layer for layer, side in group if side == "out" and f"{layer}.weight" in size]
        makers = [layer for layer in makers if size[f"{layer}.weight"].shape[1:].numel() > 9 or layer == g]
        score = size[f"{makers[place]}.weight"].flatten(1).sum(1)
        found[g] = group[makers[place], "out"].to(score) @ score
    return found


def torch_pruning_scores(model, groups: dict) -> dict:
    """torch-pruning's default, squares of a group's weights, meaned over its layers."""
    import torch
    import torch_pruning as tp

    graph = dependencies(model, torch.zeros(2, 1, 28, 28))
    score, found = tp.importance.GroupMagnitudeImportance(p=2, normalizer=None), {}
    for g, group in groups.items():
        layer = model.get_submodule(g)
        prune = tp.prune_linear_out_channels if isinstance(layer, torch.nn.Linear) else tp.prune_conv_out_channels
        values = score(graph.get_pruning_group(layer, prune, idxs=list(range(len(layer.weight)))))
        found[g] = group[g, "out"].to(values) @ values
    return found


def choices(method, name: str, model, groups: dict, data, seed: int) -> dict:
    """{choice: I_raw}."""
    import torch

    from nbkit import sparsity

    images = calibration(data)
    size = sparsity.magnitude(model)
    generator = torch.Generator().manual_seed(seed)
    found = {
        "group L1": method.raw(groups, size),
        "first L1": producer(groups, size, 0),
        "last L1": producer(groups, size, -1),
        "group SNIP": method.raw(groups, sparsity.snip(model, data.x_train[:N], data.y_train[:N])),
        "torch-pruning": torch_pruning_scores(model, groups),
        "random": {g: torch.rand(len(group[g, "out"]), generator=generator) for g, group in groups.items()},
    }
    for source, x in images.items():
        found["OBS choice" + (f", {source}" if source != "training" else "")] = method.obs(model, groups, x)
    return found


def pruned(method, model, groups: dict, i_raw: dict, target: float, x=None):
    """Cut to the target; with images, compensated first."""
    import torch

    example = torch.zeros(2, 1, 28, 28)
    keep = method.choose(groups, method.normalised(i_raw), model, example, target)
    return method.cut(model if x is None else method.compensated(model, groups, keep, x), groups, keep, example)


def networks(name: str, seed: int) -> list[dict]:
    """A row a target, arm and BatchNorm; target 1 is the dense network."""
    from nbkit import models, sparsity, training

    method, data = method_and_data()
    model, images = models.load(name, seed=seed), calibration(data)
    n, rows = TESTED, []

    def measure(net, arm, target, source="training"):
        macs = sparsity.flops(net, data.x_train[:2])["macs"].sum() / dense
        nets = {"as trained": net}
        if name != "tiny-vit":
            nets["recalibrated"] = training.recalibrate(net, images["training"])
            if source != "training" and target == 0.5:
                nets["own images"] = training.recalibrate(net, images[source])
        for bn, one in nets.items():
            right = training.accuracy(one, data.x_test[:n], data.y_test[:n], batch=100)
            row = {"model": name, "seed": seed, "target": target, "arm": arm}
            row |= {"macs": round(macs, 4), "accuracy": round(right, 4)}
            rows.append({**row, "bn": bn})
            if name == "tiny-vit":  # without BatchNorm: one value for both
                rows.append({**row, "bn": "recalibrated"})

    dense = sparsity.flops(model, data.x_train[:2])["macs"].sum()
    measure(model, "dense", 1)
    groups = groups_of(method, name, model)
    found = choices(method, name, model, groups, data, seed)
    for target in TARGETS[name]:
        for choice in PLAIN:
            measure(pruned(method, model, groups, found[choice], target), choice, target)
        for arm, (choice, source) in UPDATED.items():
            net = pruned(method, model, groups, found[choice], target, images[source])
            measure(net, arm, target, source)
    return rows


def knobs(seed: int, target: float = 0.5) -> list[dict]:
    """resnet-small: sum and max with every NORM for L1, and every NORM for OBS, with and without compensation."""
    import torch

    from nbkit import models, sparsity, training

    method, data = method_and_data()
    model, x, rows = models.load("resnet-small", seed=seed), data.x_train[:N], []
    groups = groups_of(method, "resnet-small", model)
    raws = {("L1", agg): method.raw(groups, sparsity.magnitude(model), agg) for agg in ("sum", "max")}
    raws["OBS", "sum"] = method.obs(model, groups, x)
    example = torch.zeros(2, 1, 28, 28)
    for (criterion, agg), i_raw in raws.items():
        for norm in method.NORM:
            keep = method.choose(groups, method.normalised(i_raw, norm), model, example, target)
            for update in (False, True):
                net = method.compensated(model, groups, keep, x) if update else model
                net = method.cut(net, groups, keep, example)
                right = training.accuracy(net, data.x_test[:TESTED], data.y_test[:TESTED], batch=100)
                row = {"seed": seed, "criterion": criterion, "agg": agg, "norm": norm, "update": update}
                rows.append(row | {"accuracy": round(right, 4), "least kept": min(int(k.sum()) for k in keep.values())})
    return rows


def noise(seed: int, target: float = 0.7) -> list[dict]:
    """resnet-small, channels chosen by group L1 and by OBS on the same images, repaired with five kinds of images."""
    import torch
    from torch.nn import functional as F

    from nbkit import models, sparsity, training

    method, data = method_and_data()
    model, images, rows = models.load("resnet-small", seed=seed), calibration(data), []
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(N, 1, 7, 7, generator=generator)
    order = torch.rand(N, 784, generator=generator).argsort(1)
    images["smooth noise"] = F.interpolate(coarse, size=28, mode="bilinear")
    images["shuffled pixels"] = data.x_train[:N].flatten(1).gather(1, order).view(N, 1, 28, 28)
    groups = groups_of(method, "resnet-small", model)
    size = method.raw(groups, sparsity.magnitude(model))
    for source, x in {"nothing": None, **images}.items():
        scores = {"L1": size} if x is None else {"L1": size, "OBS": method.obs(model, groups, x)}
        for choice, i_raw in scores.items():
            net = pruned(method, model, groups, i_raw, target, x)
            for bn, one in (("as trained", net), ("recalibrated", training.recalibrate(net, images["training"]))):
                right = training.accuracy(one, data.x_test[:TESTED], data.y_test[:TESTED], batch=100)
                row = {"seed": seed, "repaired with": source, "choice": choice, "bn": bn}
                rows.append(row | {"accuracy": round(right, 4)})
    return rows


def tuned(arm: str, seed: int, lr: float, target: float = 0.5) -> dict:
    """resnet-small, cut and trained for one epoch on 9,000 images: held-back loss on the other 1,000, test accuracy."""
    from nbkit import models, training

    method, data = method_and_data()
    model = models.load("resnet-small", seed=seed)
    groups = groups_of(method, "resnet-small", model)
    choice, source = UPDATED.get(arm, (arm, None))
    x = calibration(data)[source] if source else None
    found = choices(method, "resnet-small", model, groups, data, seed)
    net = pruned(method, model, groups, found[choice], target, x)
    training.fit(
        net, (data.x_train[:9000], data.y_train[:9000]), epochs=1, batch=64, lr=lr, optimizer="adamw",
        weight_decay=1e-4, schedule=training.cosine(warmup=0.1), seed=seed,
    )  # fmt: skip
    held, _ = training.evaluate(net, data.x_train[9000:], data.y_train[9000:], batch=100)
    right = training.accuracy(net, data.x_test, data.y_test, batch=100)
    return {"arm": arm, "seed": seed, "lr": lr, "held_back_loss": round(held, 4), "accuracy": round(right, 4)}


def fine_tuning(work: Work, seeds: int) -> pd.DataFrame:
    """Every arm's own learning rate by the held-back loss of seed 0, then the other seeds."""
    rows = []
    for arm in ("OBSPA", "group L1", "group SNIP", "random"):
        of = {lr: work.once(f"tuned-{arm}-0-{lr}", partial(tuned, arm, 0, lr)) for lr in RATES}
        best = min(of, key=lambda lr, of=of: of[lr]["held_back_loss"])
        rows += [{**row, "chosen": lr == best} for lr, row in of.items()]
        for seed in range(1, seeds):
            rows.append({**work.once(f"tuned-{arm}-{seed}-{best}", partial(tuned, arm, seed, best)), "chosen": True})
    return pd.DataFrame(rows)


def dependencies(model, example):
    import torch_pruning as tp

    return tp.DependencyGraph().build_dependency(model, example_inputs=example)


def theirs(model, graph, name: str, index: list[int]) -> dict:
    """torch-pruning's {(layer, "out" or "in"): indices} of what goes with channels of a layer."""
    import torch_pruning as tp
    from torch import nn

    names = {module: n for n, module in model.named_modules()}
    layer, found = model.get_submodule(name), {}
    prune = tp.prune_linear_out_channels if isinstance(layer, nn.Linear) else tp.prune_conv_out_channels
    for dep, indices in graph.get_pruning_group(layer, prune, idxs=index):
        module = dep.target.module
        if module not in names or not list(module.parameters()):
            continue
        both = isinstance(module, nn.BatchNorm2d) or getattr(module, "groups", 1) > 1
        side = "out" if both or graph.is_out_channel_pruning_fn(dep.handler) else "in"
        found.setdefault((names[module], side), set()).update(indices)
    return found


def compared(name: str) -> list[dict]:
    """A row a group: how many CCs it has, how many layers each, and how many are torch-pruning's."""
    import torch

    from nbkit import models

    method, _ = method_and_data()
    model, rows = models.load(name, seed=0), []
    graph = dependencies(model, torch.zeros(2, 1, 28, 28))
    for g, group in groups_of(method, name, model).items():
        same = 0
        for k in range(len(group[g, "out"])):
            ours = {port: set(mask[k].nonzero().flatten().tolist()) for port, mask in group.items() if mask[k].any()}
            same += ours == theirs(model, graph, g, sorted(ours[g, "out"]))
        rows.append({"model": name, "group": g, "ccs": len(group[g, "out"]), "ports": len(group), "same": same})
    return rows


def latency(name: str, seed: int, runs: int = 20, batch: int = 64) -> list[dict]:
    """Median milliseconds for a batch on one thread, dense and cut by OBSPA, the runs of all three taking turns."""
    import torch

    from nbkit import models

    method, data = method_and_data()
    model, x = models.load(name, seed=seed), data.x_train[:N]
    groups = groups_of(method, name, model)
    i_raw = method.obs(model, groups, x)
    nets = {1.0: model} | {t: pruned(method, model, groups, i_raw, t, x) for t in (0.7, 0.5)}
    spent = {t: [] for t in nets}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        for _ in range(runs + 2):
            for t, net in nets.items():
                began = time.perf_counter()
                net(x[:batch])
                spent[t].append(time.perf_counter() - began)
    torch.set_num_threads(threads)
    ms = {t: 1000 * statistics.median(seconds[2:]) for t, seconds in spent.items()}
    return [{"model": name, "seed": seed, "target": t, "ms": round(value, 3)} for t, value in ms.items()]


def from_the_whole(table: pd.DataFrame) -> pd.DataFrame:
    """Every arm begins with the dense network at target 1."""
    whole = table[table["arm"] == "dense"]
    return pd.concat([*(whole.assign(arm=arm) for arm in (*PLAIN, *UPDATED)), table[table["arm"] != "dense"]])


def build(out: Path, work: Path, seeds: int) -> list[Path]:
    from nbkit import runtime

    runtime.deterministic(seed=0)
    kept = Work(work)
    every = [(name, seed) for name in TARGETS for seed in range(seeds)]

    def table(part: str, measure, keys) -> pd.DataFrame:
        found = [kept.once("-".join([part, *map(str, key)]), partial(measure, *key)) for key in keys]
        return pd.DataFrame([row for rows in found for row in rows])

    tables = {
        "accuracy": from_the_whole(table("accuracy", networks, every)),
        "knobs": table("knobs", knobs, [(seed,) for seed in range(seeds)]),
        "noise": table("noise", noise, [(seed,) for seed in range(seeds)]),
        "groups": table("groups", compared, [(name,) for name in TARGETS]),
        "latency": table("latency", latency, every),
        "tuned": fine_tuning(kept, seeds),
    }
    for name, rows in tables.items():
        write_table(out / f"{name}.csv", rows)
    return [out / f"{name}.csv" for name in tables]


if __name__ == "__main__":
    run(build, __doc__, work=work_option("structurally-prune-anything"), seeds=seeds_option(3))
