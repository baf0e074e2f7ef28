"""Class activation maps: where in a convolutional layer the evidence for a class lies."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nbkit import forward, hooks
from nbkit._rows import batches, check_target, target_of
from nbkit.attribution._autograd import gradient_of
from nbkit.attribution._guided import guided_backprop

Size = int | tuple[int, int] | None


@forward.outside_inference_mode
def grad_cam(
    model: nn.Module,
    inputs: forward.Inputs,
    target: forward.Target = None,
    *,
    layer: str,
    relu: bool = True,
    negate: bool = False,
    size: Size = None,
    with_weights: bool = False,
    batch: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The feature maps of a layer, weighted by the mean gradient of the target's score, summed over channels.

    One forward, and one backward from the score down to the layer and no further.

    Args:
        layer: dotted name of a layer that puts out ``[N, K, h, w]``, usually the last activation before pooling. A
            layer that runs more than once is taken at its last run.
        relu: keep only what raises the score. ``False`` gives the signed map.
        negate: the counterfactual map: where the evidence *against* the target lies.
        size: upsample to ``(H, W)`` (see :func:`upsample`); ``None`` stays at the layer's resolution.
        with_weights: also return the channel weights ``alpha`` ``[N, K]``, the importance of each channel.
        batch: examples in one pass; ``None``: all.

    Returns: maps ``[N, h, w]`` (or ``[N, H, W]``) on the CPU. A map without any positive evidence is zero
    everywhere, and a warning names its example.

    Raises: LayerNotFound; LayerDidNotRun; ValueError where the layer's output is not ``[N, K, h, w]`` or is 1 x 1
    (pooled: no place is left to find); TypeError, NotFinite, IndexError for bad inputs and targets.

    Source: R. Selvaraju et al., *Grad-CAM*, 2017, equations 1 and 2, with the mean (1/Z) of equation 1.

    >>> grad_cam(model, images, target=3, layer="features.28", size=(224, 224))
    """
    return _cam(model, inputs, target, layer, _mean_gradient, relu, negate, size, with_weights, batch)


@forward.outside_inference_mode
def grad_cam_plus_plus(
    model: nn.Module,
    inputs: forward.Inputs,
    target: forward.Target = None,
    *,
    layer: str,
    relu: bool = True,
    negate: bool = False,
    size: Size = None,
    with_weights: bool = False,
    batch: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Grad-CAM with channel weights that count each place of evidence alike, so that several objects show.

    With ``g`` the gradient at a place, the weight of a channel is ``sum of relu(g) * g^2 / (2 g^2 + sum(A) g^3)``. The
    paper explains ``exp(score)``; its factor ``exp(score)`` is the same for the whole map and is left out.

    Arguments, result and errors as in :func:`grad_cam`.

    Source: A. Chattopadhay et al., *Grad-CAM++*, 2018, equations 5 and 19.

    >>> grad_cam_plus_plus(model, images, layer="features.28")
    """
    return _cam(model, inputs, target, layer, _plus_plus, relu, negate, size, with_weights, batch)


@forward.outside_inference_mode
def guided_grad_cam(
    model: nn.Module,
    inputs: Tensor,
    target: forward.Target = None,
    *,
    layer: str,
    batch: int | None = None,
    wrt: str | None = None,
) -> Tensor:
    """Guided backpropagation times the upsampled Grad-CAM: fine detail, only where the class has evidence.

    Returns: a CPU tensor shaped like ``inputs`` ``[N, C, H, W]``. Errors as in :func:`grad_cam` and
    :func:`guided_backprop`.

    Source: R. Selvaraju et al., *Grad-CAM*, 2017, section 3.2.

    >>> guided_grad_cam(model, images, target=3, layer="features.28")
    """
    detail = guided_backprop(model, inputs, target, batch=batch, wrt=wrt)
    if detail.ndim != 4:
        raise ValueError(f"guided_grad_cam explains pictures [N, C, H, W], not inputs of shape {tuple(detail.shape)}")
    coarse = grad_cam(model, inputs, target, layer=layer, size=tuple(detail.shape[-2:]), batch=batch)
    return detail * coarse[:, None].to(detail.dtype)


def upsample(maps: Tensor, size: int | tuple[int, int], *, mode: str = "bilinear") -> Tensor:
    """Maps ``[N, h, w]`` at the resolution ``size`` ``(H, W)``: each value keeps its place, at the middle of its cell.

    Interpolating with aligned corners would shift a maximum by up to half a cell. ``mode``: ``"bilinear"``,
    ``"bicubic"`` or ``"nearest"``. Raises ValueError for maps of another shape or another mode.

    >>> upsample(maps, (224, 224)).shape
    """
    if maps.ndim != 3:
        raise ValueError(f"maps must be [N, h, w], not {tuple(maps.shape)}")
    if mode not in ("bilinear", "bicubic", "nearest"):
        raise ValueError(f"mode must be 'bilinear', 'bicubic' or 'nearest', not {mode!r}")
    corners = None if mode == "nearest" else False
    return F.interpolate(maps[:, None], size=size, mode=mode, align_corners=corners)[:, 0]


def normalize(maps: Tensor) -> Tensor:
    """Each map of ``[N, ...]`` divided by its own largest magnitude, for display; a map of zeros stays zero.

    >>> normalize(grad_cam(model, images, layer="features.28")).amax((1, 2))
    """
    largest = maps.abs().flatten(1).amax(1).view([-1] + [1] * (maps.ndim - 1))
    return maps / largest.masked_fill(largest == 0, 1)


def _mean_gradient(activation: Tensor, gradient: Tensor) -> Tensor:
    return gradient.mean((2, 3))


def _plus_plus(activation: Tensor, gradient: Tensor) -> Tensor:
    square = gradient**2
    below = 2 * square + activation.sum((2, 3), keepdim=True) * square * gradient
    share = torch.where(below != 0, square / below.masked_fill(below == 0, 1), 0)
    return (share * gradient.clamp(min=0)).sum((2, 3))


def _cam(
    model: nn.Module,
    inputs: forward.Inputs,
    target: forward.Target,
    layer: str,
    channel_weights: Callable[[Tensor, Tensor], Tensor],
    relu: bool,
    negate: bool,
    size: Size,
    with_weights: bool,
    batch: int | None,
) -> Tensor | tuple[Tensor, Tensor]:
    hooks.get_layer(model, layer)
    forward.check_inputs(inputs)
    forward.check_device(model, inputs)
    n = forward.batch_size(inputs)
    check_target(target, n)
    maps, alphas = [], []
    for part in batches(n, batch):
        chosen = inputs if part == slice(0, n) else forward.take(inputs, part)
        activation, gradient = _tail_gradient(model, chosen, target_of(target, part), layer)
        alpha = channel_weights(activation, -gradient if negate else gradient)
        maps.append(torch.einsum("nk,nkhw->nhw", alpha, activation).cpu())
        alphas.append(alpha.cpu())
    maps, alphas = torch.cat(maps), torch.cat(alphas)
    if relu:
        maps = maps.clamp(min=0)
        _report_empty(maps, layer)
    if size is not None:
        maps = upsample(maps, size)
    return (maps, alphas) if with_weights else maps


def _tail_gradient(
    model: nn.Module, inputs: forward.Inputs, target: forward.Target, layer: str
) -> tuple[Tensor, Tensor]:
    """What ``layer`` puts out, ``[N, K, h, w]``, and the gradient of the score with respect to it."""
    taps: list[Tensor] = []

    def tap(tensor: Tensor) -> Tensor:
        if tensor.ndim != 4:
            raise ValueError(f"layer {layer!r} puts out {tuple(tensor.shape)}; a map needs [N, K, h, w]")
        if tensor.shape[2] * tensor.shape[3] == 1:
            raise ValueError(f"layer {layer!r} puts out 1 x 1 maps, where nothing can be located")
        # the forward up to here ran without a graph; from here on autograd records, starting from this leaf
        torch.set_grad_enabled(True)
        taps[:] = [tensor.detach().requires_grad_()]
        return taps[0]  # replace hands on a copy: an in-place activation may follow, and a leaf cannot be overwritten

    # no_grad ends what the tap turned on, so that the caller gets back the mode it had
    with forward.evaluating(model), torch.no_grad():
        with hooks.edit(model, {layer: hooks.replace(tap)}):
            score = forward.scores(forward.call(model, inputs), target)
        return taps[0].detach(), gradient_of(score, taps[0], f"layer {layer!r}")


def _report_empty(maps: Tensor, layer: str) -> None:
    empty = torch.nonzero(maps.flatten(1).amax(1) == 0).flatten().tolist()
    if empty:
        warnings.warn(
            f"examples {empty}: the map at layer {layer!r} is zero everywhere, since every weighted sum is negative or "
            "zero; relu=False shows the signed map",
            stacklevel=5,
        )
