"""The checkpoints that this kit trained: ``data/checkpoints/<name>[-<dataset>]-seed<k>.safetensors``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from nbkit._paths import data_dir
from nbkit.errors import UnknownName, did_you_mean
from nbkit.models._zoo import ARCHITECTURES, load_checkpoint

_DEFAULT = "fashion-mnist"


@dataclass(frozen=True)
class Checkpoint:
    """One file: the architecture, what it was trained on, its seed, and all that its recipe wrote about it."""

    name: str
    dataset: str | None
    seed: int
    path: Path
    facts: dict


def checkpoints(name: str | None = None) -> list[Checkpoint]:
    """What there is under ``data/checkpoints``, of one architecture or of all, in order of name and seed."""
    found = []
    for path in sorted((data_dir() / "checkpoints").glob("*-seed*.safetensors")):
        stem, _, seed = path.stem.rpartition("-seed")
        names = [a for a in ARCHITECTURES if stem == a or stem.startswith(f"{a}-")]
        if not names or not seed.isdigit():
            continue
        architecture = max(names, key=len)
        if name in (None, architecture):
            facts = _facts(path)
            dataset = stem[len(architecture) + 1 :] or facts.get("dataset")
            found.append(Checkpoint(architecture, dataset, int(seed), path, facts))
    return sorted(found, key=lambda c: (c.name, c.dataset or "", c.seed))


def load(name: str, *, seed: int = 0, dataset: str | None = None) -> nn.Module:
    """The network of one checkpoint, in evaluation mode.

    Raises: UnknownName (a data set it was not trained on), ValueError (a seed it was not trained with).
    """
    return load_checkpoint(choose(name, seed=seed, dataset=dataset).path)[0]


def choose(name: str, *, seed: int = 0, dataset: str | None = None) -> Checkpoint:
    """The checkpoint meant; without ``dataset`` the one of Fashion-MNIST, or the only one."""
    there = checkpoints(name)
    datasets = list(dict.fromkeys(c.dataset for c in there))
    if dataset is None:
        dataset = _DEFAULT if _DEFAULT in datasets or not datasets else datasets[0]
    if dataset not in datasets:
        raise UnknownName(f"no {name} trained on {dataset!r}{did_you_mean(dataset, filter(None, datasets))}")
    of_dataset = {c.seed: c for c in there if c.dataset == dataset}
    if seed not in of_dataset:
        raise ValueError(
            f"no {name} trained on {dataset} with seed {seed!r}; there are seeds {sorted(of_dataset)}"
        )
    return of_dataset[seed]


def _facts(path: Path) -> dict:
    from safetensors import safe_open

    with safe_open(path, "np") as file:  # the header alone is read
        return {k: json.loads(v) for k, v in (file.metadata() or {}).items()}
