"""Non-negative least squares for many right-hand sides, by scipy."""

from __future__ import annotations

import torch
from torch import Tensor

from nbkit.errors import NotFinite


def nnls(activations: Tensor, dictionary: Tensor) -> Tensor:
    """``argmin over U >= 0 of ||A - U W||²``: the codes of activations in a dictionary that stays fixed.

    ``activations`` A [N, P], ``dictionary`` W [k, P]; returns U [N, k], float64 on the CPU. The exact minimum, by
    ``scipy.optimize.nnls`` row by row, on the coordinates of A in the k directions of W alone: what lies outside them
    cannot be fitted. Where W has dependent rows, one of the minima.

    Raises: ValueError (shapes), NotFinite.

    >>> nnls(torch.tensor([[3.0, -1.0]]), torch.eye(2))
    tensor([[3., 0.]], dtype=torch.float64)
    """
    import numpy as np
    from scipy.optimize import nnls as one_row

    if activations.ndim != 2 or dictionary.ndim != 2 or activations.shape[1] != dictionary.shape[1]:
        shapes = f"{tuple(activations.shape)} and {tuple(dictionary.shape)}"
        raise ValueError(f"activations [N, P] and dictionary [k, P] need the same P; their shapes are {shapes}")
    a, w = activations.detach().cpu().double(), dictionary.detach().cpu().double()
    if not (torch.isfinite(a).all() and torch.isfinite(w).all()):
        raise NotFinite("activations or dictionary hold NaN or infinite values")
    directions, triangle = torch.linalg.qr(w.T)  # W.T = Q R: ||a - u W|| and ||a Q - R u|| differ by a constant
    rows = [one_row(triangle.numpy(), row)[0] for row in (a @ directions).numpy()]
    return torch.from_numpy(np.stack(rows)) if rows else a.new_zeros(0, len(w))
