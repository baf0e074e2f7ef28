"""What one paper keeps in ``data/papers/<slug>``: tables and tensors that its recipe measured, and facts about them."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nbkit import _paths
from nbkit._catalogue import get
from nbkit.errors import UnknownName, did_you_mean

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

_FACTS = {"recipe": str, "minutes": (int, float), "source": str, "licence": str, "files": dict}
_NOT_LISTED = {"recipe.py", "facts.toml"}


@dataclass(frozen=True)
class Facts:
    """What ``facts.toml`` says of a paper's folder."""

    slug: str
    recipe: str
    """The command that makes the files."""
    minutes: float
    """Processor minutes it takes."""
    source: str
    """Where what it uses comes from, beside the kit's own data sets and models."""
    licence: str
    files: Mapping[str, str]
    """File name -> what it holds, of every file but the recipe and the facts themselves."""


def folder(slug: str) -> Path:
    """``data/papers/<slug>``. Raises: UnknownName (no such paper), FileNotFoundError (it keeps no data yet)."""
    path = _paths.data_dir() / "papers" / get(slug).slug
    if not path.is_dir():
        raise FileNotFoundError(f"{slug!r} keeps no data: there is no folder data/papers/{slug}")
    return path


def results(slug: str, name: str = "results") -> pd.DataFrame:
    """A table that a paper's recipe measured once: ``data/papers/<slug>/<name>.csv``, or ``.csv.gz``.

    Returns: pandas.DataFrame, one row a measurement; ``papers.facts(slug)`` says what each table holds.

    Raises: UnknownName (a KeyError) with the nearest names; FileNotFoundError for a paper without data.

    >>> papers.results("grad-cam", "mosaics").groupby("method").hit.mean()
    """
    import pandas as pd

    return pd.read_csv(_file(slug, name, "table", (".csv", ".csv.gz")))


def tensors(slug: str, name: str = "tensors") -> dict[str, Tensor]:
    """Tensors that a paper's recipe stored: ``data/papers/<slug>/<name>.safetensors``.

    Returns: name -> tensor on the CPU, of the stored type.

    Raises: UnknownName (a KeyError) with the nearest names; FileNotFoundError for a paper without data.

    >>> papers.tensors("neuron-path", "dinov2-probe")["weight"].shape
    torch.Size([10, 384])
    """
    from safetensors.torch import load_file

    return load_file(_file(slug, name, "tensors", (".safetensors",)))


def facts(slug: str) -> Facts:
    """What ``data/papers/<slug>/facts.toml`` says: the recipe's command and minutes, source, licence, a line a file.

    Raises: UnknownName (no such paper); FileNotFoundError (no folder, or no ``facts.toml`` in it); ValueError where an
    entry is missing, of the wrong type or unknown.
    """
    path = folder(slug) / "facts.toml"
    where = f"data/papers/{slug}/facts.toml"
    if not path.is_file():
        raise FileNotFoundError(f"there is no {where}; it holds {', '.join(_FACTS)}")
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{where} is not TOML: {error}") from error
    if missing := [key for key in _FACTS if key not in found]:
        raise ValueError(f"{where} lacks {', '.join(missing)}; it holds {', '.join(_FACTS)}")
    for key, value in found.items():
        if key not in _FACTS:
            raise ValueError(f"{where} holds {key!r}, which nothing reads{did_you_mean(key, _FACTS)}")
        if not isinstance(value, _FACTS[key]) or isinstance(value, bool):
            raise ValueError(f"{where}: {key} is {value!r}")
    if wordless := [name for name, what in found["files"].items() if not (isinstance(what, str) and what)]:
        raise ValueError(f"{where} does not say what {', '.join(wordless)} holds")
    return Facts(slug, **found)


def unlisted(slug: str) -> list[str]:
    """Files of a paper's folder that its facts do not list, and listed ones that are not there."""
    there = {path.name for path in files(slug)} - _NOT_LISTED
    return sorted(there ^ set(facts(slug).files))


def files(slug: str) -> list[Path]:
    """The files of a paper's folder, the recipe and the facts included."""
    return [path for path in sorted(folder(slug).iterdir()) if path.is_file()]


def _file(slug: str, name: str, what: str, endings: tuple[str, ...]) -> Path:
    there = {path.name: path for path in files(slug)}
    for ending in endings:
        if f"{name}{ending}" in there:
            return there[f"{name}{ending}"]
    known = [file.removesuffix(ending) for ending in endings for file in there if file.endswith(ending)]
    raise UnknownName(f"{slug!r} has no {what} {name!r}{did_you_mean(str(name), known)}")
