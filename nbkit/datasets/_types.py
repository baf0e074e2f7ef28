"""What ``load`` returns: one small frozen dataclass for each kind of data, each with a view worth looking at.

Two of them are equal only where they are the same object: arrays and tables have no single answer to ``==``.
"""

from __future__ import annotations

import base64
import html
import io
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from torch import Tensor


@dataclass(frozen=True)
class About:
    """Where a data set comes from and what may be done with it."""

    name: str
    title: str
    n: int
    """Number of examples (rows, pictures, texts)."""
    shape: tuple[int, ...] | None
    """Shape of one example: (C, H, W) or (features,); None where it varies."""
    task: str
    real: bool
    """False for simulated or generated data."""
    source: str
    """Package that carries it, with its version."""
    licence: str
    file: str | None = None
    """File under data/sets; None for what another library bundles or what is fetched on first use."""
    sha256: str | None = None
    """Of the shipped file, else of the fetched wheel; None for what an installed library bundles."""
    classes: tuple[str, ...] = ()
    notes: str = ""
    recipe: str | None = None
    """The script beside the file that makes it."""

    def _repr_html_(self) -> str:
        rows = {
            "data": f"{self.n:,} × {'×'.join(map(str, self.shape)) if self.shape else 'varying size'}",
            "task": self.task,
            "kind": "real" if self.real else "simulated",
            "source": self.source,
            "licence": self.licence,
            "file": f"data/sets/{self.file}" if self.file else "",
            "SHA-256": self.sha256 or "",
            "notes": self.notes,
        }
        cells = "".join(
            f"<tr><th style='text-align:left'>{k}</th><td style='text-align:left'>{html.escape(v)}</td></tr>"
            for k, v in rows.items()
            if v
        )
        return f"<b>{html.escape(self.title)}</b> <code>{self.name}</code><table>{cells}</table>"


@dataclass(frozen=True)
class File:
    """What a file of ``data/sets`` is and where it comes from."""

    what: str
    source: str
    licence: str
    recipe: str
    """The script beside it that makes it."""


@dataclass(frozen=True, repr=False, eq=False)
class Dataset:
    """What every data set has: ``about``; the subclasses hold the data."""

    about: About

    @property
    def name(self) -> str:
        return self.about.name

    def __repr__(self) -> str:
        shape = "×".join(map(str, self.about.shape)) if self.about.shape else "varying size"
        return f"<{type(self).__name__} {self.name}: {self.about.n:,} of {shape}, {self.about.task}>"

    def _repr_html_(self) -> str:
        return self.about._repr_html_()


@dataclass(frozen=True, repr=False, eq=False)
class Tensors(Dataset):
    """Images or series with labels, as tensors on the CPU.

    ``x`` float32 ``[N, C, H, W]`` in [0, 1] (series: ``[N, C, T]`` in their own units); ``y`` int64 ``[N]`` into
    ``classes``. Where the set has a split the training rows come first, and ``x_train``, ``y_train``, ``x_test``,
    ``y_test`` are views of them.

    >>> from nbkit import datasets
    >>> d = datasets.load("fashion-mnist")
    >>> d.x_train.shape, len(d.classes)
    (torch.Size([10000, 1, 28, 28]), 10)
    """

    x: Tensor = field(default=None)
    y: Tensor = field(default=None)
    classes: tuple[str, ...] = ()
    n_train: int | None = None

    def _split(self) -> int:
        if self.n_train is None:
            raise ValueError(f"{self.name} has no training and test part; use .x and .y")
        return self.n_train

    @property
    def x_train(self) -> Tensor:
        return self.x[: self._split()]

    @property
    def y_train(self) -> Tensor:
        return self.y[: self._split()]

    @property
    def x_test(self) -> Tensor:
        return self.x[self._split() :]

    @property
    def y_test(self) -> Tensor:
        return self.y[self._split() :]

    def _repr_html_(self) -> str:
        if self.x.ndim != 4:
            return super()._repr_html_()
        shown = [self.x[(self.y == c).nonzero()[0, 0]] for c in self.y.unique()[:10]]
        labels = [self.classes[int(c)] for c in self.y.unique()[:10]]
        pictures = [(t.permute(1, 2, 0) * 255).byte().numpy() for t in shown]
        return super()._repr_html_() + _strip(pictures, labels)


@dataclass(frozen=True, repr=False, eq=False)
class Table(Dataset):
    """A table: features ``X`` (DataFrame of numbers), target ``y`` (Series), ``groups`` (Series of subjects, or None).

    For classification ``y`` holds integers into ``classes``, and ``labels`` their names; for regression ``classes``
    is empty. ``frame`` is the whole table with its own column names, also those left out of ``X`` (keys, and columns
    that would give the answer away; ``about.notes`` says which and why). Missing values stay NaN. Rows of one group
    belong on one side of every split.

    >>> from nbkit import datasets
    >>> d = datasets.load("oasis2")
    >>> d.X.shape, d.groups.nunique()
    ((373, 8), 150)
    """

    X: pd.DataFrame = field(default=None)
    y: pd.Series = field(default=None)
    classes: tuple[str, ...] = ()
    groups: pd.Series | None = None
    frame: pd.DataFrame = field(default=None)

    @property
    def feature_names(self) -> list[str]:
        return list(self.X.columns)

    @property
    def labels(self) -> pd.Series:
        """The target by name (regression: the target itself)."""
        return self.y.map(dict(enumerate(self.classes))) if self.classes else self.y

    def _repr_html_(self) -> str:
        head = self.X.iloc[:4, :8].assign(target=self.labels.iloc[:4])
        return super()._repr_html_() + head.to_html()


@dataclass(frozen=True, repr=False, eq=False)
class Pictures(Dataset):
    """Photographs of varying size: ``images`` a dict name -> uint8 array ``[H, W, 3]``; ``licences`` by name.

    ``y`` is an int64 tensor of class indices where the set is labelled (``labels`` names them), else None.

    >>> from nbkit import datasets
    >>> datasets.load("photos")["chelsea"].shape
    (300, 451, 3)
    """

    images: dict[str, np.ndarray] = field(default_factory=dict)
    licences: dict[str, str] = field(default_factory=dict)
    y: Tensor | None = None
    labels: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> np.ndarray:
        from nbkit.errors import UnknownName, did_you_mean

        if name not in self.images:
            raise UnknownName(f"{self.name} has no picture {name!r}{did_you_mean(str(name), self.images)}")
        return self.images[name]

    def __len__(self) -> int:
        return len(self.images)

    def tensor(self, size: int = 224, *, resize: int | None = None) -> Tensor:
        """All pictures at one size: float32 ``[N, 3, size, size]`` in [0, 1].

        The shorter side goes to ``resize`` pixels (default: ``size``) with antialiasing, then the centre is cut out.
        Raises ValueError where ``resize`` is smaller than ``size``.
        """
        import numpy as np
        import torch
        from PIL import Image

        resize = size if resize is None else resize
        if size < 1 or resize < size:
            raise ValueError(
                f"resize must be at least size and size at least 1; got size={size}, resize={resize}"
            )
        out = []
        for array in self.images.values():
            picture = Image.fromarray(array)
            k = resize / min(picture.size)
            picture = picture.resize(
                [max(size, round(s * k)) for s in picture.size], Image.Resampling.BICUBIC
            )
            left, top = ((s - size) // 2 for s in picture.size)
            out.append(np.asarray(picture.crop((left, top, left + size, top + size))))
        return torch.from_numpy(np.stack(out)).permute(0, 3, 1, 2).float().div(255).contiguous()

    def _repr_html_(self) -> str:
        names = list(self.images)[:10]
        labels = self.labels[:10] or names
        return super()._repr_html_() + _strip([self.images[n] for n in names], labels)


@dataclass(frozen=True, repr=False, eq=False)
class Recordings(Dataset):
    """Activity of the same brain regions in several people, and the fibres between the regions.

    ``series`` float32 ``[people, regions, frames]``, a frame each ``interval`` seconds; ``fibres`` float32
    ``[people, regions, regions]``, symmetric counts with nothing on the diagonal, and ``lengths``, of the same shape,
    in mm; ``regions``: their names.

    >>> from nbkit import datasets
    >>> d = datasets.load("rest-fmri")                                      # doctest: +SKIP
    >>> d.series.shape, d.regions[0]                                        # doctest: +SKIP
    (torch.Size([7, 94, 1200]), 'Precentral_L')
    """

    series: Tensor = field(default=None)
    fibres: Tensor = field(default=None)
    lengths: Tensor = field(default=None)
    regions: tuple[str, ...] = ()
    interval: float = 0.0

    def __len__(self) -> int:
        return len(self.series)


@dataclass(frozen=True, repr=False, eq=False)
class Texts(Dataset):
    """Short documents: ``texts`` and, where the set has them, ``test`` (another part of the same kind).

    ``similarity``: float64 ``[M, M]``, symmetric, how alike people found every two of the M documents of ``test``, from
    0 to 1 (1 on the diagonal); None where nobody was asked.

    >>> from nbkit import datasets
    >>> d = datasets.load("lee")
    >>> len(d.texts), len(d.test), float(d.similarity[0, 32])
    (300, 50, 0.96)
    """

    texts: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    similarity: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def _repr_html_(self) -> str:
        items = "".join(f"<li>{html.escape(t[:140])} …</li>" for t in self.texts[:3])
        return super()._repr_html_() + f"<ol>{items}</ol>"


def _strip(pictures: list[np.ndarray], labels, height: int = 64) -> str:
    """A row of thumbnails as inline PNGs."""
    from PIL import Image

    cells = []
    for array, label in zip(pictures, labels, strict=True):
        picture = Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array)
        picture = picture.resize((max(1, round(picture.width * height / picture.height)), height))
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        data = base64.b64encode(buffer.getvalue()).decode()
        label = html.escape(str(label))
        cells.append(
            f"<figure style='display:inline-block;margin:2px;text-align:center'><img alt='{label}' "
            f"src='data:image/png;base64,{data}'><figcaption style='font-size:75%'>{label}</figcaption></figure>"
        )
    return f"<div>{''.join(cells)}</div>"
