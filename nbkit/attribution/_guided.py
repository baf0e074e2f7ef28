"""Guided backpropagation: gradients that pass a ReLU only where both the input and the gradient are positive."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from nbkit import forward
from nbkit._rows import batches, check_target, explained, target_of
from nbkit.attribution._autograd import differentiating, input_gradient
from nbkit.attribution._functions import LocatedRules, finish

# activations that let negative values or negative slopes through: the rule, a mask of two signs, is not defined there
_NO_RULE = {
    "celu", "elu", "gelu", "glu", "hardswish", "leaky_relu", "log_sigmoid", "mish", "prelu", "rrelu", "selu", "silu",
    "softplus",
}  # fmt: skip


@forward.outside_inference_mode
def guided_backprop(
    model: nn.Module,
    inputs: forward.Inputs,
    target: forward.Target = None,
    *,
    batch: int | None = None,
    wrt: str | None = None,
) -> Tensor:
    """The input gradient with every ReLU passing back only positive gradients, of positive inputs.

    At a ReLU with input ``x`` and incoming gradient ``R``: ``R * [x > 0] * [R > 0]``; at a ReLU6 the first mask is
    ``[0 < x < 6]``, its own gradient's. The forward is unchanged. ReLUs are found where they are applied, so functional
    calls (``F.relu``, ``x.clamp(min=0)``) count as well as modules, and the model is not touched. captum hooks modules
    of type ``nn.ReLU`` and nothing else: on a network of ReLU6, such as EfficientNet-Lite0, what it calls guided
    backpropagation is the plain gradient.

    Arguments and result as in :func:`saliency`.

    Raises: TypeError for a network with an activation that has no guided rule (SiLU, GELU, LeakyReLU ...), without
    any ReLU, or scripted; and as :func:`saliency`.

    Source: J. Springenberg et al., *Striving for Simplicity*, 2014, section 3.4.

    >>> guided_backprop(model, images, target=3)
    """
    x, put = explained(inputs, wrt)
    forward.check_device(model, inputs)
    check_target(target, x.shape[0])
    rules, gradients = _GuidedRules(model), []
    with differentiating(model):
        for part in batches(x.shape[0], batch):
            index = torch.arange(part.start, part.stop, device=x.device)
            gradient = input_gradient(model, put, x[part], index, target_of(target, part), rules.running)
            gradients.append(gradient.cpu())
    if not rules.met:
        raise TypeError(f"no ReLU ran in {type(model).__name__}, so there is nothing to guide; see saliency")
    return torch.cat(gradients)


class _GuidedRules(LocatedRules):
    met = False

    def apply(self, name: str, func: Any, args: tuple, kwargs: dict) -> Any:
        if name in _NO_RULE:
            self.refuse(f"guided backpropagation is defined for ReLU, not for {name}")
        top = relu_ceiling(name, args, kwargs)
        if top is None:
            if _masks_itself(name, args):
                self.refuse(f"a ReLU spelled as {name}() has no guided rule; write torch.relu")
            return func(*args, **kwargs)
        self.met = True
        return finish(func, args, kwargs, _GuidedReLU.apply(args[0], top))


def _zeros(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.requires_grad and not value.any()


def _masks_itself(name: str, args: tuple) -> bool:
    """Whether this is ``where(x > 0, x, 0)``, ``x * (x > 0)`` or ``maximum(0, x)``."""
    if len(args) < 2 or not isinstance(args[1], Tensor):
        return False
    if name in ("maximum", "max"):
        return _zeros(args[0]) and _varies(args[1])
    if name == "where" and len(args) == 3:
        mask, x = args[:2]
    elif name in ("mul", "__mul__", "multiply"):
        x, mask = args
    else:
        return False
    same = isinstance(x, Tensor) and isinstance(mask, Tensor) and _varies(x) and mask.shape == x.shape
    return same and not mask.requires_grad and torch.equal(mask.to(x.dtype), (x > 0).to(x.dtype))


def relu_ceiling(name: str, args: tuple, kwargs: dict) -> float | None:
    """Where the call is a ReLU: the value it is cut off at (6 for ReLU6, else infinity); ``None`` where it is not."""
    if name == "relu":
        return math.inf
    if name == "relu6":
        return 6.0
    if name in ("threshold", "_threshold") and list(args[1:3]) == [0, 0] and _varies(args[0]):
        return math.inf
    if name in ("maximum", "max") and len(args) == 2 and _varies(args[0]) and _zeros(args[1]):
        return math.inf
    if name in ("hardtanh", "clamp", "clip", "clamp_min"):
        names = {"hardtanh": ("min_val", "max_val"), "clamp_min": ("min",)}.get(name, ("min", "max"))
        given = {**dict(zip(names, args[1:], strict=False)), **kwargs}
        low = given.get(names[0], -1.0 if name == "hardtanh" else None)
        high = given.get(names[1], 1.0 if name == "hardtanh" else None) if len(names) > 1 else None
        if isinstance(low, (int, float)) and low == 0 and not isinstance(high, Tensor) and _varies(args[0]):
            return math.inf if high is None else float(high)
    return None


def _varies(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


class _GuidedReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, top: float) -> Tensor:
        ctx.save_for_backward((x > 0) & (x < top))
        return x.clamp(0, top)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (passes,) = ctx.saved_tensors
        return gradient.clamp(min=0) * passes, None
