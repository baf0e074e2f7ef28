"""The checkpoints that this kit trained: ``data/models/<name>[-<dataset>][-<variant>]-seed<k>.safetensors``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from nbkit._paths import data_dir
from nbkit.errors import UnknownName, did_you_mean
from nbkit.models._checkpoints import load_checkpoint, read_facts
from nbkit.models.zoo import ARCHITECTURES

_DEFAULT = "fashion-mnist"


@dataclass(frozen=True)
class Checkpoint:
    """One file: the architecture, what it was trained on, and all that its recipe wrote about it."""

    name: str
    dataset: str | None
    variant: str | None
    """Which of several configurations or trainings on one data set; None for the usual one."""
    seed: int
    path: Path
    facts: dict


def checkpoints(name: str | None = None) -> list[Checkpoint]:
    """What there is under ``data/models``, of one architecture or of all, in order."""
    found = []
    for path in (data_dir() / "models").glob("*-seed*.safetensors"):
        stem, _, seed = path.stem.rpartition("-seed")
        if not seed.isdigit() or not any(stem == a or stem.startswith(f"{a}-") for a in ARCHITECTURES):
            continue
        facts = read_facts(path)
        if name in (None, facts["architecture"]):
            dataset, variant = facts.get("dataset"), facts.get("variant")
            found.append(Checkpoint(facts["architecture"], dataset, variant, int(seed), path, facts))
    return sorted(found, key=lambda c: (c.name, c.dataset or "", c.variant or "", c.seed))


def load(name: str, *, seed: int = 0, dataset: str | None = None, variant: str | None = None) -> nn.Module:
    """The network of one checkpoint, in evaluation mode.

    Raises: UnknownName (no such data set or variant), ValueError (no such seed).
    """
    return load_checkpoint(choose(name, seed=seed, dataset=dataset, variant=variant).path)[0]


def vocabulary(name: str) -> Path | None:
    """The file of the tokenizer that the seeds of a language model share; None for a network that takes no text."""
    network = checkpoints(name)[0].path
    path = network.with_name(f"{network.stem.rpartition('-seed')[0]}-tokenizer.json")
    return path if path.is_file() else None


def tokenizer(path: Path):
    """What ``tokenizers`` wrote, as a ``transformers.PreTrainedTokenizerFast``; its token 0 stands between texts."""
    from transformers import PreTrainedTokenizerFast

    between = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_file=str(path), bos_token=between, eos_token=between, pad_token=between)


def choose(name: str, *, seed: int = 0, dataset: str | None = None, variant: str | None = None) -> Checkpoint:
    """The checkpoint meant; without ``dataset`` that of Fashion-MNIST, or the only one; the same for ``variant``."""
    there = checkpoints(name)
    datasets = _different(c.dataset for c in there)
    if dataset is None:
        dataset = _DEFAULT if _DEFAULT in datasets or not datasets else datasets[0]
    if dataset not in datasets:
        raise UnknownName(f"no {name} trained on {dataset!r}{did_you_mean(dataset, filter(None, datasets))}")
    there = [c for c in there if c.dataset == dataset]
    variants = _different(c.variant for c in there)
    if variant is None and len(variants) == 1:
        variant = variants[0]
    if variant not in variants:
        named = sorted(filter(None, variants))
        if variant is None:
            raise UnknownName(f"{name} trained on {dataset} comes in variants: say which of {named} with variant=")
        raise UnknownName(f"no variant {variant!r} of {name} trained on {dataset}{did_you_mean(variant, named)}")
    seeds = {c.seed: c for c in there if c.variant == variant}
    if seed not in seeds:
        which = f"{name} trained on {dataset}" + (f", variant {variant!r}," if variant else "")
        raise ValueError(f"no {which} with seed {seed!r}; there are seeds {sorted(seeds)}")
    return seeds[seed]


def _different(values: Iterable[str | None]) -> list[str | None]:
    return list(dict.fromkeys(values))
