"""Exact selection of the largest of many numbers, without sorting or copying them all.

A strided sample brackets the threshold; one pass counts what lies below the bracket and collects the few values in
it; the threshold is an order statistic of those (Floyd and Rivest, "Expected time bounds for selection", 1975). One
more pass writes the masks. Time is linear, and memory beyond the masks is the bracket, about n^(1/2) values wide.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from nbkit.errors import NotFinite

_SAMPLE = 1 << 16
_CHUNK = {"cpu": 1 << 18}  # fits the cache; other devices take one kernel launch for much more
_CHUNK_ELSEWHERE = 1 << 24


def keep_largest(tensors: Sequence[Tensor], remove: int, *, magnitudes: bool = False) -> list[Tensor]:
    """Bool masks, on the tensors' devices, that drop the ``remove`` smallest values of all ``tensors`` together.

    ``magnitudes`` ranks absolute values. Of equal values the one that comes first falls first: earlier tensor, then
    lower flat index. This is a stable ascending argsort, cut at ``remove``. Infinities are fine.

    Raises: NotFinite for NaN, if it gets in the way.
    """
    masks = [torch.ones(t.shape, dtype=torch.bool, device=t.device) for t in tensors]
    if remove <= 0:
        return masks
    threshold, ties = _order_statistic(tensors, remove, magnitudes)
    for tensor, mask in zip(tensors, masks, strict=True):
        flat = mask.view(-1)
        for start, values in _chunks(tensor, magnitudes, _dtype(tensors)):
            part = flat[start : start + len(values)]
            torch.ge(values, threshold, out=part)
            if ties:
                equal = (values == threshold).nonzero()[:ties, 0]
                part[equal] = False
                ties -= len(equal)
    return masks


def _order_statistic(tensors: Sequence[Tensor], k: int, magnitudes: bool) -> tuple[float, int]:
    """The k-th smallest value, and how many values equal to it are among the k smallest (in index order)."""
    low, high = _bracket(tensors, k, magnitudes)
    while True:
        below, inside, held = _within(tensors, low, high, magnitudes)
        if k <= below:
            low, high = -math.inf, low
        elif k > below + inside:
            if high == math.inf:
                raise NotFinite("scores hold NaN, which has no rank")
            low, high = high, math.inf
        elif low == high:
            return low, k - below
        else:
            threshold = held.kthvalue(k - below).values
            return threshold.item(), k - below - int((held < threshold).sum())


def _bracket(tensors: Sequence[Tensor], k: int, magnitudes: bool) -> tuple[float, float]:
    total = sum(t.numel() for t in tensors)
    stride = max(1, total // _SAMPLE)
    dtype = _dtype(tensors)
    sample = torch.cat([t.detach().reshape(-1)[::stride].to("cpu", dtype) for t in tensors])
    sample = (sample.abs() if magnitudes else sample).sort().values
    n, p = len(sample), k / total
    middle, margin = int(p * n), 4 * math.sqrt(n * p * (1 - p)) + 2
    first, last = math.floor(middle - margin), math.ceil(middle + margin)
    low = sample[first].item() if first > 0 else -math.inf
    high = sample[last].item() if last < n else math.inf
    return low, high


def _within(
    tensors: Sequence[Tensor], low: float, high: float, magnitudes: bool
) -> tuple[int, int, Tensor | None]:
    """How many values lie below ``low``, how many in [low, high], and those. Where low is high they are not kept."""
    below = inside = 0
    held = []
    for tensor in tensors:
        found = []
        for _, values in _chunks(tensor, magnitudes, _dtype(tensors)):
            under = values < low
            within = (values <= high).logical_xor_(under)
            below += int(torch.count_nonzero(under))
            if low == high:
                inside += int(torch.count_nonzero(within))
            else:
                found.append(values[within].cpu())
        held += [torch.cat(found)] if found else []
    return (below, inside, None) if low == high else (below, sum(map(len, held)), torch.cat(held))


def _chunks(tensor: Tensor, magnitudes: bool, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """Start and values of each piece; a piece is valid until the next is asked for."""
    flat = tensor.detach().reshape(-1)
    size = min(len(flat), _CHUNK.get(tensor.device.type, _CHUNK_ELSEWHERE))
    # one buffer for all pieces: a fresh one each leaves holes between the small results that are kept
    buffer = torch.empty(size, dtype=dtype, device=flat.device)
    for start in range(0, len(flat), max(1, size)):
        part = flat[start : start + size]
        work = buffer[: len(part)].copy_(part)
        yield start, work.abs_() if magnitudes else work


def _dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    # float32 holds every half exactly, float64 everything: comparing across tensors never rounds.
    exact = all(t.dtype in (torch.float32, torch.float16, torch.bfloat16) for t in tensors)
    return torch.float32 if exact else torch.float64
