"""Attacks on inputs: projected gradient ascent of the loss inside a ball."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nbkit import forward
from nbkit.training._evaluate import check_pair, check_whole, labels_in_range


def _cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    labels_in_range(y, logits.shape[-1], strict=True)
    return F.cross_entropy(logits, y, reduction="none")


@torch.inference_mode(False)
def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    steps: int,
    norm: str = "linf",
    step: float | None = None,
    restarts: int = 1,
    loss: Callable[[Tensor, Tensor], Tensor] = _cross_entropy,
    bounds: tuple[float, float] = (0.0, 1.0),
    generator: torch.Generator | None = None,
    batch: int = 512,
) -> Tensor:
    """The inputs near ``x`` at which the model's loss is high, found by projected gradient ascent.

    The model runs in evaluation mode and comes back in the mode it had; its weights, their ``.grad`` and BatchNorm's
    statistics stay untouched.

    Args:
        x, y: inputs ``[N, ...]`` within ``bounds``, on the model's device; targets ``[N, ...]``.
        eps: radius of the ball around each input, in units of x; 0 gives x back.
        norm: "linf" (a step moves each number by ``step``) or "l2" (by ``step`` along the gradient, each example).
        step: length of a step; by default 2.5 * eps / steps, with which any place of the ball can be reached from any
            other, with steps to spare.
        restarts: tries, of which each example keeps the one of highest loss.
        loss: ``(logits, y) -> [N]``; cross-entropy by default.
        bounds: least and greatest value that an input may have.
        generator: where given, every try starts at a random place of the ball (uniform in "linf"; in "l2" of uniform
            direction and length), else at ``x``: more than one try then needs it.
        batch: examples attacked at a time.

    Returns: the attacked inputs, of x's shape and type.

    Raises: ValueError (an eps, step, norm or bounds that make no sense, x out of bounds, a loss that is not one number
    an example, restarts without a generator), TypeError, IndexError (a class out of range), NotFinite.

    Source: A. Madry et al., *Towards Deep Learning Models Resistant to Adversarial Attacks*, 2018.

    >>> attacked = pgd(model, x, y, eps=8 / 255, steps=10, generator=torch.Generator().manual_seed(0))
    """
    check_pair((x, y), "data")
    check_whole(steps=steps, restarts=restarts, batch=batch)
    step = 2.5 * eps / steps if step is None else step
    _check(x, eps, norm, step, restarts, bounds, generator)
    if eps == 0:
        return x.detach().clone()
    best = []
    with forward.evaluating(model), forward.requiring_grad(model.parameters(), False), torch.enable_grad():
        for start in range(0, len(x), batch):
            part = x[start : start + batch].detach().clone(), y[start : start + batch]
            tries = [_climb(model, *part, eps, steps, norm, step, loss, bounds, generator) for _ in range(restarts)]
            values = torch.stack([value for _, value in tries])
            at = torch.stack([attacked for attacked, _ in tries])
            best.append(at[values.argmax(0), torch.arange(len(part[0]), device=x.device)])
    return torch.cat(best)


def _climb(model, x: Tensor, y: Tensor, eps, steps, norm, step, loss, bounds, generator) -> tuple[Tensor, Tensor]:
    """One try: the attacked inputs, and the loss of each."""
    attacked = x if generator is None else (x + _somewhere(x, eps, norm, generator)).clamp(*bounds)
    for _ in range(steps):
        attacked = attacked.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(_losses(model, attacked, y, loss).sum(), attacked)
        direction = gradient.sign() if norm == "linf" else gradient / _lengths(gradient).clamp(min=1e-12)
        moved = attacked.detach() + step * direction - x
        attacked = (x + _projected(moved, eps, norm)).clamp(*bounds)
    with torch.no_grad():
        return attacked, _losses(model, attacked, y, loss)


def _losses(model, x: Tensor, y: Tensor, loss) -> Tensor:
    values = loss(forward.logits(model, x), y.to(x.device))
    if values.shape != (len(x),):
        raise ValueError(f"loss must give one number an example, [{len(x)}], not {tuple(values.shape)}")
    return values


def _lengths(v: Tensor) -> Tensor:
    """The Euclidean length of each example, to be divided by: ``[N, 1, ...]``."""
    return v.flatten(1).norm(dim=1).view(-1, *(1,) * (v.ndim - 1))


def _projected(moved: Tensor, eps: float, norm: str) -> Tensor:
    if norm == "linf":
        return moved.clamp(-eps, eps)
    return moved * (eps / _lengths(moved).clamp(min=1e-12)).clamp(max=1)


def _somewhere(x: Tensor, eps: float, norm: str, generator: torch.Generator) -> Tensor:
    """A random place of the ball; drawn where the generator is, so that devices agree."""
    if norm == "linf":
        return ((2 * torch.rand(x.shape, generator=generator, device=generator.device) - 1) * eps).to(x)
    direction = torch.randn(x.shape, generator=generator, device=generator.device)
    far = torch.rand(len(x), *(1,) * (x.ndim - 1), generator=generator, device=generator.device)
    return (direction / _lengths(direction) * far * eps).to(x)


def _check(x, eps, norm, step, restarts, bounds, generator) -> None:
    if norm not in ("linf", "l2"):
        raise ValueError(f"norm must be 'linf' or 'l2', not {norm!r}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be at least 0, not {eps}")
    if eps and not 0 < step < math.inf:
        raise ValueError(f"step must be a positive number, not {step}")
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError("x must be a floating-point tensor: an attack adds fractions to it")
    low, high = bounds
    if not low < high or x.min() < low or x.max() > high:
        raise ValueError(
            f"x runs from {x.min():.4g} to {x.max():.4g}, outside of the bounds {low} to {high}; give bounds=(least, "
            "greatest) where inputs are not in [0, 1]"
        )
    if restarts > 1 and generator is None:
        raise ValueError("tries that all start at x are the same; give a generator for random starts")
