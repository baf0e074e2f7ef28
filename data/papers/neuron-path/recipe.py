"""The full measurement of notebooks/03-neurons/01-neuron-path, and the probe it uses.

- images.csv.gz: 200 Fashion-MNIST test images that three tiny-vit seeds all name correctly, five ways to
  choose a unit a layer: the units, their joint score, what removing and doubling them does to probability and logit.
- units.csv.gz: removing and doubling 1, 5 and 20 units a layer, on 60 of these images.
- prune.csv: accuracy of these 60 while unprotected units are zeroed at random.
- dinov2.csv: the same as the first file for 12 images in a DINOv2-based ViT-S/14 at 98 x 98.
- dinov2-probe.safetensors: its linear probe on the class token, with its accuracy.

    python data/papers/neuron-path/recipe.py                 # everything
    python data/papers/neuron-path/recipe.py --part dinov2   # or vit: one half

The functions are the notebook's own method cells; the search runs in nbkit.neurons, which a test shows to be equal.
One thread; twelve minutes of processor time for the tiny ViTs and nine for DINOv2.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import torch

from nbkit import datasets, models, neurons, papers, runtime
from nbkit.recipes import part_option, run, write_table, write_tensors

SEEDS, PER_CLASS, STEPS, BATCH = (0, 1, 2), 20, 20, 20
METHODS = ("neuron path", "activation", "influence pattern", "single-neuron IG", "random")
UNITS, ODDS, DRAWS = (1, 5, 20), (0.0, 0.25, 0.5, 0.75, 1.0), 3
SUBSET = 6  # images a class for more than one unit a layer
SHOWN = (1, 2, 7, 9)  # trouser, pullover, sneaker, ankle boot: three images each in DINOv2
SIDE = 98
LARGE = ("images", "units")  # rows are compressed


def first_right(right: torch.Tensor, y: torch.Tensor, classes, per_class: int) -> torch.Tensor:
    """Rows of the first ``per_class`` images of each class that are named correctly, class by class."""
    return torch.cat([(right & (y == c)).nonzero().flatten()[:per_class] for c in classes])


class ClassTokenProbe(torch.nn.Linear):
    """Logits [N, C] from the class token of what a transformers backbone returns."""

    def forward(self, output) -> torch.Tensor:
        return super().forward(output.last_hidden_state[:, 0])


def scored(method, model, x, y, layers: list[str], how: str, seed: int) -> torch.Tensor:
    """Scores [B, L, F] of a baseline."""
    if how != "random":
        return method.scores_by(how, model, x, y, layers, STEPS)
    shape = method.record_rows(model, x, layers).shape
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def choose(method, model, x, y, layers: list[str], how: str, ks, seed: int) -> dict[int, torch.Tensor]:
    """k -> units [B, L, k] by one of METHODS; a baseline's units for all k come from one set of scores."""
    found: dict[int, list] = {k: [] for k in ks}
    for part in torch.arange(len(x)).split(BATCH):
        if how != "neuron path":
            scores = scored(method, model, x[part], y[part], layers, how, 1000 * seed + int(part[0]))
        for k in ks:
            if how == "neuron path":
                path = neurons.neuron_path(model, x[part], y[part], layers=layers, steps=STEPS, top_k=k).path
                found[k].append(path.reshape(len(part), len(layers), k))
            else:
                found[k].append(scores.topk(k, 2).indices)
    return {k: torch.cat(parts) for k, parts in found.items()}


def effects(method, model, x, y, layers: list[str], path: torch.Tensor, width: int) -> pd.DataFrame:
    """Probability and logit of the true class, clean and edited, and whether it still comes first; a row an image."""
    chosen, columns = method.chosen_units(path, width), {}
    for name, by in {"clean": 1.0, "remove": 0.0, "enhance": 2.0}.items():
        z = method.edited_logits(model, x, layers, chosen, by)
        columns[f"p_{name}"] = method.probability(z, y)
        columns[f"z_{name}"] = z.gather(1, y[:, None])[:, 0]
        columns[f"right_{name}"] = (z.argmax(1) == y).int()
    return pd.DataFrame({name: values.numpy() for name, values in columns.items()})


def measured(method, model, x, y, rows, layers: list[str], how: str, path, width: int) -> pd.DataFrame:
    parts = torch.arange(len(x)).split(BATCH)
    jas = [neurons.joint_attribution(model, x[p], path[p], y[p], layers=layers, steps=STEPS) for p in parts]
    head = {"image": rows.numpy(), "label": y.numpy(), "method": how, "jas": torch.cat(jas).numpy()}
    units = [" ".join(map(str, units)) for units in path[..., 0].tolist()]
    return pd.DataFrame(head).assign(units=units).join(effects(method, model, x, y, layers, path, width))


def prune(method, model, x, y, layers: list[str], protected: dict, width: int) -> pd.DataFrame:
    rows = []
    for (how, k), path in protected.items():
        for p in ODDS:
            for draw in range(1 if p in (0, 1) else DRAWS):
                dropped = torch.rand(len(x), len(layers), width, generator=torch.Generator().manual_seed(draw)) < p
                if path is not None:
                    dropped &= ~method.chosen_units(path, width)
                z = method.edited_logits(model, x, layers, dropped)
                accuracy, mean = (z.argmax(1) == y).float().mean().item(), method.probability(z, y).mean().item()
                rows.append((how, k, p, draw, accuracy, mean))
    return pd.DataFrame(rows, columns=["protected", "k", "p", "draw", "accuracy", "probability"])


def vit(method, seeds=SEEDS) -> dict[str, pd.DataFrame]:
    data = datasets.load("fashion-mnist")
    nets = {seed: models.load("tiny-vit", seed=seed) for seed in SEEDS}
    with torch.no_grad():
        right = torch.stack([net(data.x_test).argmax(1) == data.y_test for net in nets.values()]).all(0)
    rows = first_right(right, data.y_test, range(10), PER_CLASS)
    few = torch.arange(len(rows)).view(10, PER_CLASS)[:, :SUBSET].flatten()
    x, y, layers = data.x_test[rows], data.y_test[rows], [f"blocks.{i}.mlp.act" for i in range(6)]
    tables: dict[str, list] = {"images": [], "units": [], "prune": []}
    for seed in seeds:
        net = nets[seed]
        width, protected = net.blocks[0].mlp.fc1.out_features, {("nothing", 0): None}
        for how in METHODS:
            search = how == "neuron path"
            paths = choose(method, net, x, y, layers, how, UNITS[:1] if search else UNITS, seed)
            table = measured(method, net, x, y, rows, layers, how, paths[1], width)
            tables["images"].append(table.assign(seed=seed))
            paths = {k: path[few] for k, path in paths.items()}
            paths |= choose(method, net, x[few], y[few], layers, how, UNITS[1:], seed) if search else {}
            for k, path in paths.items():
                protected[how, k] = path
                head = {"seed": seed, "image": rows[few].numpy(), "label": y[few].numpy(), "method": how, "k": k}
                table = effects(method, net, x[few], y[few], layers, path, width)
                tables["units"].append(pd.DataFrame(head).join(table))
        tables["prune"].append(prune(method, net, x[few], y[few], layers, protected, width).assign(seed=seed))
    return {name: pd.concat(parts, ignore_index=True) for name, parts in tables.items()}


def probe(backbone, prepare, data) -> dict[str, torch.Tensor]:
    """Logistic regression on the class token of 1,500 training images, its scaling folded in; tested on 500 images."""
    from sklearn.linear_model import LogisticRegression

    def features(x, y, per_class):
        rows = first_right(torch.ones(len(y), dtype=torch.bool), y, range(10), per_class)
        with torch.no_grad():
            tokens = [backbone(prepare(x[part])).last_hidden_state[:, 0] for part in rows.split(50)]
        return torch.cat(tokens), y[rows]

    (a, y_a), (b, y_b) = features(data.x_train, data.y_train, 150), features(data.x_test, data.y_test, 50)
    mean, sd = a.mean(0), a.std(0)
    fit = LogisticRegression(C=0.01, max_iter=500).fit(((a - mean) / sd).numpy(), y_a.numpy())
    weight = torch.tensor(fit.coef_, dtype=torch.float32) / sd
    bias = torch.tensor(fit.intercept_, dtype=torch.float32) - weight @ mean
    accuracy = ((b @ weight.T + bias).argmax(1) == y_b).float().mean()
    return {"weight": weight.contiguous(), "bias": bias, "test_accuracy": accuracy,
            "test_images": torch.tensor(len(y_b))}  # fmt: skip


def dinov2(method) -> tuple[dict[str, pd.DataFrame], dict[str, torch.Tensor]]:
    data, backbone = datasets.load("fashion-mnist"), models.load("dinov2-small")
    prepare = models.transform("dinov2-small", size=SIDE, resize=SIDE)
    fitted = probe(backbone, prepare, data)
    linear = ClassTokenProbe(384, 10)
    linear.load_state_dict({name: fitted[name] for name in ("weight", "bias")})
    net = torch.nn.Sequential(backbone, linear).eval()
    some = first_right(torch.ones(2000, dtype=torch.bool), data.y_test, SHOWN, 10)
    with torch.no_grad():
        named = torch.cat([net(prepare(data.x_test[part])).argmax(1) for part in some.split(20)])
    right = torch.zeros(2000, dtype=torch.bool).index_fill(0, some[named == data.y_test[some]], True)
    rows = first_right(right, data.y_test, SHOWN, 3)
    x, y = prepare(data.x_test[rows]), data.y_test[rows]
    layers = [f"0.encoder.layer.{i}.mlp.activation_fn" for i in range(12)]
    tables = []
    for how in METHODS:
        path = choose(method, net, x, y, layers, how, (1,), seed=0)[1]
        tables.append(measured(method, net, x, y, rows, layers, how, path, 1536))
    return {"dinov2": pd.concat(tables, ignore_index=True)}, fitted


def build(out: Path, part: str) -> list[Path]:
    runtime.deterministic(seed=0)
    method = papers.method("neuron-path")
    tables, paths = {}, []
    if part in ("dinov2", "all"):
        tables, fitted = dinov2(method)
        paths.append(out / "dinov2-probe.safetensors")
        write_tensors(paths[-1], fitted)
    if part in ("vit", "all"):
        tables |= vit(method)
    for name, table in tables.items():
        paths.append(out / (f"{name}.csv.gz" if name in LARGE else f"{name}.csv"))
        write_table(paths[-1], table, float_format="%.6g")
    return paths


if __name__ == "__main__":
    run(build, __doc__, part=part_option("vit", "dinov2"))
