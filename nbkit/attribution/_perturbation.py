"""Attributions made of forwards only: hide part of the input and see what becomes of the score."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nbkit import forward
from nbkit._rows import batches, default_batch, explained, fixed_target, target_of
from nbkit.attribution._windows import Reference, Windowed
from nbkit.errors import NotFinite

_SMALL = 64 * 64  # pixels: below, a whole picture costs less than following its windows
_ENOUGH = 16  # rows: above, patches gain nothing by being more


@forward.outside_inference_mode
def occlusion(
    model: nn.Module,
    inputs: forward.Inputs,
    target: forward.Target = None,
    *,
    window: int | tuple[int, ...] | None = None,
    stride: int | tuple[int, ...] | None = None,
    fill: float = 0.0,
    per_window: bool = False,
    batch: int | None = None,
    wrt: str | None = None,
) -> Tensor:
    """How far the target's score falls when a window of the input is covered, for every window of a grid.

    Windows slide over the axes behind the channels, all channels at once: over ``H`` and ``W`` of ``[N, C, H, W]``,
    ``T`` of ``[N, C, T]``, the features of ``[N, F]``. The last window of an axis is cut at the border. Where a picture
    is large and a window small, only what the window can reach is recomputed in the early layers (same result).

    Args:
        window: size, one number or one an axis; ``None``: a seventh of a picture's sides (32 of 224), one feature.
        stride: steps of the grid, at most the window; ``None``: the window, so that windows tile the input.
        fill: the value that covers.
        per_window: return the fall for every window instead of spreading it over pixels.
        batch: rows (covered copies) in one forward, which bounds memory; ``None``: about a million input numbers.
            Where windows are followed, more rows may run together, in no more memory than ``batch`` whole ones, and the
            clean maps of one example are kept beside them.
        wrt: the tensor of a dict of inputs that is explained; ``None``: its only floating one.

    Returns: a CPU tensor shaped like ``inputs``, each pixel the mean fall over the windows that cover it; with
    ``per_window`` ``[N, gh, gw]`` (``[N, g]`` for one axis), ``g = ceil((size - window) / stride) + 1``.

    Raises: ValueError for a window larger than the input, a stride larger than the window (it would skip pixels) or
    below 1; NotFinite for ``fill``; and as :func:`saliency`.

    Source: M. Zeiler and R. Fergus, *Visualizing and Understanding Convolutional Networks*, 2013, section 4.2.

    >>> occlusion(model, images, target=3, window=32, per_window=True)       # [N, 7, 7] for 224 x 224
    """
    x, put = explained(inputs, wrt)
    forward.check_device(model, inputs)
    if not math.isfinite(fill):
        raise NotFinite(f"fill must be finite, not {fill}")
    axes = x.shape[2:] or x.shape[1:]
    if window is None:
        window = tuple(max(round(size / 7), 1) for size in axes) if x.ndim > 2 else 1
    starts, window = _grid(axes, window, stride)
    boxes = list(itertools.product(*starts))
    rows = default_batch(x, batch)
    with forward.evaluating(model), torch.no_grad():
        target = fixed_target(model, put, x, target, rows)
        clean = _scores(model, put, x, target, rows)
    covered = None
    if _worth_following(model, x, window):
        covered = _covered_by_windows(model, put, x, target, clean, boxes, window, fill, rows)
    if covered is None:
        covered = _covered(model, put, x, target, boxes, window, fill, rows)
    fall = (clean[:, None] - covered).view(-1, *map(len, starts)).cpu()
    return fall if per_window else _spread(fall, x, boxes, window)


def _grid(axes: tuple[int, ...], window: Any, stride: Any) -> tuple[list[range], tuple[int, ...]]:
    def one_each(value: Any, name: str) -> tuple[int, ...]:
        values = (value,) * len(axes) if isinstance(value, int) else tuple(value)
        if len(values) != len(axes) or any(isinstance(v, bool) or not isinstance(v, int) or v < 1 for v in values):
            raise ValueError(f"{name} must be an int of at least 1, or one for each axis of {tuple(axes)}, not {value}")
        return values

    window = one_each(window, "window")
    stride = window if stride is None else one_each(stride, "stride")
    for size, w, s in zip(axes, window, stride, strict=True):
        if w > size:
            raise ValueError(f"a window of {w} is larger than the input's axis of {size}")
        if s > w and w < size:
            raise ValueError(f"a stride of {s} is larger than the window of {w}: pixels between would never be covered")
    counts = [math.ceil((size - w) / s) + 1 for size, w, s in zip(axes, window, stride, strict=True)]
    return [range(0, s * count, s) for s, count in zip(stride, counts, strict=True)], window


def _at(box: tuple[int, ...], window: tuple[int, ...]) -> tuple:
    return (..., *(slice(start, start + size) for start, size in zip(box, window, strict=True)))


def _scores(model: nn.Module, put: Callable, x: Tensor, target: forward.Target, rows: int) -> Tensor:
    found = []
    for part in batches(x.shape[0], rows):
        index = torch.arange(part.start, part.stop, device=x.device)
        found.append(forward.scores(forward.call(model, put(x[part], index)), target_of(target, part)))
    return torch.cat(found)


def _covered(model, put, x, target, boxes, window, fill, rows) -> Tensor:
    """Scores of all covered copies, ``[N, len(boxes)]``."""
    found = []
    with forward.evaluating(model), torch.no_grad():
        for part in batches(x.shape[0] * len(boxes), rows):
            row = torch.arange(part.start, part.stop, device=x.device)
            index = row // len(boxes)
            copies = x[index]
            for copy, k in zip(copies, range(part.start, part.stop), strict=True):
                copy[_at(boxes[k % len(boxes)], window)] = fill
            found.append(forward.scores(forward.call(model, put(copies, index)), target_of(target, index)))
    return torch.cat(found).view(x.shape[0], len(boxes))


def _worth_following(model: nn.Module, x: Tensor, window: tuple[int, ...]) -> bool:
    """Large pictures and small windows on a CPU; a GPU computes a whole picture sooner than it starts many patches."""
    exact = x.dtype in (torch.float32, torch.float64)
    if not exact or x.ndim != 4 or x.device.type != "cpu" or math.prod(x.shape[2:]) < _SMALL:
        return False
    # somebody's hook would be handed a Windowed in place of a plain tensor
    watched = any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    return not watched and 4 * math.prod(window) <= math.prod(x.shape[2:])


def _covered_by_windows(model, put, x, target, clean, boxes, window, fill, rows) -> Tensor | None:
    """As :func:`_covered`, following only what each window reaches; ``None`` for a model where that cannot be done."""
    try:
        with forward.evaluating(model), torch.no_grad():
            found = [_followed(model, put, x, target, i, boxes, window, fill, rows) for i in range(x.shape[0])]
    except Exception:  # the model does what patches cannot follow; if it is broken, the plain run says how
        return None
    covered = torch.stack(found)
    return covered if _as_whole(model, put, x, target, clean, covered, boxes, window, fill) else None


def _as_whole(model, put, x, target, clean, covered, boxes, window, fill) -> bool:
    """Whether whole forwards say the same of four windows: the middle and both corners, and where the score fell most.

    To a thousandth of the largest fall: a wrong fall may be small beside the score.
    """
    n, last = x.shape[0], len(boxes) - 1
    falls = (clean[:, None] - covered).abs()
    strongest = divmod(int(falls.argmax()), len(boxes))
    with forward.evaluating(model), torch.no_grad():
        for i, k in {(0, last // 2), (0, 0), (n - 1, last), strongest}:
            index, copy = torch.tensor([i]), x[i : i + 1].clone()
            copy[_at(boxes[k], window)] = fill
            score = forward.scores(forward.call(model, put(copy, index)), target_of(target, index))[0]
            if not torch.isclose(covered[i, k], score, rtol=1e-5, atol=1e-3 * falls.max().item()):
                return False
    return True


def _followed(model, put, x, target, i, boxes, window, fill, rows) -> Tensor:
    """Scores of one example's covered copies, ``[len(boxes)]``."""
    found, reference, clean = [], Reference(), x[i : i + 1]
    # a patch lies inside the picture: one that the border cuts moves inwards and keeps some of the picture's own edge
    places = [tuple(min(b, n - w) for b, w, n in zip(box, window, x.shape[2:], strict=True)) for box in boxes]
    while len(found) < len(boxes):
        part = slice(len(found), len(found) + reference.fits(rows, _ENOUGH))
        patch = torch.stack([clean[0][_at(place, window)] for place in places[part]])
        for one, box, place in zip(patch, boxes[part], places[part], strict=True):
            one[_at(tuple(b - p for b, p in zip(box, place, strict=True)), window)] = fill
        top, left = (list(starts) for starts in zip(*places[part], strict=True))
        reference.rewind()
        index = torch.full((len(top),), i)
        output = forward.call(model, put(Windowed(clean, patch, top, left, reference), index))
        found += forward.scores(output, target_of(target, index)).unbind()
    return torch.stack(found)


def _spread(fall: Tensor, x: Tensor, boxes: list[tuple[int, ...]], window: tuple[int, ...]) -> Tensor:
    axes = x.shape[-len(window) :]
    total, count = torch.zeros(x.shape[0], *axes, dtype=fall.dtype), torch.zeros(axes, dtype=fall.dtype)
    for box, one in zip(boxes, fall.flatten(1).unbind(1), strict=True):
        total[_at(box, window)] += one.view([-1] + [1] * len(window))
        count[_at(box, window)] += 1
    pixels = (total / count).to(x.dtype)
    return pixels.view(-1, *[1] * (x.ndim - 1 - len(axes)), *axes).expand(x.shape).contiguous()


@forward.outside_inference_mode
def rise(
    model: nn.Module,
    inputs: forward.Inputs,
    target: forward.Target = None,
    *,
    masks: int = 1000,
    grid: int = 7,
    p: float = 0.5,
    fill: float = 0.0,
    seed: int = 0,
    batch: int | None = None,
    wrt: str | None = None,
) -> Tensor:
    """The mean of random masks, each weighted by the score the model gives to the picture seen through it.

    A mask is a ``grid x grid`` field of ones (with probability ``p``) and zeros, enlarged bilinearly and shifted by a
    random part of a cell. The paper weights by the class probability: pass
    ``target=lambda out: out.softmax(1)[:, c]``; an int weights by the logit, as in the other methods.

    Args:
        masks: how many; the error falls with the square root.
        grid: cells of a mask along one axis, before enlarging.
        p: probability that a cell shows the picture.
        fill: what hidden pixels become.
        seed: of the masks, which depend neither on ``batch`` nor on the device. All examples share them.
        batch: rows (masked copies) in one forward, which bounds memory; ``None``: about a million input numbers.
        wrt: the tensor of a dict of inputs that is explained; ``None``: its only floating one.

    Returns: maps ``[N, H, W]`` on the CPU, ``sum_i score_i mask_i / (masks * p)``.

    Raises: ValueError for inputs that are not ``[N, C, H, W]`` or arguments out of range; and as :func:`saliency`.

    Source: V. Petsiuk et al., *RISE*, 2018, equation 6 and section 3.2.

    >>> rise(model, images, target=lambda out: out.softmax(1)[:, 3], masks=2000)
    """
    x, put = explained(inputs, wrt)
    forward.check_device(model, inputs)
    if x.ndim != 4:
        raise ValueError(f"rise explains pictures [N, C, H, W], not inputs of shape {tuple(x.shape)}")
    if masks < 1 or grid < 1 or not 0 < p < 1:
        raise ValueError(f"rise needs masks >= 1, grid >= 1 and 0 < p < 1, not {masks}, {grid} and {p}")
    if not math.isfinite(fill):
        raise NotFinite(f"fill must be finite, not {fill}")
    n, rows, size = x.shape[0], default_batch(x, batch), tuple(x.shape[2:])
    generator = torch.Generator().manual_seed(seed)
    cells = (torch.rand(masks, grid, grid, generator=generator) < p).to(x.dtype)
    shift = torch.rand(masks, 2, generator=generator)
    maps = torch.zeros(n, *size, dtype=x.dtype, device=x.device)
    with forward.evaluating(model), torch.no_grad():
        target = fixed_target(model, put, x, target, rows)
        # mask-major: one mask after the other meets all examples
        for part in batches(n * masks, rows):
            row = torch.arange(part.start, part.stop)
            which, index = row // n, (row % n).to(x.device)
            first = int(which[0])
            field = _masks(cells[first : which[-1] + 1], shift[first : which[-1] + 1], size).to(x.device)
            shown = field[(which - first).to(x.device)]
            copies = x[index] * shown[:, None] + fill * (1 - shown[:, None])
            score = forward.scores(forward.call(model, put(copies, index)), target_of(target, index))
            maps.index_add_(0, index, shown * score.to(x.dtype)[:, None, None])
    return maps.cpu() / (masks * p)


def _masks(cells: Tensor, shift: Tensor, size: tuple[int, int]) -> Tensor:
    """Cells ``[M, s, s]`` enlarged by one cell more than ``size`` and cropped at a random ``shift`` of up to a cell."""
    grid = cells.shape[-1]
    cell = [math.ceil(n / grid) for n in size]
    large = F.interpolate(
        cells[:, None], size=[(grid + 1) * c for c in cell], mode="bilinear", align_corners=False
    )[:, 0]
    corners = (shift * torch.tensor(cell)).long().tolist()
    return torch.stack([m[y : y + size[0], x : x + size[1]] for m, (y, x) in zip(large, corners, strict=True)])
