"""Attributions made of input gradients: one gradient, or a mean of many along a path or in a neighbourhood."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from nbkit import forward
from nbkit._rows import batches, check_target, default_batch, explained, fixed_target, target_of
from nbkit.attribution._autograd import differentiating, input_gradient
from nbkit.errors import NotFinite


@forward.outside_inference_mode
def saliency(
    model: nn.Module,
    inputs: forward.Inputs,
    target: forward.Target = None,
    *,
    absolute: bool = False,
    batch: int | None = None,
    wrt: str | None = None,
) -> Tensor:
    """The gradient of the target's score (the logit, not the softmax) with respect to the inputs.

    Args:
        absolute: return its magnitude, as Simonyan et al. draw it.
        batch: examples in one pass; ``None``: all.
        wrt: the tensor of a dict of inputs that is explained; ``None``: its only floating one.

    Returns: a CPU tensor shaped like ``inputs`` (like ``inputs[wrt]`` for a dict), signed unless ``absolute``.

    Raises: TypeError, ValueError, NotFinite for inputs that cannot be explained; IndexError for a class out of range.

    Source: K. Simonyan et al., *Deep Inside Convolutional Networks*, 2013, section 3.

    >>> saliency(model, images, target=3).abs().amax(1)      # [N, H, W], the largest over colours
    """
    x, put = explained(inputs, wrt)
    forward.check_device(model, inputs)
    check_target(target, x.shape[0])
    gradients = []
    with differentiating(model):
        for part in batches(x.shape[0], batch):
            index = torch.arange(part.start, part.stop, device=x.device)
            gradients.append(input_gradient(model, put, x[part], index, target_of(target, part)).cpu())
    gradient = torch.cat(gradients)
    return gradient.abs() if absolute else gradient


@forward.outside_inference_mode
def input_x_gradient(
    model: nn.Module,
    inputs: forward.Inputs,
    target: forward.Target = None,
    *,
    batch: int | None = None,
    wrt: str | None = None,
) -> Tensor:
    """Input times gradient: the first-order estimate of what each input adds, seen from an input of zeros.

    In a network of linear and ReLU layers without biases it sums to the score. Arguments, result and errors as in
    :func:`saliency`.

    Source: A. Shrikumar et al., *Not Just a Black Box*, 2016, section 2.

    >>> input_x_gradient(model, images).sum((1, 2, 3))
    """
    x, _ = explained(inputs, wrt)
    return x.cpu() * saliency(model, inputs, target, batch=batch, wrt=wrt)


@forward.outside_inference_mode
def integrated_gradients(
    model: nn.Module,
    inputs: forward.Inputs,
    target: forward.Target = None,
    *,
    steps: int = 50,
    baseline: float | Tensor = 0.0,
    batch: int | None = None,
    wrt: str | None = None,
) -> Tensor:
    """The gradient averaged on the straight line from a baseline to the inputs, times the difference between them.

    The integral is taken by Gauss-Legendre quadrature with ``steps`` points. Completeness: the attributions of an
    example sum to ``score(inputs) - score(baseline)``, up to the error of the quadrature.

    Args:
        steps: points on the line; more make the sum more exact.
        baseline: where the line starts: a number, or a tensor that broadcasts to the inputs (``[N, ...]``).
        batch: rows (example, point) in one pass, which bounds memory; ``None``: about a million input numbers.
        wrt: the tensor of a dict of inputs that is explained; ``None``: its only floating one.

    Returns: a CPU tensor shaped like ``inputs``, signed.

    Raises: as :func:`saliency`; ValueError for ``steps`` below 1 or a baseline of another shape.

    Source: M. Sundararajan et al., *Axiomatic Attribution for Deep Networks*, 2017, equations 1 and 3.

    >>> integrated_gradients(model, images, target=3, steps=50).sum((1, 2, 3))
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be an int of at least 1, not {steps!r}")
    x, put = explained(inputs, wrt)
    forward.check_device(model, inputs)
    n, rows = x.shape[0], default_batch(x, batch)
    start = _start(baseline, x)
    points, weights = np.polynomial.legendre.leggauss(steps)
    # from [-1, 1], where the rule is stated, to [0, 1]
    points = torch.as_tensor((points + 1) / 2, dtype=x.dtype, device=x.device)
    weights = torch.as_tensor(weights / 2, dtype=x.dtype, device=x.device)
    per_row = [-1] + [1] * (x.ndim - 1)
    with differentiating(model):
        total = torch.zeros_like(x)
        target = fixed_target(model, put, x, target, rows)
        for part in batches(n * steps, rows):
            row = torch.arange(part.start, part.stop, device=x.device)
            index, step = row % n, row // n
            at = start[index] + points[step].view(per_row) * (x - start)[index]
            gradient = input_gradient(model, put, at, index, target_of(target, index))
            total.index_add_(0, index, gradient * weights[step].view(per_row))
    return (total * (x - start)).cpu()


def _start(baseline: float | Tensor, x: Tensor) -> Tensor:
    value = torch.as_tensor(baseline, dtype=x.dtype, device=x.device)
    if not torch.isfinite(value).all():
        raise NotFinite("baseline must be finite; it holds NaN or infinite values")
    try:
        return value.detach().expand_as(x)
    except RuntimeError:
        shapes = f"{tuple(value.shape)} does not broadcast to the inputs, {tuple(x.shape)}"
        raise ValueError(f"a baseline of shape {shapes}") from None


@forward.outside_inference_mode
def smooth_grad(
    model: nn.Module,
    inputs: forward.Inputs,
    target: forward.Target = None,
    *,
    samples: int = 25,
    noise: float = 0.15,
    seed: int = 0,
    batch: int | None = None,
    wrt: str | None = None,
) -> Tensor:
    """The mean gradient over copies of each example with Gaussian noise added.

    Args:
        samples: noisy copies an example.
        noise: standard deviation as a fraction of the example's own range, max - min (0.1 to 0.2 in the paper).
        seed: of the noise, which does not depend on ``batch`` or the device.
        batch: rows (example, copy) in one pass, which bounds memory; ``None``: about a million input numbers.
        wrt: the tensor of a dict of inputs that is explained; ``None``: its only floating one.

    Returns: a CPU tensor shaped like ``inputs``, signed. ``target=None`` is the class of the clean example.

    Raises: as :func:`saliency`; ValueError for ``samples`` below 1 or ``noise`` below 0.

    Source: D. Smilkov et al., *SmoothGrad: removing noise by adding noise*, 2017, section 3.

    >>> smooth_grad(model, images, samples=25, noise=0.15, seed=0)
    """
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise ValueError(f"samples must be an int of at least 1, not {samples!r}")
    if not (noise >= 0 and math.isfinite(noise)):
        raise ValueError(f"noise must be a finite fraction of at least 0, not {noise}")
    x, put = explained(inputs, wrt)
    forward.check_device(model, inputs)
    n, rows = x.shape[0], default_batch(x, batch)
    flat = x.reshape(n, -1)
    sigma = noise * (flat.amax(1) - flat.amin(1)).view([-1] + [1] * (x.ndim - 1))
    generator = torch.Generator().manual_seed(seed)
    with differentiating(model):
        total = torch.zeros_like(x)
        target = fixed_target(model, put, x, target, rows)
        for part in batches(n * samples, rows):
            index = torch.arange(part.start, part.stop, device=x.device) // samples
            # one draw a row: the stream of random numbers is then cut at the same places whatever the batch
            draws = [torch.randn(x.shape[1:], generator=generator, dtype=x.dtype) for _ in range(len(index))]
            noisy = x[index] + sigma[index] * torch.stack(draws).to(x.device)
            total.index_add_(0, index, input_gradient(model, put, noisy, index, target_of(target, index)))
    return (total / samples).cpu()
