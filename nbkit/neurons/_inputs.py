"""The gradient of many neurons of a layer with respect to the input, at once."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from nbkit import forward
from nbkit._rows import explained
from nbkit.hooks._select import neuron_index
from nbkit.neurons._basic import _one
from nbkit.neurons._replay import graph_bytes, reach
from nbkit.neurons._sites import Site, check, observe


class _Linear(NamedTuple):
    """Neurons that are ``act(weight @ h + bias)``: their gradient is ``slope * weight @ dh/dx``."""

    h: Site  # read at the linear layer's input
    weight: Tensor  # [K, D]
    slope: Tensor  # [K], the activation's derivative; 1 for the linear layer itself


@forward.outside_inference_mode
def input_gradients(
    model: nn.Module, inputs: forward.Inputs, *, layer: str, neurons: Any = None, positions: Any = 0,
    max_bytes: int = 2**28, wrt: str | None = None, progress: bool = False,
) -> Tensor:  # fmt: skip
    """The gradient of every neuron of a layer with respect to the input.

    One forward on copies of an input serves many backward passes, each row bringing back another neuron. Neurons that
    are a linear map of fewer numbers h, or an elementwise activation of one (the hidden units of an MLP), need only the
    gradients of h: ``d act(W h + b)_j / dx = act'_j W_j dh/dx``. Whether a layer is such is checked on its values.

    Args:
        layer: a dotted name; the neurons are those of its output.
        neurons: None or ``"all"``, int, ints, slice or bool mask.
        positions: the tokens (default: the first, the class token) or places ``(row, column)`` in a map whose sum is
            differentiated; None is all of them, which 0 means for a map too. ``[N, F]`` layers have none.
        max_bytes: about how much autograd may keep at once; the result itself is not counted.
        wrt: the tensor of a dict of inputs that is differentiated; ``None``: its only floating one.
        progress: show a bar.

    Returns: ``[N, K, *inputs.shape[1:]]`` (of ``inputs[wrt]`` for a dict), on the CPU.

    Raises: LayerNotFound, LayerDidNotRun; IndexError (neuron or position out of range); ValueError (no neuron; a layer
    that does not depend on the input); TypeError; NotFinite.

    >>> input_gradients(vit, images[:1], layer="blocks.3.mlp.act").shape               # [1, 1536, 3, 112, 112]
    """
    n = check(model, inputs)
    if max_bytes <= 0:
        raise ValueError(f"max_bytes must be positive, not {max_bytes}")
    x, _ = explained(inputs, wrt)
    _, (where,), (rows,), _ = observe(model, inputs, _one(layer), positions, whole_maps=True)
    index = neuron_index(neurons, rows.shape[-1], rows.device)
    index = torch.arange(rows.shape[-1], device=rows.device) if index is None else index
    if not index.numel():
        raise ValueError("no neuron was chosen")
    shape = x.shape[1:]
    out = torch.empty(n, len(index), *shape, dtype=x.dtype)
    with tqdm(total=n * len(index), desc="input gradients", disable=not progress) as bar:
        for i in range(n):
            one = forward.take(inputs, slice(i, i + 1))
            linear = _as_linear(model, one, where, index) if rows.shape[1] == 1 else None
            if linear is None:
                found = _jacobian(model, one, where, "output", index, max_bytes, wrt)
            else:
                h = torch.arange(linear.weight.shape[1], device=index.device)
                found = _jacobian(model, one, linear.h, "input", h, max_bytes, wrt)
                found = (linear.slope[:, None] * linear.weight) @ found
            out[i] = found.view(-1, *shape)
            bar.update(len(index))
    return out


def _jacobian(
    model: nn.Module, one: forward.Inputs, where: Site, at: str, wanted: Tensor, max_bytes: int, wrt: str | None
) -> Tensor:  # fmt: skip
    """Gradients ``[D, numel]`` of the numbers ``wanted`` of a site (summed over its positions) for one input."""
    x, rebuild = explained(one, wrt)

    def values(copies: Tensor) -> Tensor:
        index = torch.zeros(len(copies), dtype=torch.long, device=x.device)
        with forward.evaluating(model), torch.enable_grad():
            return where.rows(reach(model, rebuild(copies, index), where.module, at)).sum(1)

    a_copy = graph_bytes(model, lambda: values(x.detach().clone().requires_grad_()))
    size = min(len(wanted), max(1, int(max_bytes // max(1, a_copy))))
    copies = x.detach().expand(size, *x.shape[1:]).clone().requires_grad_()
    outputs = values(copies)
    found = torch.empty(len(wanted), x.numel(), dtype=x.dtype, device=x.device)
    for start in range(0, len(wanted), size):
        chosen = wanted[start : start + size]
        with torch.enable_grad():
            one_each = outputs[torch.arange(len(chosen), device=x.device), chosen].sum()
        last = start + size >= len(wanted)
        grad = None
        if one_each.requires_grad:
            (grad,) = torch.autograd.grad(one_each, copies, retain_graph=not last, allow_unused=True)
        if grad is None:
            raise ValueError("the layer does not depend on the input, so its neurons have no gradient there")
        found[start : start + size] = grad[: len(chosen)].flatten(1)
    return found


def _as_linear(model: nn.Module, one: forward.Inputs, where: Site, neurons: Tensor) -> _Linear | None:
    """How the neurons follow from fewer numbers, if they do: a Linear alone, or with an elementwise function on it."""
    layer = where.module
    made: dict[int, tuple[nn.Linear, Tensor, Tensor]] = {}
    entered: list[Tensor] = []

    def note(module: nn.Linear, args: tuple, output: Tensor) -> None:
        if args and isinstance(output, Tensor):
            made[id(output)] = (module, args[0], output)

    def cut(module: nn.Module, args: tuple):
        if len(args) != 1 or not isinstance(args[0], Tensor):
            return None
        entered.extend([args[0], args[0].detach().clone().requires_grad_()])
        return (entered[1].clone(),)

    with ExitStack() as stack:
        for linear in (m for m in model.modules() if isinstance(m, nn.Linear)):
            stack.callback(linear.register_forward_hook(note).remove)
        if not isinstance(layer, nn.Linear):
            stack.callback(layer.register_forward_pre_hook(cut).remove)
        stack.enter_context(forward.evaluating(model))
        stack.enter_context(torch.enable_grad())
        output = reach(model, one, layer)
    if isinstance(layer, nn.Linear):
        before, slope = output, torch.ones_like(output)
    elif entered and output.requires_grad and output.shape == entered[1].shape:
        before, slope = entered[0], _elementwise_slope(output, entered[1])
    else:
        return None
    linear, h, made_output = made.get(id(before), (None, None, None))
    if slope is None or made_output is not before or before.ndim > 3 or linear.in_features >= len(neurons):
        return None
    if not torch.allclose(before, nn.functional.linear(h, linear.weight, linear.bias), rtol=1e-4, atol=1e-5):
        return None  # something changes the linear layer's output on its way
    at = Site(where.name, linear, where.positions)
    return _Linear(at, linear.weight.detach()[neurons], where.rows(slope.detach())[0, 0, neurons])


def _elementwise_slope(output: Tensor, leaf: Tensor) -> Tensor | None:
    """The derivative of ``output`` by ``leaf`` if it is elementwise, else None.

    J is diagonal if ``J^T v = v * (J^T 1)`` for a random v: for any other J that holds with probability 0.
    """
    v = torch.rand(leaf.shape, generator=torch.Generator().manual_seed(0)).to(leaf) + 0.5
    slope, along = (
        torch.autograd.grad(output, leaf, w, retain_graph=True, allow_unused=True)[0] for w in (torch.ones_like(v), v)
    )
    return slope if slope is not None and torch.allclose(along, v * slope, rtol=1e-4, atol=1e-6) else None
