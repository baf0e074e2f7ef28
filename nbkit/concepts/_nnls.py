"""Non-negative least squares for many right-hand sides at once."""

from __future__ import annotations

import torch
from torch import Tensor

from nbkit.errors import NotFinite


def nnls(activations: Tensor, dictionary: Tensor, *, max_bytes: int = 64 << 20) -> Tensor:
    """``argmin over U >= 0 of ||A - U W||²``: the codes of activations in a dictionary that stays fixed.

    ``activations`` A [N, P], ``dictionary`` W [k, P]; returns U [N, k], float64 on the CPU. The exact minimum, by
    block principal pivoting: every row keeps its own set of positive coefficients and solves the equations on it,
    all rows in one batch, until both the coefficients and the gradient outside the set have the right sign. Where W
    has dependent rows, one of the minima. ``max_bytes`` bounds the batch (k² numbers a row).

    Raises: ValueError (shapes), NotFinite.

    Source: Kim and Park 2011, "Fast nonnegative matrix factorization: an active-set-like method and comparisons".

    >>> nnls(torch.tensor([[3.0, -1.0]]), torch.eye(2))
    tensor([[3., 0.]], dtype=torch.float64)
    """
    if activations.ndim != 2 or dictionary.ndim != 2 or activations.shape[1] != dictionary.shape[1]:
        shapes = f"{tuple(activations.shape)} and {tuple(dictionary.shape)}"
        raise ValueError(f"activations [N, P] and dictionary [k, P] need the same P; their shapes are {shapes}")
    a, w = activations.detach().cpu().double(), dictionary.detach().cpu().double()
    if not (torch.isfinite(a).all() and torch.isfinite(w).all()):
        raise NotFinite("activations or dictionary hold NaN or infinite values")
    gram, products = w @ w.T, a @ w.T
    chunk = max(1, max_bytes // (8 * 3 * len(w) ** 2 + 1))
    parts = [_pivot(gram, part, w, rows) for part, rows in zip(products.split(chunk), a.split(chunk), strict=True)]
    return torch.cat(parts) if parts else products


def _pivot(gram: Tensor, products: Tensor, dictionary: Tensor, activations: Tensor) -> Tensor:
    n, k = products.shape
    scale = gram.diagonal().max().clamp_min(1e-300)
    gram = gram + 1e-13 * scale * torch.eye(k, dtype=gram.dtype)  # dependent rows must not make it singular
    tolerance = 1e-12 * products.abs().amax(1, keepdim=True)
    passive = torch.zeros(n, k, dtype=torch.bool)
    codes = torch.zeros_like(products)
    fewest, patience = torch.full((n,), k + 1), torch.full((n,), 3)
    open_rows = torch.arange(n)
    for _ in range(10 * k + 30):
        wrong = _wrong_signs(gram, products[open_rows], codes[open_rows], passive[open_rows], tolerance[open_rows])
        count = wrong.sum(1)
        open_rows, wrong, count = open_rows[count > 0], wrong[count > 0], count[count > 0]
        if not len(open_rows):
            return codes.clamp_min_(0)
        better = count < fewest[open_rows]
        fewest[open_rows] = torch.where(better, count, fewest[open_rows])
        patience[open_rows] = torch.where(better, 3, patience[open_rows] - 1)
        # exchanging all of them is fast but may cycle; exchanging the last one alone cannot (Murty 1974)
        last = k - 1 - wrong.flip(1).int().argmax(1)
        alone = torch.zeros_like(wrong).scatter_(1, last[:, None], True)
        passive[open_rows] ^= torch.where(patience[open_rows, None] < 0, alone, wrong)
        codes[open_rows] = _solve(gram, products[open_rows], passive[open_rows])
    return _finish(codes, open_rows, dictionary, activations)


def _wrong_signs(gram: Tensor, products: Tensor, codes: Tensor, passive: Tensor, tolerance: Tensor) -> Tensor:
    gradient = codes @ gram - products
    return torch.where(passive, codes * gram.diagonal() < -tolerance, gradient < -tolerance)


def _solve(gram: Tensor, products: Tensor, passive: Tensor) -> Tensor:
    # rows and columns outside the set become those of the identity, so that all systems have one size
    both = passive[:, :, None] & passive[:, None, :]
    systems = torch.where(both, gram, torch.eye(len(gram), dtype=gram.dtype))
    return torch.linalg.solve(systems, torch.where(passive, products, 0.0)[..., None])[..., 0] * passive


def _finish(codes: Tensor, rows: Tensor, dictionary: Tensor, activations: Tensor) -> Tensor:
    from scipy.optimize import nnls as one_row

    for row in rows.tolist():  # rounding kept these from settling
        codes[row] = torch.from_numpy(one_row(dictionary.T.numpy(), activations[row].numpy())[0])
    return codes.clamp_min_(0)
