"""How alike two representations of the same examples are: matrices of dissimilarity, and alignment of Gram matrices.

A representation is a matrix ``[n, features]``, a row for each example; what is compared is how its rows lie to each
other, so that two networks need neither the same width nor the same units.

>>> import torch
>>> x = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 1.0]])
>>> rdm(x, "euclidean")
tensor([5.0000, 1.0000, 4.2426], dtype=torch.float64)
>>> round(alignment(x @ x.T, 7 * x @ x.T), 6)
1.0
"""

from __future__ import annotations

import torch
from torch import Tensor

from nbkit.errors import NotFinite, UnknownName, did_you_mean

__all__ = ["alignment", "rdm"]

METRICS = ("correlation", "cosine", "euclidean")


def rdm(x: Tensor, metric: str = "correlation") -> Tensor:
    """The dissimilarity of each pair of examples: the upper triangle of a representational dissimilarity matrix.

    Args:
        x: ``[n, ...]``, the representation of at least 2 examples; what follows the first axis is flattened.
        metric: ``"correlation"`` (1 - Pearson's r of two rows, in [0, 2]), ``"cosine"`` (1 - cosine, in [0, 2]) or
            ``"euclidean"`` (in the units of x, not squared).

    Returns: float64 ``[n(n-1)/2]``, the pairs (0,1), (0,2), ..., (1,2), ..., as ``scipy.spatial.distance.squareform``
    takes them.

    Raises:
        UnknownName: no such metric.
        NotFinite: x holds NaN or infinity.
        ValueError: fewer than two examples or no features; a row that is constant (``"correlation"``) or zero
            (``"cosine"``), whose dissimilarity is not defined.

    N. Kriegeskorte, M. Mur and P. Bandettini, *Representational similarity analysis*, 2008.
    """
    if metric not in METRICS:
        raise UnknownName(f"no metric {metric!r}{did_you_mean(str(metric), METRICS)}")
    if x.ndim < 2 or len(x) < 2 or x[0].numel() == 0:
        raise ValueError(f"a representation is [n, features] with n >= 2, not {list(x.shape)}")
    if not bool(x.isfinite().all()):
        raise NotFinite("the representation holds NaN or infinity")
    rows = x.detach().flatten(1).double()
    if metric == "euclidean":
        return torch.nn.functional.pdist(rows)
    if metric == "correlation":
        # A constant row is zero here up to the rounding of its mean, so that equality is asked of the row itself.
        flat = (rows == rows[:, :1]).all(1)
        rows = rows - rows.mean(1, keepdim=True)
    else:
        flat = (rows == 0).all(1)
    if bool(flat.any()):
        which = flat.nonzero().flatten().tolist()
        said = "constant" if metric == "correlation" else "zero"
        raise ValueError(
            f"the {metric} of a {said} row is not defined: {len(which)} of {len(rows)}, first {which[:5]}"
        )
    rows = rows / rows.abs().amax(1, keepdim=True)  # tiny and huge rows alike stay in range when squared
    rows = rows / rows.norm(dim=1, keepdim=True)
    first, second = torch.triu_indices(len(rows), len(rows), 1, device=rows.device)
    return (1 - (rows @ rows.T)[first, second]).clamp(0, 2)


def alignment(k1: Tensor, k2: Tensor, *, centre: bool = True, debiased: bool = False) -> float:
    """The cosine between two Gram matrices of the same examples: kernel alignment, and centred, CKA.

    Args:
        k1, k2: symmetric ``[n, n]``, for a representation x: ``x @ x.T``; for labels y one-hot: ``y @ y.T``.
        centre: take the mean of the examples out of both first (CKA; C. Cortes et al.'s centred alignment). Without,
            it is N. Cristianini et al.'s kernel alignment, which a common offset of all examples drives towards 1.
        debiased: the unbiased estimator of the three products (needs ``centre`` and n >= 4). The plain one grows with
            the number of features where n is small; this one is 0 on average for independent representations, and
            may be negative.

    Returns: in [0, 1] for positive semidefinite matrices (not ``debiased``); 1 where one is a positive multiple of
    the other.

    Raises:
        NotFinite: a matrix holds NaN or infinity.
        ValueError: not square, not of one size, not symmetric; too few examples; nothing left of one of them after
            centring (all examples alike).

    S. Kornblith et al., *Similarity of neural network representations revisited*, 2019 (CKA); L. Song et al.,
    *Feature selection via dependence maximization*, 2012 (the unbiased estimator).
    """
    if debiased and not centre:
        raise ValueError(
            "the unbiased estimator is of the centred alignment: debiased=True needs centre=True"
        )
    least = 4 if debiased else 2 if centre else 1
    a, b = (_gram(k, least) for k in (k1, k2))
    if len(a) != len(b):
        raise ValueError(f"the two matrices are of different examples: {len(a)} and {len(b)}")
    whole = _inner(a, a), _inner(b, b)
    if centre and not debiased:
        a, b = _centred(a), _centred(b)
    product = _unbiased if debiased else _inner
    own = product(a, a), product(b, b)
    # Of equal examples rounding is left: of squares of differences, or of the difference of squares.
    rounding = 1e-12 if debiased else 1e-24
    if any(float(o) <= rounding * float(w) for o, w in zip(own, whole, strict=True)):
        raise ValueError(
            "nothing is left of a representation after centring (its examples are alike): not defined"
        )
    return float(product(a, b) / (own[0] * own[1]).sqrt())


def _gram(k: Tensor, least: int) -> Tensor:
    """The matrix in double precision, scaled to a largest entry of 1 (alignment does not see it); checked."""
    if k.ndim != 2 or k.shape[0] != k.shape[1] or len(k) < least:
        raise ValueError(f"a Gram matrix is [n, n] with n >= {least} here, not {list(k.shape)}")
    if not bool(k.isfinite().all()):
        raise NotFinite("a Gram matrix holds NaN or infinity")
    k = k.detach().double()
    size = k.abs().amax()
    if float(size) == 0:
        raise ValueError("a Gram matrix is zero: its alignment is not defined")
    k = k / size
    if not torch.allclose(k, k.T, rtol=0, atol=1e-4):
        raise ValueError("a Gram matrix is symmetric: this one is not (x @ x.T, a row for each example)")
    return k


def _centred(k: Tensor) -> Tensor:
    return k - k.mean(0, keepdim=True) - k.mean(1, keepdim=True) + k.mean()


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum()


def _unbiased(a: Tensor, b: Tensor) -> Tensor:
    """n(n-3) times the unbiased HSIC: the diagonals, which hold the bias, are left out."""
    a, b = (k - k.diagonal().diag() for k in (a, b))
    n = len(a)
    rows = a.sum(0), b.sum(0)
    return (
        _inner(a, b) + rows[0].sum() * rows[1].sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (rows[0] @ rows[1])
    )
