"""Data sets by name: small real ones (and a few simulated, said so), each with its source and licence.

>>> from nbkit import datasets
>>> datasets.names()                              # doctest: +SKIP
>>> datasets.about("oasis2").licence              # doctest: +SKIP
>>> d = datasets.load("fashion-mnist")
>>> d.x_train.shape
torch.Size([10000, 1, 28, 28])

Most are files under ``data/`` or come with an installed library; ``imagenet-sample`` and ``cifar-sample`` are fetched
once into the user's cache. To use your own data, pass your own tensors: no method of the kit asks for these classes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nbkit.datasets._catalogue import CATALOGUE
from nbkit.datasets._texts import Dictionary, Retrieval
from nbkit.datasets._types import About, Dataset, Pictures, Table, Tensors, Texts
from nbkit.errors import UnknownName, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "About", "Dataset", "Dictionary", "Pictures", "Retrieval", "Table", "Tensors", "Texts",
    "about", "load", "names", "results", "tensors",
]  # fmt: skip


def names() -> list[str]:
    """The names ``load`` takes."""
    return list(CATALOGUE)


def about(name: str) -> About:
    """Size, task, source, licence and checksum of a data set, without loading it.

    Raises UnknownName (a KeyError) with the nearest names.
    """
    if name not in CATALOGUE:
        raise UnknownName(f"no data set {name!r}{did_you_mean(str(name), CATALOGUE)}")
    return CATALOGUE[name]


def load(name: str) -> Tensors | Table | Pictures | Texts | Retrieval | Dictionary:
    """Load a data set.

    Returns: ``Tensors`` (images, series), ``Table``, ``Pictures``, ``Texts``, ``Retrieval`` or ``Dictionary``; see each
    for its fields.

    Every call returns fresh data on the CPU, so changing it in place changes nothing for anybody else.

    Raises:
        UnknownName: no such data set.
        OSError: a shipped file is missing or damaged, or (DownloadError) a fetched one could not be had.

    >>> load("digits").x.shape
    torch.Size([1797, 1, 8, 8])
    """
    about(name)
    from nbkit.datasets import _load

    return _load.load(name)


def results(name: str):
    """A table measured once by a script in ``data/recipes`` because it takes minutes: ``data/results/<name>.csv``.

    Returns: pandas.DataFrame, one row a measurement; ``data/README.md`` names the script and how long it ran.

    Raises UnknownName (a KeyError) with the nearest names.
    """
    import pandas as pd

    from nbkit._paths import data_dir

    folder = data_dir() / "results"
    path = folder / f"{name}.csv"
    if not path.is_file():
        raise UnknownName(
            f"no results {name!r}{did_you_mean(str(name), [p.stem for p in folder.glob('*.csv')])}"
        )
    return pd.read_csv(path)


def tensors(name: str) -> dict[str, Tensor]:
    """Tensors that a script in ``data/recipes`` stored beside its table: ``data/checkpoints/<name>.safetensors``.

    Returns: name -> tensor on the CPU, of the stored type. Whole networks are loaded with ``nbkit.models.load``.

    Raises UnknownName (a KeyError) with the nearest names.
    """
    from safetensors.torch import load_file

    from nbkit._paths import data_dir

    folder = data_dir() / "checkpoints"
    path = folder / f"{name}.safetensors"
    if not path.is_file():
        known = [p.stem for p in folder.glob("*.safetensors")]
        raise UnknownName(f"no tensors {name!r}{did_you_mean(str(name), known)}")
    return load_file(path)
