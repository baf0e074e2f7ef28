"""Maps as the checks take them: finite, of a known shape, ordered, compared."""

from __future__ import annotations

import torch
from torch import Tensor

from nbkit import forward
from nbkit.errors import NotFinite


def finite(maps: Tensor) -> Tensor:
    """The maps detached on the CPU, in float32 or better. Raises TypeError, ValueError (empty), NotFinite."""
    if not isinstance(maps, Tensor):
        raise TypeError(f"maps must be a tensor, not {type(maps).__name__}")
    maps = maps.detach().cpu()
    if maps.ndim < 2 or maps.numel() == 0:
        raise ValueError(f"maps must be [N, ...] with at least one value, not {tuple(maps.shape)}")
    maps = forward.wide(maps)
    if not torch.isfinite(maps).all():
        raise NotFinite(f"maps hold {(~torch.isfinite(maps)).sum().item()} NaN or infinite values")
    return maps


def pixels(maps: Tensor, x: Tensor) -> Tensor:
    """Maps at one value for what goes at once, shaped to broadcast to ``x``.

    A pixel of ``[N, C, H, W]`` goes with all its channels, of which maps are added up. Of ``[N, A, B]`` maps of that
    shape rank every number (a grey picture), ``[N, A]`` rows (tokens), ``[N, 1, B]`` columns (places of a signal).

    Raises: ValueError (other shapes), NotFinite.
    """
    maps, shape = finite(maps), tuple(x.shape)
    n, rest = shape[0], shape[2:]
    fits = {2: [shape], 3: [shape, shape[:2], (n, 1, *rest)]}.get(x.ndim, [(n, *rest), shape, (n, 1, *rest)])
    if tuple(maps.shape) not in fits:
        given = f"maps of shape {tuple(maps.shape)} do not fit the inputs {shape}"
        raise ValueError(f"{given}; give {' or '.join(map(str, fits))}")
    if x.ndim < 4:
        return maps if maps.ndim == x.ndim else maps[..., None]
    return maps[:, None] if maps.ndim < x.ndim else maps.sum(1, keepdim=True)


def ranks(maps: Tensor, seed: int) -> Tensor:
    """Place of every pixel in the order of falling importance, shaped like ``maps``; ties in random order."""
    flat = maps.flatten(1)
    generator = torch.Generator().manual_seed(seed)
    shuffle = torch.stack([torch.randperm(flat.shape[1], generator=generator) for _ in flat])
    order = shuffle.gather(1, flat.gather(1, shuffle).argsort(dim=1, descending=True, stable=True))
    places = torch.arange(flat.shape[1]).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places).view(maps.shape)


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's rank correlation of each map of ``a`` with its partner in ``b``, ``[N]``; ties get their mean rank.

    A constant map orders nothing: its correlation is 0, and 1 with another constant map.

    Raises: ValueError for different shapes; NotFinite.

    >>> rank_correlation(maps.abs(), other_maps.abs())
    """
    from scipy.stats import rankdata

    a, b = finite(a), finite(b)
    if a.shape != b.shape:
        raise ValueError(f"maps of shapes {tuple(a.shape)} and {tuple(b.shape)} cannot be compared value by value")
    ordered = [torch.as_tensor(rankdata(m.flatten(1).numpy(), axis=1), dtype=torch.float64) for m in (a, b)]
    p, q = (r - r.mean(1, keepdim=True) for r in ordered)
    flat_p, flat_q = (p == 0).all(1), (q == 0).all(1)
    scale = (p.square().sum(1) * q.square().sum(1)).sqrt()
    correlation = (p * q).sum(1) / scale.masked_fill(scale == 0, 1)
    return torch.where(flat_p & flat_q, 1.0, correlation).float()
