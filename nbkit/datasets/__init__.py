"""Data sets by name: small real ones (and a few simulated, said so), each with its source and licence.

>>> from nbkit import datasets
>>> datasets.names()                              # doctest: +SKIP
>>> datasets.about("oasis2").licence              # doctest: +SKIP
>>> d = datasets.load("fashion-mnist")
>>> d.x_train.shape
torch.Size([10000, 1, 28, 28])

Most are files under ``data/sets`` or come with an installed library; ``imagenet-sample``, ``cifar-sample``,
``rest-fmri`` and ``textile`` are fetched once into the user's cache. To use your own data, pass your own tensors: no
method of the kit asks for these classes.
"""

from __future__ import annotations

from nbkit.datasets._canvas import Canvas, canvas
from nbkit.datasets._catalogue import BESIDE, CATALOGUE
from nbkit.datasets._texts import Dictionary, Retrieval
from nbkit.datasets._types import About, Dataset, File, Pictures, Recordings, Table, Tensors, Texts
from nbkit.errors import UnknownName, did_you_mean

__all__ = [
    "About", "Canvas", "Dataset", "Dictionary", "File", "Pictures", "Recordings", "Retrieval", "Table", "Tensors",
    "Texts", "about", "canvas", "files", "load", "names",
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


def load(name: str) -> Tensors | Table | Pictures | Recordings | Texts | Retrieval | Dictionary:
    """Load a data set.

    Returns: ``Tensors`` (images, series), ``Table``, ``Pictures``, ``Recordings``, ``Texts``, ``Retrieval`` or
    ``Dictionary``; see each for its fields.

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


def files() -> dict[str, File]:
    """Every file of ``data/sets`` that a recipe made, by name: what it is, its source, licence and recipe."""
    kind = {True: "real", False: "simulated"}
    catalogued = [about for about in CATALOGUE.values() if about.file]
    return {
        a.file: File(f"{a.title}; {kind[a.real]}", a.source, a.licence, a.recipe) for a in catalogued
    } | BESIDE
