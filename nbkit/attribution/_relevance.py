"""Layer-wise relevance propagation: a score handed back from layer to layer, each giving to its inputs in proportion.

How it is computed: relevance is written as ``R = value * G``. Then most operations (sums, means, pooling, reshapes)
redistribute relevance in proportion by passing ``G`` back as an ordinary gradient, and only linear layers and
activations need another backward than their own. So the model runs once with those functions replaced, and autograd
does the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nbkit import forward, hooks
from nbkit._rows import batches, check_target, explained, target_of
from nbkit.attribution._autograd import differentiating
from nbkit.attribution._functions import LocatedRules, finish, writes_in_place
from nbkit.attribution._guided import relu_ceiling
from nbkit.errors import LayerDidNotRun, LayerNotFound, did_you_mean
from nbkit.hooks._attach import attach

RULES = ("epsilon", "gamma", "zplus")

_LINEAR = {"linear", "conv1d", "conv2d", "conv3d"}
_PASSED_ON = {"tanh", "leaky_relu", "hardtanh"}  # and ReLU in all its spellings
_IN_PROPORTION = {
    "add", "sub", "neg", "sum", "mean", "cat", "concat", "stack", "dropout", "dropout1d", "dropout2d", "dropout3d",
    "alpha_dropout", "feature_dropout", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d",
    "adaptive_avg_pool2d", "adaptive_avg_pool3d", "max_pool1d", "max_pool2d", "max_pool3d", "adaptive_max_pool1d",
    "adaptive_max_pool2d", "adaptive_max_pool3d", "max", "amax", "flatten", "unflatten", "view", "view_as", "reshape",
    "reshape_as", "permute", "transpose", "swapaxes", "movedim", "moveaxis", "squeeze", "unsqueeze", "expand",
    "expand_as", "repeat", "split", "chunk", "unbind", "select", "narrow", "index_select", "contiguous", "clone",
    "identity", "pad", "to", "float", "double", "type_as", "roll", "flip", "pixel_shuffle", "pixel_unshuffle",
    "copy", "__add__", "__radd__", "__iadd__", "__sub__", "__rsub__", "__isub__", "__neg__", "__getitem__", "__get__",
}  # fmt: skip
_SCALED = {
    "mul", "div", "true_divide", "multiply", "divide", "__mul__", "__rmul__", "__imul__", "__truediv__", "__itruediv__",
}  # fmt: skip


@forward.outside_inference_mode
def layer_relevance(
    model: nn.Module,
    inputs: forward.Inputs,
    target: forward.Target = None,
    *,
    layer: str | Iterable[str] | None = None,
    rule: str | Mapping[str, str] = "epsilon",
    epsilon: float = 1e-6,
    gamma: float = 0.25,
    bias: bool = True,
    batch: int | None = None,
    wrt: str | None = None,
) -> Tensor | dict[str, Tensor]:
    """The relevance of every input, or of every neuron of a layer, for the target's score.

    A linear layer ``z_j = sum_i a_i w_ij + b_j`` hands its relevance ``R_j`` to its inputs by one of three rules:

    - ``"epsilon"``: in proportion to ``a_i w_ij``; the denominator is ``z_j + epsilon * sign(z_j)``.
    - ``"gamma"``: in proportion to ``a_i w_ij + gamma * max(a_i w_ij, 0)``.
    - ``"zplus"`` (alpha 1, beta 0): in proportion to ``max(a_i w_ij, 0)``.

    A BatchNorm that directly follows a linear layer is folded into it, so the rules see the signs of the weights that
    act; elsewhere it is a linear layer of one weight a channel. ReLU, ReLU6, LeakyReLU and tanh pass relevance on, max
    pooling gives it to the winner, sums (residual additions), means and average pooling divide it in proportion.

    Args:
        layer: where to read the relevance: ``None`` the inputs, a layer's name, or several (a dict comes back). The
            relevance of a layer is that of its output; of a convolution before a BatchNorm, that of the folded pair.
        rule: one rule for all, or a mapping from layer names or class names to rules, the others being ``"epsilon"``:
            ``{"Conv2d": "zplus", "Linear": "epsilon"}``.
        epsilon: stabiliser of every denominator, in the units of the activations.
        bias: let the bias take its share, which is then lost. ``False`` leaves it out of the denominators: every
            unit then hands all of its relevance to its inputs, in proportion to what they contribute, and these sum to
            the score but for one loss. Nobody contributes to a unit that lives on its bias alone (as where a picture is
            black) or, with ``"zplus"``, has no positive contribution: what reaches it is lost. With ``"epsilon"``
            contributions of both signs may nearly cancel, and their relevances are then huge. Only with ``bias=True``
            is ``"epsilon"`` input times gradient, in a network of linear layers, ReLUs and max pooling.
        batch: examples in one pass; ``None``: all.
        wrt: the tensor of a dict of inputs that is explained; ``None``: its only floating one.

    Returns: a CPU tensor shaped like ``inputs`` or like the layer's output, signed; a dict of them for several layers.
    The relevance at the output is the score itself.

    Raises: TypeError for a function without a rule (softmax, GELU, a product of two activations ...), naming it and
    the layer; LayerNotFound, LayerDidNotRun; ValueError for an unknown rule or a layer that ran twice in one pass.

    Source: S. Bach et al., *On Pixel-Wise Explanations*, 2015, equations 58 to 60; G. Montavon et al., *Layer-Wise
    Relevance Propagation: An Overview*, 2019, section 10.2 (gamma) and 10.3 (the gradient form).

    >>> layer_relevance(model, images, target=3, rule="zplus", bias=False).sum((1, 2, 3))
    """
    rule = _checked_rules(model, rule, epsilon, gamma)
    names = [] if layer is None else hooks.resolve(model, layer)
    x, put = explained(inputs, wrt)
    forward.check_device(model, inputs)
    check_target(target, x.shape[0])
    parts: list[list[Tensor]] = []
    with differentiating(model):
        for part in batches(x.shape[0], batch):
            rules = _RelevanceRules(model, rule, epsilon, gamma, bias)
            index = torch.arange(part.start, part.stop, device=x.device)
            parts.append(_one_pass(rules, put, x[part], index, target_of(target, part), names))
    relevances = [torch.cat(pieces) for pieces in zip(*parts, strict=True)]
    if layer is None or isinstance(layer, str) and names == [layer]:
        return relevances[0]
    return dict(zip(names, relevances, strict=True))


def _one_pass(
    rules: _RelevanceRules, put: Callable, rows: Tensor, index: Tensor, target: forward.Target, names: list[str]
) -> list[Tensor]:
    leaf = rows.requires_grad_()
    with rules.running(), ExitStack() as stack:
        for name in names:
            module = hooks.get_layer(rules.model, name)
            stack.callback(attach(module, "output", partial(rules.capture, name)))
        output = forward.call(rules.model, put(leaf, index))
    score = forward.scores(output, target)
    if not score.requires_grad:
        raise ValueError("the score does not depend on the inputs through differentiable operations")
    places = [rules.captured(name) for name in names] or [leaf]
    gradients = torch.autograd.grad(score.sum(), places, materialize_grads=True)
    return [(place.detach() * gradient).cpu() for place, gradient in zip(places, gradients, strict=True)]


@dataclass
class _LinearCall:
    """A linear layer that ran: what a BatchNorm after it needs to be folded in."""

    op: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    a: Tensor
    weight: Tensor
    bias: Tensor | None
    rule: str
    folded: Tensor | None = None


class _RelevanceRules(LocatedRules):
    def __init__(self, model: nn.Module, rule: str | Mapping[str, str], epsilon: float, gamma: float, bias: bool):
        super().__init__(model)
        self.rule, self.epsilon, self.gamma, self.bias = rule, epsilon, gamma, bias
        self._made: dict[int, tuple[Tensor, _LinearCall]] = {}  # by id; the tensor is held so that its id stays taken
        self._captured: dict[str, tuple[Tensor, _LinearCall | None]] = {}

    def apply(self, name: str, func: Any, args: tuple, kwargs: dict) -> Any:
        varying = sum(t.requires_grad for t in _tensors((args, kwargs)))
        if not varying:
            return func(*args, **kwargs)
        if name in _LINEAR:
            return self._linear(func, *args, **kwargs)
        if name == "batch_norm":
            return self._batch_norm(func, *args, **kwargs)
        if name in _PASSED_ON or relu_ceiling(name, args, kwargs) is not None:
            return finish(func, args, kwargs, _passed_on(func, args, kwargs))
        if writes_in_place(func, kwargs):
            self._made.pop(id(args[0]), None)  # no longer what the linear layer put out
        result = func(*args, **kwargs)
        known = name in _IN_PROPORTION or (name in _SCALED and varying == 1)
        if not known and any(t.requires_grad for t in _tensors(result)):
            what = f"a product of two activations ({name})" if name in _SCALED else name
            self.refuse(f"relevance propagation has no rule for {what}")
        return result

    def _linear(self, func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None, *rest, **options) -> Tensor:
        if weight.requires_grad:
            self.refuse("relevance propagation has no rule for weights that depend on the inputs")

        def op(a: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
            return func(a, w, b, *rest, **options)

        with torch.no_grad():
            z = op(input, weight, bias)
        call = _LinearCall(op, input, weight, bias, self._rule_here())
        output = self._redistributed(z, op, input, weight, bias, call.rule)
        self._made[id(output)] = (output, call)
        return output

    def _batch_norm(
        self, func: Any, input: Tensor, mean: Tensor | None, var: Tensor | None, weight: Tensor | None = None,
        bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
    ) -> Tensor:  # fmt: skip
        if training or mean is None or var is None:
            self.refuse("relevance propagation needs a BatchNorm with running statistics")
        scale = torch.rsqrt(var + eps) * (1 if weight is None else weight)
        shift = (0 if bias is None else bias) - mean * scale
        with torch.no_grad():
            z = func(input, mean, var, weight, bias, training, momentum, eps)
        _, call = self._made.get(id(input), (None, None))
        if call is None or (call.weight.ndim == 2 and input.ndim != 2):  # a Linear over tokens: other axes
            shape = [1, -1] + [1] * (input.ndim - 2)
            return self._redistributed(z, _scaled, input, scale.view(shape), shift.view(shape), self._rule_here())
        w = call.weight * scale.view([-1] + [1] * (call.weight.ndim - 1))
        b = shift if call.bias is None else call.bias * scale + shift
        call.folded = self._redistributed(z, call.op, call.a, w, b, call.rule)
        return call.folded

    def _redistributed(
        self, z: Tensor, op: Callable, a: Tensor, w: Tensor, b: Tensor | None, rule: str
    ) -> Tensor:
        """The value ``z``, with the backward of the rule: ``G_a = d/da of share(a)``, times ``z / share``."""
        b = b if self.bias else None
        if rule == "epsilon":
            share = op(a, w, b)
        else:
            share = op(a.clamp(min=0), w.clamp(min=0), None if b is None else b.clamp(min=0))
            if bool((a < 0).any()):
                share = share + op(a.clamp(max=0), w.clamp(max=0), None)
            if rule == "gamma":
                share = op(a, w, b) + self.gamma * share
        value = share.detach()
        wide = forward.wide(value)  # half precision has no such small epsilon
        ratio = (z / (wide + torch.where(wide < 0, -self.epsilon, self.epsilon))).to(value.dtype)
        # a denominator of exactly zero has nothing to hand on
        return z + (share - value) * torch.where(ratio.isfinite(), ratio, 0)

    def _rule_here(self) -> str:
        if isinstance(self.rule, str):
            return self.rule
        name, module = self.place
        return self.rule.get(name, self.rule.get(type(module).__name__, "epsilon"))

    def capture(self, name: str, tensor: Tensor, module: nn.Module) -> Tensor:
        """Keep a layer's output; a copy goes on, which an in-place operation may overwrite."""
        if name in self._captured:
            raise ValueError(f"layer {name!r} ran more than once in one pass, so its relevance is not one tensor")
        _, call = self._made.get(id(tensor), (None, None))
        self._captured[name] = (tensor, call)
        copy = tensor.clone()
        if call is not None:
            self._made[id(copy)] = (copy, call)
        return copy

    def captured(self, name: str) -> Tensor:
        if name not in self._captured:
            raise LayerDidNotRun(f"layer {name!r} did not run in the forward pass")
        tensor, call = self._captured[name]
        return tensor if call is None or call.folded is None else call.folded


def _scaled(a: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    return a * w if b is None else a * w + b


def _passed_on(func: Any, args: tuple, kwargs: dict) -> Tensor:
    x, value = args[0], args[0].detach()
    y = func(value.clone(), *args[1:], **kwargs)
    ratio = torch.where(value == 0, 0, y / value.masked_fill(value == 0, 1))
    return y + (x - value) * ratio


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def _checked_rules(
    model: nn.Module, rule: str | Mapping[str, str], epsilon: float, gamma: float
) -> str | dict[str, str]:  # fmt: skip
    if isinstance(rule, Mapping):
        known = {name for name, _ in model.named_modules()} | {type(m).__name__ for m in model.modules()}
        for key in rule:
            if key not in known:
                raise LayerNotFound(f"rule names {key!r}, neither a layer nor a class{did_you_mean(key, known)}")
        rule = {key: _checked_rule(one) for key, one in rule.items()}
    else:
        rule = _checked_rule(rule)
    for name, value in (("epsilon", epsilon), ("gamma", gamma)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be finite and at least 0, not {value}")
    return rule


def _checked_rule(rule: str) -> str:
    plain = str(rule).replace("-", "").replace("_", "")  # z-plus and z_plus are the same
    if plain not in RULES:
        raise ValueError(f"rule must be {', '.join(map(repr, RULES[:-1]))} or {RULES[-1]!r}, not {rule!r}")
    return plain
