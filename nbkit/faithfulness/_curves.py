"""Deletion and insertion: the score while the most important pixels go, or come."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nbkit import forward
from nbkit._rows import batches, default_batch, explained, fixed_target, target_of
from nbkit.errors import NotFinite
from nbkit.faithfulness._maps import pixels, ranks


@dataclass(frozen=True, eq=False)
class Curve:
    """Scores along a deletion or insertion: ``fractions`` ``[S + 1]``, ``scores`` ``[N, S + 1]``, ``auc`` ``[N]``."""

    name: str
    fractions: Tensor
    scores: Tensor
    auc: Tensor

    def __repr__(self) -> str:
        spread = f" +- {self.auc.std().item():.3f}" if len(self.auc) > 1 else ""
        return f"{self.name} of {len(self.auc)} examples: AUC {self.auc.mean().item():.3f}{spread}"

    def _repr_html_(self) -> str:
        low, high = min(self.scores.min().item(), 0.0), max(self.scores.max().item(), 1e-12)
        ups = (self.scores - low) / (high - low)

        def line(ys: Tensor, style: str) -> str:
            points = " ".join(f"{220 * x:.1f},{100 - 96 * y:.1f}" for x, y in zip(self.fractions, ys, strict=True))
            return f'<polyline points="{points}" fill="none" {style}/>'

        each = "".join(line(y, 'stroke="#9bb" stroke-width="0.7"') for y in ups[:50])
        mean = line(ups.mean(0), 'stroke="#c50" stroke-width="2"')
        frame = '<rect width="220" height="100" fill="none" stroke="#888"/>'
        return f'<div>{self!r}<br><svg width="224" height="104" viewBox="-2 -2 224 104">{frame}{each}{mean}</svg></div>'


@forward.outside_inference_mode
def deletion(
    model: nn.Module,
    inputs: forward.Inputs,
    maps: Tensor,
    target: forward.Target = None,
    *,
    steps: int = 25,
    fill: float | Tensor = 0.0,
    probability: bool = True,
    seed: int = 0,
    batch: int | None = None,
    wrt: str | None = None,
) -> Curve:
    """The score while pixels are replaced by ``fill``, the most important first. A faithful map has a low area.

    Args:
        maps: attributions of the inputs ``[N, C, H, W]``, ``[N, H, W]`` or shaped like the inputs (channels add up);
            ``[N, F]`` for features. Of inputs ``[N, T, F]`` or ``[N, H, W]``, maps of that shape take number by number,
            ``[N, T]`` token by token, ``[N, 1, F]`` one place of all rows after the other.
        target: as everywhere; ``None`` is the class of the whole example, held while pixels go.
        steps: how many equal parts the pixels are replaced in.
        fill: a number, or a tensor that broadcasts to the inputs.
        probability: follow the softmax probability of the class; ``False`` follows the logit. The value of a callable
            target is taken as it is, and so is the output of a model that has only one.
        seed: breaks ties (many pixels of equal importance) at random instead of from the top left.
        batch: rows in one forward, which bounds memory; ``None``: about a million input numbers.

    Returns: a :class:`Curve`; ``auc`` is the trapezoidal area over the fraction replaced, from 0 to 1.

    Raises: ValueError (maps of another shape, steps below 1), NotFinite, and as the methods of ``attribution``.

    Source: V. Petsiuk et al., *RISE*, 2018, section 4.1.

    >>> deletion(model, images, maps, target=3).auc
    """

    def end(x: Tensor) -> Tensor:
        return _broadcast(fill, x, "fill")

    return _curve("deletion", model, inputs, maps, target, steps, probability, seed, batch, wrt, other=end)


@forward.outside_inference_mode
def insertion(
    model: nn.Module,
    inputs: forward.Inputs,
    maps: Tensor,
    target: forward.Target = None,
    *,
    steps: int = 25,
    start: float | Tensor | None = None,
    probability: bool = True,
    seed: int = 0,
    batch: int | None = None,
    wrt: str | None = None,
) -> Curve:
    """The score while pixels are shown, the most important first, on a blurred start. A faithful map has a high area.

    Args:
        start: what is seen before: a number, a tensor that broadcasts to the inputs, or ``None``: pictures blurred by a
            Gaussian (sigma 5 pixels, 11 wide, for a side of 224; in proportion for others), zeros for other inputs.

    Other arguments, result and errors as in :func:`deletion`.

    Source: V. Petsiuk et al., *RISE*, 2018, section 4.1.

    >>> insertion(model, images, maps, target=3).auc
    """

    def begin(x: Tensor) -> Tensor:
        if start is None and x.ndim == 4:
            return _blurred(x)
        return _broadcast(0.0 if start is None else start, x, "start")

    return _curve("insertion", model, inputs, maps, target, steps, probability, seed, batch, wrt, other=begin)


def _curve(
    name: str,
    model: nn.Module,
    inputs: forward.Inputs,
    maps: Tensor,
    target: forward.Target,
    steps: int,
    probability: bool,
    seed: int,
    batch: int | None,
    wrt: str | None,
    other: Callable[[Tensor], Tensor],
) -> Curve:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be an int of at least 1, not {steps!r}")
    x, put = explained(inputs, wrt)
    forward.check_device(model, inputs)
    other, rank = other(x), ranks(pixels(maps, x), seed).to(x.device)
    n, rows = x.shape[0], default_batch(x, batch)
    counts = torch.linspace(0, rank[0].numel(), steps + 1, dtype=torch.float64).round().long().to(x.device)
    found = []
    with forward.evaluating(model), torch.no_grad():
        target = fixed_target(model, put, x, target, rows)
        for part in batches(n * (steps + 1), rows):
            row = torch.arange(part.start, part.stop, device=x.device)
            index, step = row // (steps + 1), row % (steps + 1)
            first = rank[index] < counts[step].view([-1] + [1] * (rank.ndim - 1))
            shown = first if name == "insertion" else ~first
            copies = torch.where(shown, x[index], other[index])
            output = forward.call(model, put(copies, index))
            found.append(_score(output, target_of(target, index), probability).float().cpu())
    scores = torch.cat(found).view(n, steps + 1)
    fractions = (counts / counts[-1]).float().cpu()
    return Curve(name, fractions, scores, torch.trapezoid(scores, fractions))


def _score(output: Any, target: forward.Target, probability: bool) -> Tensor:
    values = forward.first_tensor(output)
    if probability and not callable(target) and values.shape[-1] > 1:
        output = values.softmax(-1)
    return forward.scores(output, target)


def _broadcast(value: float | Tensor, x: Tensor, name: str) -> Tensor:
    value = torch.as_tensor(value, dtype=x.dtype, device=x.device)
    if not torch.isfinite(value).all():
        raise NotFinite(f"{name} must be finite")
    try:
        return value.expand_as(x)
    except RuntimeError:
        raise ValueError(f"{name} of shape {tuple(value.shape)} does not broadcast to {tuple(x.shape)}") from None


def _blurred(x: Tensor) -> Tensor:
    for axis in (2, 3):
        size = x.shape[axis]
        radius, sigma = min(max(round(size * 5 / 224), 1), size - 1), size * 5 / 224
        if radius < 1:
            continue
        at = torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device)
        kernel = torch.exp(-(at**2) / (2 * sigma**2))
        kernel = (kernel / kernel.sum()).view([1, 1, -1, 1] if axis == 2 else [1, 1, 1, -1])
        margin = (0, 0, radius, radius) if axis == 2 else (radius, radius, 0, 0)
        planes = F.pad(x.flatten(0, 1)[:, None], margin, mode="reflect")
        x = F.conv2d(planes, kernel).view(x.shape)
    return x
