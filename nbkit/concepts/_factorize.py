"""Writing activations as codes times a dictionary of concepts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nbkit import hooks
from nbkit.concepts import _sae
from nbkit.concepts._nnls import nnls
from nbkit.errors import NotFinite, NotFittedError

METHODS = ("nmf", "pca", "kmeans", "sae")


@dataclass(frozen=True, eq=False)
class Factorization:
    """Activations A ~ codes U times dictionary W, plus ``offset``; made by :func:`factorize`. Tensors on the CPU.

    ``codes`` have the shape of the activations with k concepts in place of P neurons: [N, k], [N, k, H, W] for maps,
    [N, T, k] for tokens. ``dictionary`` is [k, P]. ``error`` is ||A - decode(codes)|| / ||A|| (Frobenius).
    ``offset`` [P] is the mean (pca), the decoder's bias (sae) or None; ``encoder`` the sae's weights [P, k] and bias.
    """

    codes: Tensor
    dictionary: Tensor
    error: float
    method: str
    offset: Tensor | None = None
    encoder: tuple[Tensor, Tensor] | None = None

    @property
    def k(self) -> int:
        """Number of concepts."""
        return len(self.dictionary)

    def encode(self, activations: Tensor) -> Tensor:
        """Codes of new activations, [..., P] -> [..., k] with the axes as in :func:`factorize`; W stays fixed.

        nmf: the exact non-negative least squares solution (:func:`nnls`); pca: the projection; kmeans: 1 at the
        nearest center; sae: the encoder.

        Raises: ValueError (other number of neurons, negative values for nmf), NotFinite, NotFittedError.
        """
        rows, axis = _rows(activations, self.method)
        if rows.shape[1] != self.dictionary.shape[1]:
            raise ValueError(f"the dictionary has {self.dictionary.shape[1]} neurons, the activations {rows.shape[1]}")
        return _unrows(_encode(self, rows), activations.shape, axis)

    def decode(self, codes: Tensor) -> Tensor:
        """Activations of codes, [..., k] -> [..., P]: codes times dictionary, plus the offset. Differentiable.

        Runs on the device and in the type of ``codes``. Raises: ValueError for another number of concepts.
        """
        return decode(codes, self.dictionary, self.offset)

    def __repr__(self) -> str:
        shape = tuple(self.codes.shape)
        return f"Factorization({self.method}, k={self.k}, codes {shape}, relative error {self.error:.4f})"

    def _repr_html_(self) -> str:
        axis = hooks.neuron_axis(self.codes)
        rows = self.codes.movedim(axis, -1).reshape(-1, self.k)
        cells = "".join(
            f"<tr><td>{i}</td><td>{rows[:, i].mean():.3g}</td><td>{rows[:, i].max():.3g}</td>"
            f"<td>{(rows[:, i] != 0).float().mean():.0%}</td></tr>"
            for i in range(self.k)
        )
        head = "<tr><th>concept</th><th>mean code</th><th>largest</th><th>not 0</th></tr>"
        return f"<p>{self!r}</p><table>{head}{cells}</table>"


def factorize(
    activations: Tensor, k: int, method: str = "nmf", *, seed: int = 0, **options
) -> Factorization:
    """Find ``k`` directions that activations are sums of.

    ``activations``: [N, P]; maps [N, C, H, W] and tokens [N, T, F] are taken apart into locations, and codes come
    back in that shape (the neuron axis as in :mod:`nbkit.hooks`). Of one layer, non-negative for nmf.

    ``method``:

    - ``"nmf"``: U >= 0 and W >= 0, parts that add up. scikit-learn's NMF; options as there (``init``, ``max_iter``,
      ``tol`` ...). Rows of W are scaled to length 1, and the codes are the exact solution for that W.
    - ``"pca"``: orthonormal directions of largest variance around the mean. scikit-learn's PCA.
    - ``"kmeans"``: centers, each activation belonging to one. scikit-learn's KMeans.
    - ``"sae"``: a sparse autoencoder with ReLU codes, k of any size, also above P. Options ``penalty`` (on the sum
      of codes, 0.05), ``steps`` (1000), ``batch`` (256), ``learning_rate`` (3e-3).

    All randomness comes from ``seed``.

    Raises: ValueError (k below 1 or above min(N, P) for nmf and pca, above N for kmeans; negative activations for
    nmf; all zero; empty; unknown method), TypeError, NotFinite.

    Source: nmf, Fel et al. 2023, "CRAFT" (arXiv 2211.10154), the concept bank; sae, Cunningham et al. 2023
    (arXiv 2309.08600).

    >>> factorize(torch.rand(100, 32), 5).codes.shape
    torch.Size([100, 5])
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}, not {method!r}")
    rows, axis = _rows(activations, method)
    _check_k(k, method, *rows.shape)
    norm = rows.norm().item()
    if norm == 0:
        raise ValueError("all activations are 0: there is nothing to factorize")
    dictionary, offset, encoder = _FIT[method](rows, k, seed, options)
    blank = Factorization(torch.empty(0), dictionary, float("nan"), method, offset, encoder)
    codes = _encode(blank, rows)
    error = (rows - decode(codes.double(), dictionary, offset)).norm().item() / norm
    return Factorization(_unrows(codes, activations.shape, axis), dictionary, error, method, offset, encoder)


def decode(codes: Tensor, dictionary: Tensor, offset: Tensor | None = None) -> Tensor:
    """``codes @ dictionary + offset`` along the neuron axis of ``codes``."""
    axis = hooks.neuron_axis(codes)
    if codes.shape[axis] != len(dictionary):
        raise ValueError(f"the dictionary has {len(dictionary)} concepts; the codes {tuple(codes.shape)} have not")
    result = codes.movedim(axis, -1) @ dictionary.to(codes)
    if offset is not None:
        result = result + offset.to(codes)
    return result.movedim(-1, axis)


def _fit_nmf(rows: Tensor, k: int, seed: int, options: dict):
    from sklearn.decomposition import NMF

    solver = NMF(n_components=k, random_state=seed, **({"max_iter": 400} | options)).fit(rows.numpy())
    dictionary = torch.from_numpy(solver.components_)
    length = dictionary.norm(dim=1, keepdim=True)
    return (dictionary / torch.where(length > 0, length, 1.0)).float(), None, None


def _fit_pca(rows: Tensor, k: int, seed: int, options: dict):
    from sklearn.decomposition import PCA

    solver = PCA(n_components=k, random_state=seed, **options).fit(rows.numpy())
    return torch.from_numpy(solver.components_).float(), torch.from_numpy(solver.mean_).float(), None


def _fit_kmeans(rows: Tensor, k: int, seed: int, options: dict):
    from sklearn.cluster import KMeans

    solver = KMeans(n_clusters=k, random_state=seed, **({"n_init": 4} | options)).fit(rows.numpy())
    return torch.from_numpy(solver.cluster_centers_).float(), None, None


def _fit_sae(rows: Tensor, k: int, seed: int, options: dict):
    encoder, bias, decoder, offset = _sae.train(rows.float(), k, seed=seed, **options)
    return decoder, offset, (encoder, bias)


_FIT = {"nmf": _fit_nmf, "pca": _fit_pca, "kmeans": _fit_kmeans, "sae": _fit_sae}


def _encode(fit: Factorization, rows: Tensor) -> Tensor:
    w = fit.dictionary.double()
    if fit.method == "nmf":
        return nnls(rows, w).float()
    if fit.method == "kmeans":
        nearest = torch.cdist(rows, w).argmin(1)
        return torch.nn.functional.one_hot(nearest, len(w)).float()
    if fit.offset is None or (fit.method == "sae" and fit.encoder is None):
        raise NotFittedError(f"this {fit.method} factorization has no offset or encoder; make it with factorize()")
    centred = rows - fit.offset.double()
    if fit.method == "pca":
        return (centred @ w.T).float()
    weight, bias = fit.encoder
    return torch.relu(centred @ weight.double() + bias.double()).float()


def _rows(activations: Tensor, method: str) -> tuple[Tensor, int]:
    """Every location as one row, float64 on the CPU, and the neuron axis. Raises: as :func:`factorize`."""
    if not isinstance(activations, Tensor):
        raise TypeError(f"activations must be a tensor, not {type(activations).__name__}")
    if activations.numel() == 0:
        raise ValueError(f"activations are empty: their shape is {tuple(activations.shape)}")
    axis = hooks.neuron_axis(activations)
    rows = activations.detach().cpu().double().movedim(axis, -1).reshape(-1, activations.shape[axis])
    bad = int((~torch.isfinite(rows)).sum())
    if bad:
        raise NotFinite(f"activations hold {bad} NaN or infinite values of {rows.numel()}")
    if method == "nmf" and rows.min() < 0:
        raise ValueError(
            f"nmf needs activations >= 0; the smallest is {rows.min():.3g}. Take the output of a ReLU, or another "
            "method; clipping would change what the model says"
        )
    return rows, axis


def _unrows(codes: Tensor, shape: torch.Size, axis: int) -> Tensor:
    others = [size for i, size in enumerate(shape) if i != axis]
    return codes.reshape(*others, codes.shape[1]).movedim(-1, axis)


def _check_k(k: int, method: str, n: int, neurons: int) -> None:
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k must be an int, not {type(k).__name__}")
    most = {"nmf": min(n, neurons), "pca": min(n, neurons), "kmeans": n}.get(method)
    if k < 1 or (most is not None and k > most):
        limit = "at least 1" if most is None else f"between 1 and {most} for {n} activations of {neurons} neurons"
        raise ValueError(f"k must be {limit}; it is {k}")
