"""How well a model does on a set, and what a set must look like."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from numbers import Integral

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nbkit import forward

Pair = tuple[forward.Inputs, Tensor]


@forward.outside_inference_mode
@torch.no_grad()
def evaluate(
    model: nn.Module, x: forward.Inputs, y: Tensor, *, loss: Callable = F.cross_entropy, batch: int = 512
) -> tuple[float, float]:
    """Mean loss and accuracy in evaluation mode, ``batch`` examples at a time.

    The accuracy is the fraction of integer targets, of the shape of the output's rows (``[N]`` for logits ``[N, C]``,
    ``[N, T]`` for ``[N, T, C]``), at which the largest logit is; a single logit means class 1 where it is above 0.
    NaN where targets are not classes: floating ones and, under a loss of your own, integers out of range.

    Raises: ValueError (no data, different lengths, targets of another shape, a bad batch), IndexError (a class label
    out of range), NotFinite.

    >>> from nbkit.models import build
    >>> mean, right = evaluate(build("lenet-300-100", seed=0), torch.rand(8, 784), torch.arange(8))
    """
    x, y = check_pair((x, y), "data")
    check_whole(batch=batch)
    device = next(model.parameters()).device
    total, right = 0.0, 0.0
    with forward.evaluating(model):
        for start in range(0, len(y), batch):
            part = slice(start, start + batch)
            yb = y[part].to(device)
            out = forward.logits(model, moved(forward.take(x, part), device))
            right += count_right(out, yb, loss)
            total += loss(out, yb).item() * len(yb)
    return total / len(y), right / y.numel()


def accuracy(model: nn.Module, x: forward.Inputs, y: Tensor, *, batch: int = 512) -> float:
    """The accuracy of :func:`evaluate`, alone. Raises as it does.

    >>> from nbkit.models import build
    >>> 0 <= accuracy(build("lenet-300-100", seed=0), torch.rand(8, 784), torch.arange(8)) <= 1
    True
    """
    return evaluate(model, x, y, loss=_no_loss, batch=batch)[1]


def _no_loss(out: Tensor, y: Tensor) -> Tensor:
    return out.new_zeros(())


def count_right(out: Tensor, y: Tensor, loss: Callable) -> float:
    """How many of the targets are the class that ``out`` says; NaN where they are not classes."""
    if y.is_floating_point():
        return math.nan
    rows = out.shape if out.ndim == 1 else out.shape[:-1]
    single = out.ndim == 1 or out.shape[-1] == 1
    if y.shape != rows and not (single and y.shape == (*rows, 1)):
        raise ValueError(
            f"targets of shape {tuple(y.shape)} do not fit an output of shape {tuple(out.shape)}: "
            f"accuracy needs one class a row, {tuple(rows)}"
        )
    if not labels_in_range(y, 2 if single else out.shape[-1], strict=loss in (F.cross_entropy, _no_loss)):
        return math.nan
    predicted = (out > 0).reshape(y.shape) if single else out.argmax(-1)
    return (predicted == y).sum().item()


def labels_in_range(y: Tensor, classes: int, *, strict: bool) -> bool:
    """Whether all labels are among the classes; with ``strict``, IndexError where they are not."""
    low, high = int(y.min()), int(y.max())
    if strict and not 0 <= low <= high < classes:
        raise IndexError(f"labels run from {low} to {high}; the model has classes 0 to {classes - 1}")
    return 0 <= low <= high < classes


def check_pair(pair: Pair, name: str) -> Pair:
    """``pair`` as (x, y) with finite inputs and as many targets. Raises: TypeError, ValueError, NotFinite."""
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise TypeError(f"{name} must be a pair (x, y), not {type(pair).__name__}")
    x, y = pair
    if not isinstance(y, Tensor):
        raise TypeError(f"{name}: y must be a tensor, not {type(y).__name__}")
    forward.check_inputs(x, name=f"{name}: x")
    if forward.batch_size(x) != len(y):
        raise ValueError(f"{name}: {forward.batch_size(x)} inputs but {len(y)} targets")
    return x, y


def check_whole(**numbers: int) -> None:
    """Raise ValueError, naming it, for a number that is no int of at least 1."""
    for name, value in numbers.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")


def moved(inputs: forward.Inputs, device: torch.device) -> forward.Inputs:
    """``inputs`` on ``device``, for a tensor or a dict of tensors alike."""
    if isinstance(inputs, Mapping):
        return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    return inputs.to(device)
