"""A neuron's activation, its gradient, their product, and the integral of that product along a path (conductance)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nbkit import forward, hooks
from nbkit._rows import batches, explained, target_of
from nbkit.errors import NotFinite
from nbkit.hooks._attach import attach
from nbkit.neurons._sites import check, check_axes, observe, reduced, site


@forward.outside_inference_mode
def activation(
    model: nn.Module, inputs: forward.Inputs, target: forward.Target = None, *, layer: str, positions: Any = None,
    reduce: str | None = "mean", batch: int | None = None,
) -> Tensor:  # fmt: skip
    """What each neuron of a layer puts out.

    Args:
        target: accepted so that all methods are called alike; an activation does not depend on a class.
        layer: a dotted name; its output is read.
        positions: tokens (int, ints, slice) or places in a map (``(row, column)`` pairs); None is all of them.
        reduce: over positions: ``"mean"``, ``"sum"``, ``"max"``, or None to keep them.
        batch: examples a forward; None is all at once.

    Returns: ``[N, K]``, or ``[N, P, K]`` with ``reduce=None``; on the CPU, in the unit of the layer's output.

    Raises: LayerNotFound, LayerDidNotRun, IndexError (position out of range), ValueError, NotFinite.

    >>> activation(vit, images, layer="blocks.3.mlp.act", positions=0).argmax(1)     # the class token's loudest unit
    """
    n = check(model, inputs)
    kept = []
    for chosen in batches(n, batch):
        _, _, (rows,), _ = observe(model, forward.take(inputs, chosen), _one(layer), positions)
        kept.append(reduced(rows, reduce).cpu())
    return torch.cat(kept)


@forward.outside_inference_mode
def gradient(
    model: nn.Module, inputs: forward.Inputs, target: forward.Target = None, *, layer: str, positions: Any = None,
    reduce: str | None = "sum", batch: int | None = None,
) -> Tensor:  # fmt: skip
    """The derivative of the target's score by each neuron's output, summed over positions unless told otherwise.

    Arguments, shapes and errors as :func:`gradient_x_activation`.

    >>> gradient(vit, images, 3, layer="blocks.3.mlp.act", positions=0)
    """
    return _by_gradient(model, inputs, target, layer, positions, reduce, batch, lambda rows, grads: grads)


@forward.outside_inference_mode
def gradient_x_activation(
    model: nn.Module, inputs: forward.Inputs, target: forward.Target = None, *, layer: str, positions: Any = None,
    reduce: str | None = "sum", batch: int | None = None,
) -> Tensor:  # fmt: skip
    """Gradient times activation: the first-order estimate of what the score loses when a neuron is set to 0.

    Args:
        target: None (the predicted class), an int, ints ``[N]``, or a callable on the model's output giving ``[N]``
            scores. For a class the score is the model's output (its logit).
        layer, positions, batch: as :func:`activation`.
        reduce: over positions; the default sums, so that a channel's share is that of its whole map.

    Returns: ``[N, K]`` in the unit of the score; ``[N, P, K]`` with ``reduce=None``.

    Raises: as :func:`activation`; IndexError (target out of range); ValueError (the score does not depend on the
    layer, wrong number of targets).

    Source: Shrikumar et al. 2017, arXiv 1704.02685 (input times gradient), taken at a hidden layer as in Molchanov et
    al. 2017, arXiv 1611.06440, equation 8 without its absolute value.

    >>> gradient_x_activation(cnn, images, layer="features.8")
    """
    return _by_gradient(model, inputs, target, layer, positions, reduce, batch, lambda rows, grads: rows * grads)


def _by_gradient(model, inputs, target, layer, positions, reduce, batch, combine: Callable) -> Tensor:
    n = check(model, inputs, target)
    kept = []
    for chosen in batches(n, batch):
        part = forward.take(inputs, chosen)
        rows, grads = rows_and_gradients(model, part, target_of(target, chosen), layer, positions)
        kept.append(reduced(combine(rows, grads), reduce).cpu())
    return torch.cat(kept)


def rows_and_gradients(
    model: nn.Module, inputs: forward.Inputs, target: forward.Target, layer: str, positions: Any
) -> tuple[Tensor, Tensor]:
    """A layer's rows ``[N, P, F]`` and the derivative of the summed scores by them."""
    name = _one(layer)
    module = hooks.get_layer(model, name)
    leaves: list[Tensor] = []

    def cut(tensor: Tensor, module: nn.Module) -> Tensor:
        # a leaf of its own: nothing before the layer needs a graph, and no parameter needs a gradient
        leaves.append(tensor.detach().clone().requires_grad_())
        return leaves[-1].clone()

    undo = attach(module, "output", cut)
    try:
        # the recording is there for its errors: a layer that did not run, or ran twice
        with forward.evaluating(model), torch.enable_grad(), hooks.record(model, name, detach=False) as acts:
            score = forward.scores(forward.call(model, inputs), target)
            acts[name]
    finally:
        undo()
    n = forward.batch_size(inputs)
    check_axes(model, inputs, {name: leaves[0]}, n)
    where = site(module, name, leaves[0], positions, n)
    grad = None
    if score.requires_grad:
        (grad,) = torch.autograd.grad(score, leaves[0], torch.ones_like(score), allow_unused=True)
    if grad is None:
        raise ValueError(f"the score does not depend on layer {name!r}, so it has no gradient there")
    return where.rows(leaves[0].detach()), where.rows(grad)


@forward.outside_inference_mode
def conductance(
    model: nn.Module, inputs: forward.Inputs, target: forward.Target = None, *, layer: str,
    baseline: float | Tensor = 0.0, steps: int = 50, positions: Any = None, reduce: str | None = "sum",
    batch: int = 64, wrt: str | None = None,
) -> Tensor:  # fmt: skip
    """How much of the score's change from baseline to input flows through each neuron.

    ``Cond_j = integral over a in [0, 1] of dF/dy_j (x_a) * dy_j/da``, with ``x_a = baseline + a * (x - baseline)`` and
    y the layer; ``dy_j`` is taken as the difference of y between steps and ``dF/dy_j`` as the mean of its ends
    (trapezoidal rule). Where everything passes the layer, the neurons of all positions sum to F(x) - F(baseline).

    Args:
        target, layer, positions, reduce: as :func:`gradient_x_activation`; None is the class predicted for the input.
        baseline: a number or a tensor that broadcasts to the inputs.
        steps: intervals between baseline and input.
        batch: rows (an input at one step) a forward and backward.
        wrt: the tensor of a dict of inputs that is scaled; ``None``: its only floating one.

    Returns: ``[N, K]`` in the unit of the score; ``[N, P, K]`` with ``reduce=None``.

    Raises: as :func:`gradient_x_activation`; ValueError for ``steps`` below 1 or a baseline that does not fit.

    Source: Dhamdhere, Sundararajan, Yan 2018, arXiv 1805.12233, equation 3 (conductance of a hidden neuron).

    >>> conductance(cnn, images, layer="features.8", steps=50)
    """
    n = check(model, inputs, target)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be an int of at least 1, not {steps!r}")
    x, _ = explained(inputs, wrt)
    base = _baseline_like(x, baseline)
    kept = []
    for chosen in batches(n, batch):
        part = forward.take(inputs, chosen)
        with forward.evaluating(model), torch.no_grad():
            labels = forward.resolve_target(forward.call(model, part), target_of(target, chosen))
        total = _conductance(model, part, base[chosen], labels, layer, positions, steps, batch, wrt)
        kept.append(reduced(total, reduce).cpu())
    return torch.cat(kept)


def _conductance(model, inputs, base, labels, layer, positions, steps, batch, wrt) -> Tensor:
    x, rebuild = explained(inputs, wrt)
    n = x.shape[0]
    total, last = None, None
    for alphas in torch.linspace(0, 1, steps + 1, dtype=x.dtype, device=x.device).split(max(1, batch // n)):
        index = torch.arange(n, device=x.device).repeat(len(alphas))  # step by step, all examples in each
        points = torch.cat([base + a * (x - base) for a in alphas])
        target = target_of(labels, index)
        rows, grads = rows_and_gradients(model, rebuild(points, index), target, layer, positions)
        both = torch.stack([rows, grads]).unflatten(1, (len(alphas), n))
        both = both if last is None else torch.cat([last, both], 1)
        value, slope = both
        piece = ((value[1:] - value[:-1]) * (slope[1:] + slope[:-1]) / 2).sum(0)
        total, last = piece if total is None else total + piece, both[:, -1:]
    return total


def _baseline_like(x: Tensor, baseline: float | Tensor) -> Tensor:
    base = torch.as_tensor(baseline, dtype=x.dtype, device=x.device)
    if not torch.isfinite(base).all():
        raise NotFinite("the baseline holds NaN or infinite values")
    try:
        return base.expand(x.shape)
    except RuntimeError:
        raise ValueError(f"a baseline of shape {tuple(base.shape)} does not fit inputs {tuple(x.shape)}") from None


def _one(layer: str) -> str:
    if not isinstance(layer, str):
        raise TypeError(f"layer must be the dotted name of one layer, not {type(layer).__name__}")
    return layer
