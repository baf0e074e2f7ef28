"""Structured pruning: whole channels cut out of a plain chain of layers, which gives a smaller dense model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nbkit import forward
from nbkit.sparsity._chain import Layer, chain
from nbkit.sparsity._masks import _as_bool
from nbkit.sparsity._select import keep_largest
from nbkit.sparsity._weights import check_finite, check_sparsity, select


@dataclass
class _Group:
    """Layers that share their output channels: one layer and the depthwise convolutions after it."""

    members: list[Layer]
    reader: Layer | None = None  # the layer that reads the channels; None at the model's output
    norms: list[nn.Module] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.members[0].name

    @property
    def channels(self) -> int:
        return self.members[0].units

    @property
    def fixed(self) -> str | None:
        """Why no channel can go, if so."""
        if self.reader is None:
            return "are the model's output"
        return "are the model's inputs" if self.members[0].depthwise else None


def structured(
    model: nn.Module, channels: float | Mapping[str, Tensor], *, example: Tensor | None = None,
    scores: Mapping[str, Tensor] | None = None, min_keep: int = 1,
) -> nn.Module:  # fmt: skip
    """A smaller copy of ``model`` without some of its channels, dense and with the same outputs as zeroing them.

    ``channels``: the fraction of channels removed from every layer but the last, ``round(fraction * channels)`` of
    each with the lowest scores; or ``{layer name: bool tensor [channels], True is kept}``, other layers stay whole.
    ``scores`` (with a fraction): ``{parameter name: [channels]}``, or weights' scores, which are summed over a
    channel; layers without scores stay whole. The default is the sum of ``|w|`` of each filter. ``min_keep`` channels
    stay in each layer. Of equal scores the lower index falls first.

    A removed channel reads as 0 to the next layer: as with its filter, bias and normalisation set to 0. With an
    ``example`` [N, ...] the copy is run beside that zeroed model, in evaluation mode, and must agree with it.

    The model must be a chain: Linear and Conv layers in any nesting of modules, each reading only the one before,
    with BatchNorm, pooling, dropout, flatten and activations with f(0) = 0 between them. A depthwise convolution
    goes with the layer before it. Residual networks and attention are no chains. ``model`` is not changed.

    Raises: TypeError where the graph is no such chain, saying what breaks it; ValueError (fraction outside [0, 1),
    no channel left, the output's channels asked for, wrong shape or not binary); LayerNotFound; NotFinite;
    RuntimeError where the outputs differ.

    Source: Li et al. 2017, "Pruning filters for efficient ConvNets" (arXiv 1608.08710).

    >>> small = structured(model, 0.5, example=x)
    """
    groups = _groups(chain(model))
    if isinstance(channels, Mapping):
        keep = _given(groups, channels)
    else:
        keep = _ranked(groups, channels, scores, min_keep)
    smaller = copy.deepcopy(model)
    modules = dict(zip(model.modules(), smaller.modules(), strict=True))
    for group in groups:
        if group.name in keep and not keep[group.name].all():
            _cut(group, keep[group.name].nonzero()[:, 0], modules)
    if example is not None:
        _compare(model, smaller, groups, keep, example)
    return smaller


def _groups(layers: list[Layer]) -> list[_Group]:
    groups: list[_Group] = []
    for layer in layers:
        if layer.depthwise and groups:
            groups[-1].members.append(layer)
        else:
            if groups:
                groups[-1].reader = layer
            groups.append(_Group([layer]))
        groups[-1].norms += layer.norms
    return groups


def _given(groups: list[_Group], channels: Mapping[str, Tensor]) -> dict[str, Tensor]:
    owner = {f"{layer.name}.weight": group for group in groups for layer in group.members}
    keep: dict[str, Tensor] = {}
    for name, mask in channels.items():
        mask = _as_bool(name, mask).cpu()
        for parameter in select(name, owner):
            group = owner[parameter]
            if mask.shape != (group.channels,):
                raise ValueError(f"{name!r} has {group.channels} channels; its mask has shape {tuple(mask.shape)}")
            keep[group.name] = mask & keep.get(group.name, torch.ones_like(mask))
    for group in groups:
        mask = keep.get(group.name)
        if mask is None or mask.all():
            continue
        if group.fixed:
            raise ValueError(f"the channels of {group.name!r} {group.fixed}; they cannot be removed")
        if not mask.any():
            raise ValueError(f"no channel of {group.name!r} would be left; a layer needs at least one")
    return keep


def _ranked(
    groups: list[_Group], fraction: float, scores: Mapping[str, Tensor] | None, min_keep: int
) -> dict[str, Tensor]:
    if not isinstance(fraction, Real):
        raise TypeError(f"channels must be a fraction or a mapping of masks, not {type(fraction).__name__}")
    fraction = check_sparsity(fraction, "channels")
    if min_keep < 1:
        raise ValueError(f"min_keep must be at least 1 channel, not {min_keep}")
    owner = {f"{layer.name}.weight": group for group in groups for layer in group.members}
    if scores is None:
        layers = [layer for group in groups for layer in group.members]
        scores = {f"{layer.name}.weight": layer.module.weight.detach().abs() for layer in layers}
    check_finite(scores, "scores of")
    totals: dict[str, Tensor] = {}
    for name, score in scores.items():
        for parameter in select(name, owner):
            group = owner[parameter]
            if score.ndim == 0 or len(score) != group.channels:
                raise ValueError(f"{name!r} has {group.channels} channels; its scores have shape {tuple(score.shape)}")
            unit = score.detach().cpu().flatten(1).sum(1) if score.ndim > 1 else score.detach().cpu()
            totals[group.name] = totals.get(group.name, 0) + unit
    sizes = {group.name: group.channels for group in groups if group.name in totals and not group.fixed}
    return {
        name: keep_largest([totals[name]], max(0, min(round(fraction * size), size - min_keep)))[0]
        for name, size in sizes.items()
    }


def _cut(group: _Group, index: Tensor, modules: Mapping[nn.Module, nn.Module]) -> None:
    for layer in group.members:
        module = modules[layer.module]
        _take(module, ("weight", "bias"), index)
        if isinstance(module, nn.Linear):
            module.out_features = len(index)
        else:
            module.out_channels = len(index)
        if layer is not group.members[0]:  # depthwise
            module.in_channels = module.groups = len(index)
    for norm in map(modules.__getitem__, group.norms):
        _take(norm, ("weight", "bias", "running_mean", "running_var"), index)
        setattr(norm, "num_parameters" if isinstance(norm, nn.PReLU) else "num_features", len(index))
    reader = modules[group.reader.module]
    # a flattened map holds all places of a channel side by side
    places = group.reader.inputs // group.channels
    columns = (index[:, None] * places + torch.arange(places)).flatten()
    _take(reader, ("weight",), columns, dim=1)
    if isinstance(reader, nn.Linear):
        reader.in_features = len(columns)
    else:
        reader.in_channels = len(columns)


def _take(module: nn.Module, names: tuple[str, ...], index: Tensor, dim: int = 0) -> None:
    for name in names:
        old = getattr(module, name, None)
        if old is None:
            continue
        new = old.detach().index_select(dim, index.to(old.device))
        is_parameter = isinstance(old, nn.Parameter)
        setattr(module, name, nn.Parameter(new, requires_grad=old.requires_grad) if is_parameter else new)


@torch.no_grad()
def _compare(
    model: nn.Module, smaller: nn.Module, groups: list[_Group], keep: Mapping[str, Tensor], example: Tensor
) -> None:
    forward.check_inputs(example, name="example")
    forward.check_device(model, example)
    zeroed = copy.deepcopy(model)
    modules = dict(zip(model.modules(), zeroed.modules(), strict=True))
    for group in groups:
        if group.name in keep:
            for module in [layer.module for layer in group.members] + group.norms:
                _zero(modules[module], ~keep[group.name])
    with forward.evaluating(zeroed), forward.evaluating(smaller):
        expected, got = forward.logits(zeroed, example), forward.logits(smaller, example)
    # a different width splits sums differently: allow for the rounding of long sums, no more
    allowed = 1000 * torch.finfo(expected.dtype).eps * max(1e-12, expected.abs().max().item())
    off = (expected - got).abs().max().item() if expected.shape == got.shape else float("inf")
    if not off <= allowed:
        raise RuntimeError(f"the smaller model differs from the zeroed one by {off:.3g} (allowed {allowed:.3g})")


def _zero(module: nn.Module, removed: Tensor) -> None:
    if isinstance(module, nn.PReLU):
        return
    names = ("weight", "bias", "running_mean") if isinstance(module, _BatchNorm) else ("weight", "bias")
    for name in names:
        value = getattr(module, name, None)
        if value is not None:
            value[removed.to(value.device)] = 0
