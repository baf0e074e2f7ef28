"""Numbers to draw, from whatever holds them."""

from __future__ import annotations

from typing import Any

import numpy as np

from nbkit.errors import NotFinite


def array(values: Any, name: str, ndim: int | None = None) -> np.ndarray:
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = values.float() if values.is_floating_point() else values  # NumPy has no bfloat16
    array = np.asarray(values)
    if array.dtype.kind not in "fiub":
        raise ValueError(f"{name} must hold numbers, not {array.dtype}")
    if array.size == 0:
        raise ValueError(f"{name} is empty: its shape is {array.shape}")
    if ndim is not None and array.ndim != ndim:
        raise ValueError(f"{name} has shape {array.shape}; it must have {ndim} {'axis' if ndim == 1 else 'axes'}")
    if not np.isfinite(array).all():
        raise NotFinite(f"{name} holds {(~np.isfinite(array)).sum()} NaN or infinite values of {array.size}")
    return array if array.dtype == np.uint8 else array.astype(float)
