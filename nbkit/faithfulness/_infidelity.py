"""Infidelity: do attributions predict what a perturbation does?"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from nbkit import forward
from nbkit._rows import batches, default_batch, explained, fixed_target, target_of
from nbkit.faithfulness._maps import finite


@forward.outside_inference_mode
def infidelity(
    model: nn.Module,
    inputs: forward.Inputs,
    maps: Tensor,
    target: forward.Target = None,
    *,
    noise: float = 0.1,
    perturb: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    samples: int = 100,
    scaled: bool = False,
    seed: int = 0,
    batch: int | None = None,
    wrt: str | None = None,
) -> Tensor:
    """Mean squared gap between what attributions say a perturbation ``I`` takes away and what it does take away.

    ``E_I [ (sum(I * maps) - (f(x) - f(x - I)))^2 ]``. Zero for a linear model and its gradient.

    Args:
        maps: attributions shaped like the inputs, one value a number.
        noise: standard deviation of the Gaussian perturbation, in units of the inputs.
        perturb: instead of noise, a function ``(rows [B, ...], generator) -> I [B, ...]``; ``rows - I`` is evaluated.
        samples: perturbations an example.
        scaled: first multiply each map by the factor that fits best, for maps whose scale means nothing.
        seed: of the perturbations, which do not depend on ``batch`` (unless ``perturb`` makes them).

    Returns: ``[N]`` on the CPU.

    Raises: ValueError, NotFinite, and as the methods of ``attribution``.

    Source: C.-K. Yeh et al., *On the (In)fidelity and Sensitivity of Explanations*, 2019, definition 2.1.

    >>> infidelity(model, images, saliency(model, images, 3), 3, noise=0.05)
    """
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise ValueError(f"samples must be an int of at least 1, not {samples!r}")
    if not (math.isfinite(noise) and noise > 0):
        raise ValueError(f"noise must be a finite number above 0, not {noise}")
    x, put = explained(inputs, wrt)
    forward.check_device(model, inputs)
    maps = finite(maps).to(x)
    if maps.shape != x.shape:
        raise ValueError(f"maps of shape {tuple(maps.shape)} must be shaped like the inputs, {tuple(x.shape)}")
    n, rows = x.shape[0], default_batch(x, batch)
    generator = torch.Generator().manual_seed(seed)
    with forward.evaluating(model), torch.no_grad():
        said_said, said_did, did_did = (torch.zeros(n, dtype=torch.float64) for _ in range(3))
        target = fixed_target(model, put, x, target, rows)
        everyone = torch.arange(n, device=x.device)
        parts = batches(n, rows)
        clean = [forward.call(model, put(x[p], everyone[p])) for p in parts]
        clean = torch.cat([forward.scores(out, target_of(target, p)) for out, p in zip(clean, parts, strict=True)])
        for part in batches(n * samples, rows):
            index = torch.arange(part.start, part.stop, device=x.device) // samples
            change = _perturbations(x[index], perturb, noise, generator)
            output = forward.call(model, put(x[index] - change, index))
            did = (clean[index] - forward.scores(output, target_of(target, index))).cpu().double()
            said = (change * maps[index]).flatten(1).sum(1).cpu().double()
            for total, value in ((said_said, said * said), (said_did, said * did), (did_did, did * did)):
                total.index_add_(0, index.cpu(), value)
    factor = torch.ones_like(said_did)
    if scaled:
        factor = torch.where(said_said > 0, said_did / said_said.masked_fill(said_said == 0, 1), 0)
    gap = factor**2 * said_said - 2 * factor * said_did + did_did
    return (gap.clamp(min=0) / samples).float()


def _perturbations(rows: Tensor, perturb: Callable | None, noise: float, generator: torch.Generator) -> Tensor:
    if perturb is None:
        # one draw a row: the random numbers are then cut at the same places whatever the batch
        draws = [torch.randn(rows.shape[1:], generator=generator, dtype=rows.dtype) for _ in rows]
        return noise * torch.stack(draws).to(rows.device)
    change = perturb(rows, generator)
    if not isinstance(change, Tensor) or change.shape != rows.shape:
        got = tuple(change.shape) if isinstance(change, Tensor) else type(change).__name__
        raise ValueError(f"perturb must return a tensor shaped like its rows, {tuple(rows.shape)}, not {got}")
    return change.to(rows)
