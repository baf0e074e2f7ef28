"""The tables of ``data/README.md``: data sets, checkpoints, and what each paper keeps."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from nbkit import _catalogue, datasets, papers
from nbkit.pages._markdown import table

_NOT_REACHED = {
    "architecture", "classes", "config", "dataset", "inputs", "licence", "parameters", "recipe", "seconds", "seed",
    "settings", "shipped_test_accuracy", "steps", "takes", "task", "test_accuracy", "test_examples", "torch",
    "train_examples", "variant",
}  # fmt: skip


def tables(data: Path) -> dict[str, list[str]]:
    """Marker -> the lines between."""
    return {"sets": _sets(data / "sets"), "models": _models(data / "models"), "papers": _papers(data / "papers")}


def size(n: int) -> str:
    return f"{n / 1e6:.2f} MB" if n >= 1e5 else f"{n / 1e3:.1f} kB"


def _shipped(folder: Path) -> list[Path]:
    """What a recipe made: every file of a folder but the recipes."""
    return [path for path in sorted(folder.iterdir()) if path.is_file() and path.suffix not in (".py", ".pyc")]


def _weight(path: Path) -> tuple[str, str]:
    data = path.read_bytes()
    return size(len(data)), f"`{hashlib.sha256(data).hexdigest()}`"


def _sets(folder: Path) -> list[str]:
    columns = ["file", "what", "source", "licence", "size", "recipe", "SHA-256"]
    known, there = datasets.files(), {path.name: path for path in _shipped(folder)}
    if wrong := known.keys() ^ there.keys():
        name = min(wrong)
        lacking = "is not there" if name in known else "has no entry in nbkit/datasets/_catalogue.py"
        raise ValueError(f"data/sets/{name} {lacking}")
    rows = []
    for name, file in known.items():
        weight, digest = _weight(there[name])
        rows.append([f"`{name}`", file.what, file.source, file.licence, weight, f"`{file.recipe}`", digest])
    return table(columns, rows)


def _models(folder: Path) -> list[str]:
    rows, shipped = [], _shipped(folder)
    for path in shipped:
        facts = _shared(path, shipped) if path.name.endswith("-tokenizer.json") else _facts(path)
        weight, digest = _weight(path)
        recipe = f"`{facts['recipe'].removeprefix('data/models/')}`" if "recipe" in facts else "-"
        trained_on = facts.get("dataset") or "-"
        if "inputs" in facts:
            trained_on += f" ({facts['inputs']})"
        if "train_examples" in facts:
            trained_on += f", {facts['train_examples']:,}"
        time = f"{facts['seconds']:,} s" if "seconds" in facts else "-"
        made = [_how(facts), _reached(facts), time, recipe]
        rows.append([f"`{path.name}`", trained_on, *made, weight, digest])
    return table(["file", "trained on", "how", "reached", "CPU time", "recipe", "size", "SHA-256"], rows)


def _shared(path: Path, shipped: list[Path]) -> dict[str, Any]:
    """Of a tokenizer: the recipe and the texts of the networks that it belongs to. Raises: ValueError."""
    stem = path.name.removesuffix("-tokenizer.json")
    for other in shipped:
        if other.name.startswith(f"{stem}-seed"):
            facts = _facts(other)
            return {"recipe": facts["recipe"], "dataset": facts["dataset"], "the tokenizer": "of all seeds"}
    raise ValueError(f"data/models/{path.name} belongs to no network: there is no {stem}-seed<k>.safetensors")


def _facts(path: Path) -> dict[str, Any]:
    """What the recipe wrote into the header of a checkpoint. Raises: ValueError."""
    data = path.read_bytes()
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        return {key: json.loads(value) for key, value in header.get("__metadata__", {}).items()}
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"data/models/{path.name} is no safetensors file with facts in JSON: {error}") from None


def _how(facts: dict[str, Any]) -> str:
    settings = facts.get("settings", {})
    said = [f"{name} {value}" for name, value in facts.get("config", {}).items()]
    if "steps" in facts:
        batch = f" of {settings['batch']}" if "batch" in settings else ""
        said.append(f"{facts['steps']:,} steps{batch}")
    said += [f"{name} {settings[key]}" for name, key in (("optimiser", "optimizer"), ("lr", "lr")) if key in settings]
    return ", ".join(said) or "-"


def _reached(facts: dict[str, Any]) -> str:
    """Accuracy of the stored weights, and whatever else the recipe recorded that is one number or word."""
    said = []
    if "test_accuracy" in facts:
        said.append(f"{facts['test_accuracy']:.2%} of {facts['test_examples']:,} right")
    if "shipped_test_accuracy" in facts:
        said.append(f"{facts['shipped_test_accuracy']:.2%} of the shipped test images")
    rest = {k: v for k, v in facts.items() if k not in _NOT_REACHED and isinstance(v, (int, float, str))}
    said += [f"{name.replace('_', ' ')} {value}" for name, value in sorted(rest.items())]
    return ", ".join(said) or "-"


def _papers(folder: Path) -> list[str]:
    rows = []
    for paper in _catalogue.papers().values():
        if not (folder / paper.slug).is_dir():
            continue
        facts = papers.facts(paper.slug)
        files = [_file(folder / paper.slug / name, what) for name, what in facts.files.items()]
        origin = f"{facts.source}; {facts.licence}" if facts.source else facts.licence
        minutes = f"{facts.minutes:g}"
        if facts.recipe != f"python data/papers/{paper.slug}/recipe.py":
            minutes += f"<br>`{facts.recipe}`"
        rows.append([f"[{paper.slug}](papers/{paper.slug})", "<br>".join(files), origin, minutes])
    return table(["paper", "files", "source and licence", "CPU minutes"], rows)


def _file(path: Path, what: str) -> str:
    if not path.is_file():
        raise ValueError(f"data/papers/{path.parent.name}/facts.toml lists {path.name}, which is not there")
    return f"`{path.name}` ({size(path.stat().st_size)}): {what}"
