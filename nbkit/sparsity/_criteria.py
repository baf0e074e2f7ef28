"""Pruning criteria: one score a weight, as ``{parameter name: tensor of its shape}`` on the CPU; large is important.

All take ``layers=`` and ``exclude=`` (see :func:`prunable`), leave the model as it was, and feed
:func:`mask_from_scores`. Those that need data run the model in evaluation mode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nbkit import forward, hooks
from nbkit.sparsity._weights import Names, attention_around, check_finite, n_outputs, prunable

Scores = dict[str, Tensor]
Loss = Callable[[object, forward.Target], Tensor]


def magnitude(model: nn.Module, *, layers: Names = None, exclude: Names = ()) -> Scores:
    """``|w|``. Raises: NotFinite for NaN or infinite weights; as :func:`prunable`.

    >>> mask_from_scores(magnitude(model), 0.9)
    """
    weights = _weights(model, layers, exclude)
    return {name: w.detach().abs().cpu() for name, w in weights.items()}


def random(model: nn.Module, seed: int = 0, *, layers: Names = None, exclude: Names = ()) -> Scores:
    """Uniform numbers in [0, 1), drawn on the CPU from ``seed`` alone: the same on every device.

    >>> mask_from_scores(random(model, seed=1), 0.9)
    """
    generator = torch.Generator().manual_seed(seed)
    weights = prunable(model, layers=layers, exclude=exclude)
    return {name: torch.rand(w.shape, generator=generator, dtype=torch.float64) for name, w in weights.items()}


def lamp(model: nn.Module, *, layers: Names = None, exclude: Names = ()) -> Scores:
    """``w² / sum of all w'² in the layer that are no smaller``: magnitudes made comparable between layers.

    The largest weight of every layer scores 1, so a global ranking empties no layer before all others. float64.

    Source: Lee et al. 2021, "Layer-adaptive sparsity for the magnitude-based pruning" (arXiv 2010.07611), the LAMP
    score. Raises: as :func:`magnitude`.
    """
    scores = {}
    for name, weight in _weights(model, layers, exclude).items():
        squares = weight.detach().reshape(-1).cpu().double().square()
        ordered, index = squares.sort(stable=True)
        tail = ordered.flip(0).cumsum(0).flip(0)
        score = torch.zeros_like(squares)
        score[index] = torch.where(tail > 0, ordered / tail, 0.0)
        scores[name] = score.reshape(weight.shape)
    return scores


@forward.outside_inference_mode
def snip(
    model: nn.Module, inputs: forward.Inputs, target: forward.Target = None, *, loss: Loss | None = None,
    batch: int = 128, layers: Names = None, exclude: Names = (),
) -> Scores:  # fmt: skip
    """Connection sensitivity ``|w * dL/dw|``, normalised to sum 1 over all weights; L is the mean loss over ``inputs``.

    ``inputs`` [N, ...] run ``batch`` at a time, which bounds memory and changes the result by rounding only.
    ``target``: classes (None takes the predicted ones) and L is the cross-entropy; or a callable on the output that
    gives [N] scores, and L is their mean. ``loss(output, target)`` gives another mean loss; ``target`` is then handed
    on, a slice of it where it is a tensor. A model with one output [N, 1] needs it: one class has a cross-entropy of 0.

    Raises: NotFinite, IndexError, ValueError, TypeError for bad inputs, targets or weights; as :func:`prunable`.

    Source: Lee, Ajanthan and Torr 2019, "SNIP" (arXiv 1810.02340), connection sensitivity.

    >>> mask_from_scores(snip(model, x, y), 0.95)
    """
    weights = _weights(model, layers, exclude)
    sums = _zeros(weights)
    for size, gradients in _gradients(model, weights, inputs, target, loss, batch):
        for name, gradient in gradients.items():
            sums[name].add_(gradient, alpha=size)
    scores = {name: (forward.wide(weights[name].detach()) * total).abs() for name, total in sums.items()}
    norm = sum(float(score.sum(dtype=torch.float64)) for score in scores.values())
    return {name: (score / norm if norm else score).cpu() for name, score in scores.items()}


@forward.outside_inference_mode
def taylor(
    model: nn.Module, inputs: forward.Inputs, target: forward.Target = None, *, loss: Loss | None = None,
    batch: int = 32, layers: Names = None, exclude: Names = (),
) -> Scores:  # fmt: skip
    """First-order Taylor importance ``(w * dL/dw)²``, L the mean loss of a mini-batch, averaged over mini-batches.

    An estimate of the squared change of the loss when the weight is set to 0. Here ``batch`` is part of the
    definition: gradients cancel within a mini-batch and not between them. One batch of all inputs ranks as
    :func:`snip`; ``batch=1`` squares every example's own gradient. Arguments and errors otherwise as :func:`snip`.

    Source: Molchanov et al. 2019, "Importance estimation for neural network pruning" (arXiv 1906.10771), the
    first-order criterion.

    >>> mask_from_scores(taylor(model, x, y, batch=16), 0.9)
    """
    weights = _weights(model, layers, exclude)
    sums, seen = _zeros(weights), 0
    for size, gradients in _gradients(model, weights, inputs, target, loss, batch):
        seen += size
        for name, gradient in gradients.items():
            sums[name].add_((gradient * forward.wide(weights[name].detach())).square(), alpha=size)
    return {name: (total / seen).cpu() for name, total in sums.items()}


@forward.outside_inference_mode
def logit_sensitivity(
    model: nn.Module, inputs: forward.Inputs, target: forward.Target = None, *, per: str = "weight",
    batch: int = 64, layers: Names = None, exclude: Names = (),
) -> Scores:  # fmt: skip
    """How much of the target's logit y flows through each weight, or each unit, over reference examples.

    ``per="weight"``: the mean over examples of ``|w * dy/dw|``, in the weight's shape. In a network of ReLUs this is
    the relevance that LRP-0 sends through the connection, since ``a_i w_ij dy/dz_j`` summed over positions is
    ``w_ij dy/dw_ij``. It needs each example's own gradient: one backward pass an example.

    ``per="unit"``: the mean over examples of ``|sum over positions of z_j dy/dz_j|``, gradient x activation of the
    layer's output z, as ``{parameter name: [units]}`` for :func:`structured`. Signed, the weights' relevances of a
    unit and its bias's sum to this. Batched, ``batch`` examples at a time. Layers that did not run score 0. For the
    ``out_proj`` of an ``nn.MultiheadAttention``, z is the attention's output.

    ``target``: None (predicted class), int, ints [N], or a callable on the output giving [N] scores.

    Not the criterion of Yeom et al. 2021, "Pruning by explaining" (arXiv 1912.08881): that is LRP with the z+ rule,
    started from the true class, summed over a unit with its sign; this is gradient times weight, absolute so that
    examples do not cancel. Raises: as :func:`snip`; ValueError for another ``per``.

    >>> mask_from_scores(logit_sensitivity(model, x[:100]), 0.9)
    """
    if per not in ("weight", "unit"):
        raise ValueError(f"per must be 'weight' or 'unit', not {per!r}")
    weights = _weights(model, layers, exclude)
    if per == "unit":
        return _unit_sensitivity(model, weights, inputs, target, batch)
    sums = _zeros(weights)
    score = _target_score
    for _, gradients in _gradients(model, weights, inputs, target, score, 1):
        for name, gradient in gradients.items():
            sums[name].add_((gradient * forward.wide(weights[name].detach())).abs())
    return {name: (total / forward.batch_size(inputs)).cpu() for name, total in sums.items()}


def _unit_sensitivity(
    model: nn.Module, weights: Mapping[str, nn.Parameter], inputs: forward.Inputs, target: forward.Target, batch: int
) -> Scores:
    names = {name: name.rpartition(".")[0] for name in weights}
    names = {name: attention_around(model, layer) or layer for name, layer in names.items()}
    sums = {name: torch.zeros(_units(hooks.get_layer(model, names[name]))) for name in weights}
    for rows, goal in _batches(model, inputs, target, batch):
        with forward.evaluating(model), torch.enable_grad(), forward.requiring_grad(weights.values(), True):
            with hooks.record(model, list(names.values()), detach=False, to=None) as outputs:
                score = forward.scores(forward.call(model, rows), goal).sum()
            ran = [name for name in names if names[name] in outputs]
            found = torch.autograd.grad(score, [outputs[names[n]] for n in ran], allow_unused=True)
        for name, gradient in zip(ran, found, strict=True):
            if gradient is not None:
                output, module = outputs[names[name]].detach(), hooks.get_layer(model, names[name])
                flow = forward.wide(output) * gradient
                if not getattr(module, "batch_first", True):  # attention over [T, N, F]
                    flow = flow.transpose(0, 1)
                axis = hooks.neuron_axis(flow, module)
                each = flow.movedim(axis, 1).flatten(2).sum(2) if flow.ndim > 2 else flow
                sums[name] += each.abs().sum(0).cpu()
    return {name: total / forward.batch_size(inputs) for name, total in sums.items()}


def _gradients(
    model: nn.Module, weights: Mapping[str, nn.Parameter], inputs: forward.Inputs, target: forward.Target,
    loss: Loss | None, batch: int,
) -> Iterator[tuple[int, Scores]]:  # fmt: skip
    """For each batch its size and the gradient of its mean loss in every weight (0 where the loss does not use it)."""
    loss = loss or _mean_loss
    for rows, goal in _batches(model, inputs, target, batch, resolve=loss in (_mean_loss, _target_score)):
        with forward.evaluating(model), torch.enable_grad(), forward.requiring_grad(weights.values(), True):
            value = loss(forward.call(model, rows), goal)
            if not isinstance(value, Tensor) or value.numel() != 1:
                raise ValueError("loss(output, target) must return one number, a tensor of one element")
            scale = _LOSS_SCALE if _is_half(weights) else 1.0
            found = torch.autograd.grad(scale * value.squeeze(), list(weights.values()), allow_unused=True)
        pairs = zip(weights.items(), found, strict=True)
        gradients = {n: torch.zeros_like(forward.wide(w)) if g is None else forward.wide(g) for (n, w), g in pairs}
        if scale != 1:
            gradients = {name: gradient / scale for name, gradient in gradients.items()}
        check_finite(gradients, "the gradient of")
        yield forward.batch_size(rows), gradients


def _batches(
    model: nn.Module, inputs: forward.Inputs, target: forward.Target, batch: int, resolve: bool = True
) -> Iterator[tuple[forward.Inputs, forward.Target]]:
    forward.check_inputs(inputs)
    forward.check_device(model, inputs)
    if batch < 1:
        raise ValueError(f"batch must be at least 1, not {batch}")
    n = forward.batch_size(inputs)
    if isinstance(target, Tensor) and target.ndim and len(target) != n:
        raise ValueError(f"target holds {len(target)} values for {n} inputs")
    for start in range(0, n, batch):
        part = slice(start, min(start + batch, n))
        rows = forward.take(inputs, part)
        goal = target[part] if isinstance(target, Tensor) and target.ndim else target
        if resolve and goal is None:
            with forward.evaluating(model), torch.no_grad():
                goal = forward.resolve_target(forward.call(model, rows), None)
        yield rows, goal


def _mean_loss(output: object, target: forward.Target) -> Tensor:
    target = forward.resolve_target(output, target)
    if callable(target):
        return forward.scores(output, target).mean()
    logits = forward.first_tensor(output)
    if logits.shape[1] == 1:
        raise ValueError(
            "the model has one output: pass loss= (one class has a cross-entropy of 0), or a callable target"
        )
    return F.cross_entropy(forward.wide(logits), target)


def _target_score(output: object, target: forward.Target) -> Tensor:
    return forward.scores(output, target).mean()


_LOSS_SCALE = 256.0  # gradients in half precision vanish below 6e-8 and overflow above 65,504


def _is_half(weights: Mapping[str, Tensor]) -> bool:
    return any(weight.dtype == torch.float16 for weight in weights.values())


def _zeros(weights: Mapping[str, Tensor]) -> Scores:
    """Sums that hold small numbers: float32 or better, whatever the weights are."""
    return {name: torch.zeros_like(forward.wide(w)) for name, w in weights.items()}


def _weights(model: nn.Module, layers: Names, exclude: Names) -> dict[str, nn.Parameter]:
    weights = prunable(model, layers=layers, exclude=exclude)
    check_finite(weights, "weight")
    return weights


def _units(module: nn.Module) -> int:
    return module.embed_dim if isinstance(module, nn.MultiheadAttention) else n_outputs(module)
