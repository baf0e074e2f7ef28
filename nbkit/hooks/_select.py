"""Turning what a caller writes for neurons and positions into checked index tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _as_index(chosen: Any, size: int, what: str, device: torch.device, negative: bool) -> Tensor:
    """Ints, a slice or a bool mask as a LongTensor of distinct indices in ``[0, size)``."""
    if isinstance(chosen, slice):
        return torch.arange(size, device=device)[chosen]
    index = _tensor(chosen, what, device)
    if index.dtype == torch.bool:
        if index.shape != (size,):
            raise ValueError(f"a bool mask over {what}s must have shape ({size},), not {tuple(index.shape)}")
        return index.nonzero().flatten()
    if index.numel() and (index.is_floating_point() or index.is_complex()):
        raise TypeError(f"{what}s are counted by ints, not {index.dtype}")
    index = index.long().flatten()
    lowest = -size if negative else 0
    bad = index[(index < lowest) | (index >= size)]
    if bad.numel():
        raise IndexError(f"{what} {bad[0].item()} is out of range; there are {what}s 0 to {size - 1}")
    index = index % size if negative and size else index
    if index.unique().numel() != index.numel():
        raise ValueError(f"a {what} is named twice in {chosen}")
    return index


def _tensor(chosen: Any, what: str, device: torch.device) -> Tensor:
    try:
        return torch.as_tensor(chosen, device=device)
    except (TypeError, RuntimeError, ValueError):
        raise TypeError(f"{what}s are named by ints or a bool mask, not by {chosen!r}") from None


def neuron_index(neurons: Any, size: int, device: torch.device) -> Tensor | None:
    if neurons is None or (isinstance(neurons, str) and neurons == "all"):
        return None
    return _as_index(neurons, size, "neuron", device, negative=False)


def position_index(positions: Any, shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, bool]:
    """Flat indices into the position axes, and whether a single position was named."""
    if not shape:
        raise ValueError("positions were named, but this layer's output [N, F] has none")
    size = int(torch.tensor(shape).prod())
    if len(shape) == 1 and isinstance(positions, slice):
        return _as_index(positions, size, "position", device, negative=True), False
    places = _tensor(positions, "position", device)
    if places.dtype == torch.bool:
        if tuple(places.shape) != shape:
            raise ValueError(f"a bool mask over positions must have shape {shape}, not {tuple(places.shape)}")
        return places.flatten().nonzero().flatten(), False
    if len(shape) == 1:
        return _as_index(places, size, "position", device, negative=True), places.ndim == 0
    single = places.ndim == 1
    places = places.reshape(-1, places.shape[-1]) if places.ndim else places[None, None]
    if places.shape[-1] != len(shape):
        raise ValueError(f"a position in a map of shape {shape} is {len(shape)} ints (row, column), not {positions}")
    flat = torch.zeros(places.shape[0], dtype=torch.long, device=device)
    for axis, length in enumerate(shape):
        column = places[:, axis].long()
        bad = column[(column < -length) | (column >= length)]
        if bad.numel():
            raise IndexError(f"position {bad[0].item()} is out of range on axis {axis} of a map of shape {shape}")
        flat = flat * length + column % length
    return flat, single
