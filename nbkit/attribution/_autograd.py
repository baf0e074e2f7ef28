"""Gradients with respect to inputs and nothing else: no parameter takes part, no ``.grad`` is written.

A backward pass for the inputs alone needs less than autograd keeps for it. The gradient of a convolution with respect
to its input needs the weights but not the input; that of a BatchNorm in evaluation mode is a factor a channel, which
goes into the weights of the convolution before it. So :class:`_Lean` keeps neither their inputs nor the pass over the
maps that BatchNorm would take. Forward values are the very same; gradients differ in the last digits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import grad as nn_grad

from nbkit import forward
from nbkit.attribution._functions import Rules, transparent

_WORTH = 2**19  # input numbers, 4 pictures of 3 x 224 x 224: below, the calls into Python cost more than they save
_CONVOLUTIONS = {
    "conv1d": nn_grad.conv1d_input,
    "conv2d": nn_grad.conv2d_input,
    "conv3d": nn_grad.conv3d_input,
}
_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


@contextmanager
def differentiating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode with autograd on, also inside the caller's ``no_grad``, and parameters outside the graph."""
    with forward.evaluating(model), torch.enable_grad(), forward.requiring_grad(model.parameters(), False):
        yield


def input_gradient(
    model: nn.Module,
    put: Callable[[Tensor, Tensor], Any],
    rows: Tensor,
    index: Tensor,
    target: forward.Target,
    rules: Callable[[], Any] | None = None,
) -> Tensor:
    """Gradient of each row's score with respect to that row, shaped like ``rows``; ``rules`` guard the forward.

    Raises: ValueError where the score does not depend on the rows through differentiable operations.
    """
    leaf = rows.detach().requires_grad_()
    if rules is None:
        rules = _Lean if rows.numel() >= _WORTH and all(map(transparent, model.modules())) else nullcontext
    with rules():
        output = forward.call(model, put(leaf, index))
    return gradient_of(forward.scores(output, target), leaf, "the inputs")


def gradient_of(score: Tensor, leaf: Tensor, what: str) -> Tensor:
    if not score.requires_grad:
        raise ValueError(f"the score does not depend on {what} through differentiable operations")
    return torch.autograd.grad(score, leaf, torch.ones_like(score))[0]


class _Lean(Rules):
    def __init__(self) -> None:
        super().__init__()
        self._last: tuple | None = None  # the latest convolution: its output, that one's version, its input, backward

    def apply(self, name: str, func: Any, args: tuple, kwargs: dict) -> Any:
        if name in _CONVOLUTIONS:
            return self._convolution(name, func, dict(zip(_ARGUMENTS, args, strict=False)) | kwargs)
        if name == "batch_norm":
            return self._batch_norm(func, *args, **kwargs)
        return func(*args, **kwargs)

    def _convolution(self, name: str, func: Any, given: dict) -> Tensor:
        x, weight = given["input"], given["weight"]
        frozen = not weight.requires_grad and (given.get("bias") is None or not given["bias"].requires_grad)
        batched = x.ndim == weight.ndim and not isinstance(given.get("padding"), str)
        if not (x.requires_grad and frozen and batched):
            return func(**given)
        shape, rest = x.shape, {k: v for k, v in given.items() if k not in ("input", "weight", "bias")}

        def back(gradient: Tensor, scale: Tensor | None = None) -> Tensor:
            w = weight if scale is None else weight * scale.view([-1] + [1] * (weight.ndim - 1))
            return _CONVOLUTIONS[name](shape, w, gradient, **rest)

        output = _Known.apply(x, lambda: func(**given), back)
        self._last = (output, output._version, x, back)
        return output

    def _batch_norm(
        self, func: Any, input: Tensor, mean: Tensor | None, var: Tensor | None, weight: Tensor | None = None,
        bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
    ) -> Tensor:  # fmt: skip
        last, self._last = self._last, None
        plain = training or any(t is not None and t.requires_grad for t in (weight, bias))
        if plain or last is None or last[0] is not input or last[1] != input._version:
            return func(input, mean, var, weight, bias, training, momentum, eps)
        scale = torch.rsqrt(var + eps) * (1 if weight is None else weight)
        value, *_, x, back = last
        return _Known.apply(
            x,
            lambda: func(value.detach(), mean, var, weight, bias, training, momentum, eps),
            lambda gradient: back(gradient, scale),
        )


class _Known(torch.autograd.Function):
    """A function of ``x`` with the value ``run()`` and the backward ``back(gradient)``."""

    @staticmethod
    def forward(ctx, x: Tensor, run: Callable[[], Tensor], back: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.back = back
        return run()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return ctx.back(gradient), None, None
