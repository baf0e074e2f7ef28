"""Which layers a model has, what they are called, and which axis of their output counts neurons."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from nbkit import forward
from nbkit.errors import LayerNotFound, did_you_mean

_CHANNELS_FIRST_1D = (
    nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d, nn.InstanceNorm1d, nn.MaxPool1d, nn.AvgPool1d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d,
)  # fmt: skip
_FEATURES_LAST = (nn.Linear, nn.LayerNorm, nn.Embedding)


def get_layer(model: nn.Module, name: str) -> nn.Module:
    """The submodule with this dotted name (``""`` is the model itself).

    Raises: LayerNotFound (a KeyError) naming the closest matches.
    """
    modules = dict(model.named_modules())
    if name not in modules:
        raise LayerNotFound(f"no layer {name!r} in {type(model).__name__}{did_you_mean(name, filter(None, modules))}")
    return modules[name]


def resolve(model: nn.Module, layers: str | Iterable[str]) -> list[str]:
    """Layer names from a name, a shell pattern such as ``"blocks.*.mlp.act"`` (in the model's order), or several.

    Raises: LayerNotFound for a name or pattern that matches nothing, ValueError for no name at all, TypeError for what
    is no name.
    """
    if not isinstance(layers, Iterable):
        raise TypeError(f"layers are given by name, not as {type(layers).__name__}")
    names: list[str] = []
    known = [n for n, _ in model.named_modules()]
    for wanted in [layers] if isinstance(layers, str) else layers:
        if not isinstance(wanted, str):
            raise TypeError(f"layers are given by name, not as {type(wanted).__name__}")
        if any(c in wanted for c in "*?["):
            found = fnmatch.filter(known, wanted)
            if not found:
                raise LayerNotFound(f"no layer of {type(model).__name__} matches {wanted!r}")
        else:
            get_layer(model, wanted)
            found = [wanted]
        names += [n for n in found if n not in names]
    if not names:
        raise ValueError("no layer was named")
    return names


def neuron_axis(tensor: Tensor, module: nn.Module | None = None) -> int:
    """The axis of ``tensor`` that counts neurons (module docstring); ``module`` tells ``[N, C, L]`` from ``[N, T, F]``.

    Only layers that fix their layout tell: an activation after a ``Conv1d`` does not, so its last axis is taken.

    Raises: ValueError for a tensor with fewer than two axes.
    """
    if tensor.ndim < 2:
        raise ValueError(f"a layer output needs at least [N, F]; this one has shape {tuple(tensor.shape)}")
    if tensor.ndim >= 4 and isinstance(module, _FEATURES_LAST):  # maps with their channels last
        return tensor.ndim - 1
    if tensor.ndim >= 4 or (tensor.ndim == 3 and isinstance(module, _CHANNELS_FIRST_1D)):
        return 1
    return tensor.ndim - 1


def layers(model: nn.Module, example: forward.Inputs | None = None):
    """A table of the model's modules: ``name, type, output_shape, neurons, parameters``.

    ``output_shape`` (without the batch axis) is known where an ``example`` input ``[N, ...]`` is given and the layer
    ran; ``neurons`` then comes from it, else from the module's own attributes. ``parameters`` counts a module's own
    parameters, not those of its children, so the column sums to the model's total.

    Returns: pandas.DataFrame, one row a module, the model itself left out.
    """
    import pandas as pd

    shapes: dict[str, tuple[int, ...]] = {}
    axes: dict[str, int] = {}
    if example is not None:
        forward.check_inputs(example)
        forward.check_device(model, example)
        with ExitStack() as stack:
            for name, module in model.named_modules():
                stack.callback(module.register_forward_hook(_note_shape(name, shapes, axes)).remove)
            stack.enter_context(forward.evaluating(model))
            stack.enter_context(torch.no_grad())
            forward.call(model, example)
    rows = []
    for name, module in model.named_modules():
        if not name:
            continue
        shape = shapes.get(name)
        neurons = shape[axes[name] - 1] if name in axes else _declared_neurons(module)
        own = sum(p.numel() for p in module.parameters(recurse=False))
        rows.append((name, type(module).__name__, shape, neurons, own))
    table = pd.DataFrame(rows, columns=["name", "type", "output_shape", "neurons", "parameters"])
    return table.astype({"neurons": "Int64"})


def _note_shape(name: str, shapes: dict, axes: dict) -> Callable:
    def hook(module, args, output):
        try:
            tensor = forward.first_tensor(output)
        except TypeError:
            return
        shapes[name] = tuple(tensor.shape[1:])
        if tensor.ndim >= 2:
            axes[name] = neuron_axis(tensor, module)

    return hook


def _declared_neurons(module: nn.Module) -> int | None:
    for attribute in ("out_channels", "out_features", "num_features", "embedding_dim", "normalized_shape"):
        value = getattr(module, attribute, None)
        if isinstance(value, (tuple, list)) and value:
            value = value[-1]
        if isinstance(value, int):
            return value
    return None
