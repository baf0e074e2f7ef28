"""Total Sobol indices: the share of a score's variance that is left once all factors but one are known."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def total_sobol(
    score: Callable[[Tensor], Tensor], k: int, *, n: int = 64, seed: int = 0, scramble: bool = True
) -> Tensor:
    """Total Sobol index of each of ``k`` factors, uniform on [0, 1], for ``score``: masks [b, k] -> scores [b].

    T_i = E[Var(Y | all but i)] / Var(Y): the share of the variance that is left once all the others are known, so what
    factor i does alone and in company. (What is *lost* when factor i alone becomes known, Var(E[Y | i]) / Var(Y), is
    the first-order index, smaller wherever factors interact.) It has no sign.

    Estimated with Jansen's formula from ``n`` rows of a scrambled Halton sequence in 2k dimensions: sum of
    (Y(A) - Y(C_i))² / (2 n Var Y(A)), C_i being A with column i from B. ``score`` is called once, with n(k + 1) masks.
    Returns T [k], float64; a factor without influence has exactly 0; all NaN where the score is constant.

    Raises: ValueError (k < 1, n < 2, scores of another shape).

    Source: Jansen 1999; Fel et al. 2023, "CRAFT" (arXiv 2211.10154), which uses the sequence unscrambled.

    >>> total_sobol(lambda m: m[:, 0] * m[:, 1], 2, n=256)       # 4/7 each
    """
    masks = design(k, n, seed=seed, scramble=scramble)
    scores = score(masks)
    if not isinstance(scores, Tensor) or scores.shape != (len(masks),):
        shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(f"score must return [{len(masks)}] values, one a mask; it returned {shape}")
    return jansen(scores[None], n)[0]


def design(k: int, n: int, *, seed: int = 0, scramble: bool = True) -> Tensor:
    """The masks [n (k + 1), k], float64: the rows A, then for each factor the rows A with that column from B."""
    import numpy as np
    from scipy.stats import qmc

    if k < 1:
        raise ValueError(f"there must be at least 1 factor, not {k}")
    if isinstance(n, bool) or not isinstance(n, int) or n < 2:
        raise ValueError(f"n must be an int of at least 2 design rows, not {n!r}")
    halton = qmc.Halton(2 * k, scramble=scramble, seed=np.random.default_rng(seed))
    both = torch.from_numpy(halton.random(n))
    first, second = both[:, :k], both[:, k:]
    masks = first.repeat(k + 1, 1)
    for i in range(k):
        masks[(i + 1) * n : (i + 2) * n, i] = second[:, i]
    return masks


def jansen(scores: Tensor, n: int) -> Tensor:
    """Indices [N, k] from scores [N, n (k + 1)] on a design; NaN where all scores of a row are the same.

    Scores that differ by less than their own rounding are the same: a ratio of roundings is no index.
    """
    rounding = 8 * torch.finfo(scores.dtype).eps if scores.is_floating_point() else 0.0
    scores = scores.detach().cpu().double().reshape(len(scores), -1, n)
    first, changed = scores[:, :1], scores[:, 1:]
    variance = first.var(2, correction=1)
    indices = (first - changed).square().mean(2) / (2 * variance)
    return torch.where(variance.sqrt() > rounding * first.abs().amax(2), indices, torch.nan)
