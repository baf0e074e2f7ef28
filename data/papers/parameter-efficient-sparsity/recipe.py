"""All tables of this folder: what the notebook 03-parameter-efficient-sparsity measures beforehand.

Two settings under one schedule: LeNet-300-100 trained on MNIST and tuned for Fashion-MNIST (six runs: three networks,
two orders), and the last two blocks of MiniLM tuned to name the topic of a dictionary's definition (five orders).
Every arm has its own learning rate, of the highest accuracy on examples kept for that; where two are level (PST on
MiniLM) the higher one, and the other is an arm of its own. About 10 minutes on one core; a
run that was stopped goes on where it was (delete the folder --work for a fresh start). The functions are the
notebook's method cells.
"""

from __future__ import annotations

import functools
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from nbkit.recipes import Work, run, seeds_option, widened, work_option, write_table

NAME = "parameter-efficient-sparsity"
ALPHAS = ("alpha1", "alpha2")
ARMS = {
    "PST": ("PST", {}),
    "PST, alphas 0.1": ("PST", dict.fromkeys(ALPHAS, 0.1)),
    "PST, alphas 0.01": ("PST", dict.fromkeys(ALPHAS, 0.01)),
    "A B alone": ("PST", {"alpha2": 0}),
    "R, C alone": ("PST", {"alpha1": 0}),
    "alphas 0": ("PST", dict.fromkeys(ALPHAS, 0)),
    "magnitude": ("Magnitude", {}),
    "random": ("Magnitude", {}),
    "movement": ("Movement", {}),
    "PST, lr 0.001": ("PST", {}),
}
TIED = {("MiniLM", "PST, lr 0.001"): 1e-3}  # as accurate as the rate taken
SETTINGS = {
    "LeNet": {
        "runs": [(network, order) for order in range(2) for network in range(3)],
        "arms": [arm for arm in ARMS if arm != "PST, lr 0.001"],
        "grid": (1e-3, 3e-3, 1e-2),
        "steps": 200,
        "batch": 64,
        "layers": ["fc1", "fc2"],
        "head": "fc3",
    },
    "MiniLM": {
        "runs": [(0, order) for order in range(5)],
        "arms": ["PST", "PST, alphas 0.1", "alphas 0", "magnitude", "movement"],
        "grid": (3e-4, 1e-3, 3e-3),
        "steps": 64,
        "batch": 16,
        "head": "head",
    },
}
FEW = ("PST", "alphas 0", "magnitude", "random", "movement")  # at other sparsities
TOPICS = ("animal", "artifact", "body", "food", "location", "person", "plant", "substance")
TUNING = 9  # the order of the runs that choose a learning rate


class TopBlocks(nn.Module):
    """The last blocks of an encoder, the mean over the tokens, and a linear head that begins at 0."""

    def __init__(self, blocks, width: int, classes: int):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(width, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, hidden):
        from nbkit import forward

        for block in self.blocks:
            hidden = forward.first_tensor(block(hidden))
        return self.head(hidden.mean(1))


def definitions(tokenizer, wordnet, *, tokens: int = 12, each: int = 320, seed: int = 0):
    """The first tokens of definitions at least as long, ids [N, tokens], and their topics [N], shuffled."""
    chosen = torch.Generator().manual_seed(seed)
    rows = []
    for label, topic in enumerate(TOPICS):
        texts = [d for d, t in zip(wordnet.definitions, wordnet.topics, strict=True) if t == f"noun.{topic}"]
        some = torch.randperm(len(texts), generator=chosen)[: 4 * each].tolist()
        ids = tokenizer([texts[i] for i in some])["input_ids"]
        rows += [(label, row[:tokens]) for row in ids if len(row) >= tokens][:each]
    order = torch.randperm(len(rows), generator=chosen).tolist()
    return torch.tensor([rows[i][1] for i in order]), torch.tensor([rows[i][0] for i in order])


@torch.no_grad()
def leaving(encoder, ids: torch.Tensor, block: int) -> torch.Tensor:
    """What leaves a block of a BERT, [N, T, d]."""
    from nbkit import hooks

    name, parts = f"encoder.layer.{block}", []
    for some in ids.split(200):
        with hooks.record(encoder, name) as acts:
            encoder(input_ids=some)
        parts.append(acts[name])
    return torch.cat(parts)


def draw_masks(layers: dict, seed: int) -> None:
    """Scores drawn once in place of those of the layers."""
    for i, layer in enumerate(layers.values()):
        noise = torch.Generator().manual_seed(1000 * seed + i + 500)
        drawn = torch.rand(layer.linear.weight.shape, generator=noise)
        layer.scores = lambda weight, drawn=drawn: drawn


@torch.no_grad()
def structure(layer) -> dict[str, float]:
    """What is kept of a layer [n, k]: the variance over rows (columns) of the kept share, over that of a mask
    drawn at random; and of the scores less their mean the share of squares in eight singular values, as they
    are and with all entries shuffled."""
    scores = layer.scores(layer.weight())
    mask = (layer.masked() != 0).float()
    n, k = mask.shape
    by_chance = mask.mean() * (1 - mask.mean())
    found = {"rows": mask.mean(1).var() * k / by_chance, "columns": mask.mean(0).var() * n / by_chance}
    order = torch.randperm(n * k, generator=torch.Generator().manual_seed(0))
    for name, S in {"first 8": scores, "shuffled": scores.flatten()[order].view(n, k)}.items():
        squares = torch.linalg.svdvals(S - S.mean()).square()
        found[name] = squares[:8].sum() / squares.sum()
    return {name: round(float(value), 5) for name, value in found.items()}


@functools.cache
def lenet(network: int):
    """A LeNet-300-100 trained on MNIST for two epochs; Fashion-MNIST by use."""
    from nbkit import datasets, papers

    data = datasets.load("fashion-mnist")
    x, y = data.x_train, data.y_train
    splits = {"train": (x[:8000], y[:8000]), "choose": (x[8000:], y[8000:]), "test": (data.x_test, data.y_test)}
    return papers.method(NAME).lenet_of_digits(network), splits


@functools.cache
def minilm(network: int = 0):
    """The last two blocks of MiniLM with a head; what enters them, of definitions of eight topics, by use."""
    from nbkit import datasets, models

    encoder = models.load("minilm")
    ids, y = definitions(models.tokenizer("minilm"), datasets.load("wordnet"))
    blocks = TopBlocks(encoder.encoder.layer[-2:], 384, len(TOPICS))
    states = leaving(encoder, ids, 3)
    parts = {"train": slice(0, 1600), "choose": slice(1600, 2080), "test": slice(2080, None)}
    return blocks, {use: (states[part], y[part]) for use, part in parts.items()}


def names(setting: str, model) -> list[str]:
    if setting == "LeNet":
        return SETTINGS[setting]["layers"]
    return [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "head"]


def tuned(setting: str, network: int, order: int, arm: str, lr: float, v_f: float, on: str) -> dict:
    """Accuracy, numbers trained, and what the masks look like, of one run."""
    from nbkit import papers

    method = papers.method(NAME)
    model, data = (lenet if setting == "LeNet" else minilm)(network)
    about, (kind, options) = SETTINGS[setting], ARMS[arm]
    model = method.replace(model, names(setting, model), getattr(method, kind), seed=order, **options)
    layers = method.sparse_layers(model)
    if arm == "random":
        draw_masks(layers, order)
    how = {"head": about["head"], "steps": about["steps"], "batch": about["batch"], "seed": order, "v_f": v_f}
    try:
        for _ in method.fine_tune(model, *data["train"], lr=lr, **how):
            pass
    except ValueError:  # not a finite loss
        return {"accuracy": 0.0}
    found = {"accuracy": round(method.accuracy(model, *data[on]), 5)}
    if on == "test":
        found["trained"] = sum(p.numel() for layer in layers.values() for p in layer.parameters() if p.requires_grad)
        found["layers"] = {name: structure(layer) for name, layer in layers.items()}
    return found


def choose(kept: Work, setting: str, arm: str) -> list[dict]:
    """Accuracy by learning rate; the grid goes on while its best is at an end."""

    def measured(lr: float) -> float:
        args = setting, 0, TUNING, arm, lr, 0.9, "choose"
        return kept.once(f"rate {setting} {arm} {lr:g}", lambda: tuned(*args))["accuracy"]

    found = widened(measured, SETTINGS[setting]["grid"], factor=3, best=max)
    return [{"setting": setting, "arm": arm, "lr": lr, "accuracy": a} for lr, a in sorted(found.items())]


def measure(kept: Work, setting: str, seeds: int, lrs: dict) -> tuple[list[dict], list[dict]]:
    """A row a run, arm and sparsity; and one more a layer."""
    rows, layers = [], []
    for network, order in SETTINGS[setting]["runs"][:seeds]:
        for v_f in (0.9, 0.5, 0.95) if setting == "LeNet" and order == 0 else (0.9,):
            for arm in [arm for where, arm in lrs if where == setting] if v_f == 0.9 else FEW:
                args = setting, network, order, arm, lrs[setting, arm], v_f, "test"
                found = kept.once(" ".join(map(str, args)), lambda args=args: tuned(*args))
                key = {"setting": setting, "network": network, "order": order, "arm": arm, "sparsity": v_f}
                rows.append({**key, "accuracy": found["accuracy"], "trained": found["trained"]})
                layers += [{**key, "layer": name, **values} for name, values in found["layers"].items()]
    return rows, layers


def build(out: Path, work: Path, seeds: int) -> list[Path]:
    from nbkit import runtime

    runtime.deterministic(seed=0)
    torch.set_num_threads(1)
    kept = Work(work)
    rates, rows, layers = [], [], []
    for setting, about in SETTINGS.items():
        found = [row for arm in about["arms"] for row in choose(kept, setting, arm)]
        rates += found
        best = pd.DataFrame(found).sort_values(["accuracy", "lr"]).groupby("arm").last()["lr"]
        lrs = {(setting, arm): best[arm] for arm in about["arms"]}
        lrs |= {key: lr for key, lr in TIED.items() if key[0] == setting}
        some, more = measure(kept, setting, seeds, lrs)
        rows += some
        layers += more
    tables = {"rates": rates, "accuracy": rows, "layers": layers}
    for name, table in tables.items():
        write_table(out / f"{name}.csv", pd.DataFrame(table), float_format="%.4g")
    return [out / f"{name}.csv" for name in tables]


if __name__ == "__main__":
    run(build, __doc__, work=work_option(NAME), seeds=seeds_option(6, "runs of LeNet"))
