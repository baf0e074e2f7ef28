"""Attention of all layers: its probabilities, and how much of each input token reaches each output token by it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nbkit import forward, hooks
from nbkit.errors import LayerDidNotRun


@forward.outside_inference_mode
def attention_probabilities(
    model: nn.Module, inputs: forward.Inputs, *, layers: str | Iterable[str] | None = None
) -> list[Tensor]:
    """What each layer's heads attend to: ``[..., i, j]`` is the weight of token ``j`` in what token ``i`` takes in.

    Args:
        layers: the modules whose output holds attention probabilities ``[N, heads, T, T]`` or ``[N, T, T]`` (a softmax,
            the dropout behind it, an attention module that returns them next to its result).
            ``None``: the model is a transformers model and is asked for ``output_attentions``, in its eager
            implementation, the only one that gives them.

    Returns: a tensor ``[N, heads, T, T]`` (or ``[N, T, T]``) a layer, in the order of ``layers`` or of the model, rows
    summing to one, without autograd, on the model's device. Inside :func:`nbkit.hooks.narrow` ``T`` falls from layer to
    layer.

    Raises: ValueError where a layer gives no square probabilities or the model no attentions; LayerNotFound,
    LayerDidNotRun.

    >>> attention_probabilities(vit, images, layers="blocks.*.attn.weights")[3].mean(1)[:, 0, 1:]
    """
    forward.check_inputs(inputs)
    forward.check_device(model, inputs)
    with forward.evaluating(model), torch.no_grad():
        return _asked(model, inputs) if layers is None else _recorded(model, inputs, layers)


@forward.outside_inference_mode
def attention_rollout(
    model: nn.Module,
    inputs: forward.Inputs,
    target: forward.Target = None,
    *,
    layers: str | Iterable[str] | None = None,
    token: int | None = None,
    residual: float = 0.5,
    heads: str = "mean",
    wrt: str | None = None,
) -> Tensor:
    """The product of the attention matrices of all layers, each mixed with the residual connection around it.

    ``A_l`` is a layer's attention averaged over heads; ``R = M_L ... M_2 M_1`` with ``M_l = (1 - residual) A_l +
    residual I``, rows normalised to sum to one. ``R[i, j]`` is the share of input token ``j`` in output token ``i``.

    Args:
        target, wrt: accepted so that all methods are called alike; attention does not depend on a class.
        layers: as in :func:`attention_probabilities`, in the order they run.
        token: return only this row, such as 0 for a class token; negative counts from the end.
        residual: weight of the residual connection; 0.5 in the paper.
        heads: ``"mean"`` or ``"max"`` over heads.

    Returns: ``[N, T, T]``, or ``[N, T]`` with ``token``, on the CPU. Rows sum to one.

    Raises: ValueError where a layer gives no square probabilities or the model no attentions; LayerNotFound,
    LayerDidNotRun; IndexError for ``token``.

    Source: S. Abnar and W. Zuidema, *Quantifying Attention Flow in Transformers*, 2020, section 3.

    >>> attention_rollout(vit, {"pixel_values": images}, token=0)[:, 1:]     # from every patch to the class token
    """
    if not 0 <= residual < 1:
        raise ValueError(f"residual must lie in [0, 1), not {residual}")
    if heads not in ("mean", "max"):
        raise ValueError(f"heads must be 'mean' or 'max', not {heads!r}")
    rollout = None
    for matrix in attention_probabilities(model, inputs, layers=layers):
        if matrix.ndim == 4:
            matrix = matrix.mean(1) if heads == "mean" else matrix.amax(1)
        mixed = (1 - residual) * matrix + residual * torch.eye(matrix.shape[-1], device=matrix.device)
        mixed = mixed / mixed.sum(-1, keepdim=True)
        rollout = mixed if rollout is None else mixed @ rollout
    rollout = rollout.cpu()
    if token is None:
        return rollout
    if not -rollout.shape[1] <= token < rollout.shape[1]:
        raise IndexError(f"token {token} is out of range; there are tokens 0 to {rollout.shape[1] - 1}")
    return rollout[:, token]


def _asked(model: nn.Module, inputs: forward.Inputs) -> list[Tensor]:
    asked = dict(inputs) if isinstance(inputs, Mapping) else None
    try:
        with _eager(model):
            output = model(**asked, output_attentions=True) if asked else model(inputs, output_attentions=True)
    except TypeError as error:
        if "output_attentions" not in str(error):
            raise
        raise ValueError(f"{type(model).__name__} takes no output_attentions: name its attention layers") from None
    attentions = getattr(output, "attentions", None)
    if not attentions or any(not isinstance(a, Tensor) for a in attentions):
        raise ValueError(f"{type(model).__name__} returned no attentions; name the attention layers")
    return list(attentions)


@contextmanager
def _eager(model: nn.Module) -> Iterator[None]:
    """A transformers model with the attention that computes its probabilities; its own comes back."""
    own = getattr(getattr(model, "config", None), "_attn_implementation", "eager")
    if own == "eager" or not hasattr(model, "set_attn_implementation"):
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(own)


def _recorded(model: nn.Module, inputs: forward.Inputs, layers: str | Iterable[str]) -> list[Tensor]:
    names = hooks.resolve(model, layers)
    found: dict[str, Tensor] = {}

    def keep(name: str):
        def hook(module, args, output):
            found[name] = _probabilities(name, output).clone()

        return hook

    with ExitStack() as stack:
        for name in names:
            stack.callback(hooks.get_layer(model, name).register_forward_hook(keep(name)).remove)
        forward.call(model, inputs)
    for name in names:
        if name not in found:
            raise LayerDidNotRun(f"layer {name!r} did not run in the forward pass")
    return [found[name] for name in names]


def _probabilities(name: str, output: Any) -> Tensor:
    """The attention among a layer's outputs: square in its last two axes, rows summing to one."""
    values = list(output.values()) if isinstance(output, Mapping) else output
    values = values if isinstance(values, (tuple, list)) else [values]
    for value in values:
        if isinstance(value, Tensor) and value.ndim in (3, 4) and value.shape[-1] == value.shape[-2]:
            if torch.allclose(value.sum(-1), torch.ones_like(value[..., 0]), atol=1e-3):
                return value
    shapes = [tuple(v.shape) for v in values if isinstance(v, Tensor)]
    raise ValueError(f"layer {name!r} puts out {shapes}: no square attention probabilities with rows of sum 1")
