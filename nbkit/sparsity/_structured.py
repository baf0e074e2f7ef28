"""Structured pruning: whole channels cut out of a model, which gives a smaller dense one."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from numbers import Real

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nbkit import forward
from nbkit.sparsity._groups import Group, Member, check_weights, groups
from nbkit.sparsity._masks import _as_bool
from nbkit.sparsity._select import keep_largest
from nbkit.sparsity._weights import check_finite, check_sparsity, n_outputs, select


def structured(
    model: nn.Module, channels: float | Mapping[str, Tensor], *, example: forward.Inputs,
    scores: Mapping[str, Tensor] | None = None, min_keep: int = 1,
) -> nn.Module:  # fmt: skip
    """A smaller copy of ``model`` without some of its channels, dense and with the same outputs as silencing them.

    ``channels``: the fraction removed from every group of channels, ``round(fraction * channels)`` of each with the
    lowest scores; or ``{layer name: bool tensor [channels], True is kept}``, other layers stay whole. Layers whose
    outputs are added (a residual stream), and a depthwise convolution and the layer before it, share one group of
    channels: a channel goes from all of them, and stays only where every mask given keeps it. The channels of the
    model's output stay. ``scores`` (with a fraction): ``{parameter name: [channels]}``, or weights' scores, which are
    summed over a channel, and over the layers of a group; groups without scores stay whole. The default is the sum of
    ``|w|`` of each filter. ``min_keep`` channels stay in each group. Of equal scores the lower index falls first.

    ``example`` (inputs [N, ...] as the model takes them) is run once to follow the channels, and again through the
    smaller model and a copy in which filter, bias and normalisation of the removed channels are 0: they must agree.
    They do not where a LayerNorm averages over the channels or an activation has f(0) != 0, and this says so.
    ``model`` is not changed.

    Raises: TypeError where channels cannot be followed or cut, saying which; ValueError (fraction outside [0, 1), no
    channel left, the output's channels asked for, wrong shape or not binary); LayerNotFound; NotFinite.

    Source: Li et al. 2017, "Pruning filters for efficient ConvNets" (arXiv 1608.08710); groups by torch-pruning (Fang
    et al. 2023, "DepGraph", arXiv 2301.12900).

    >>> small = structured(model, 0.5, example=x)
    """
    check_weights(model)
    forward.check_inputs(example, name="example")
    forward.check_device(model, example)
    smaller = copy.deepcopy(model)
    found = groups(smaller, example)
    if isinstance(channels, Mapping):
        keep = _given(found, channels)
    else:
        keep = _ranked(found, channels, scores, min_keep)
    gone = [(group, ~keep[group.name]) for group in found if group.name in keep and not keep[group.name].all()]
    for group, _ in gone:
        if group.refused:
            raise TypeError(f"the channels of {group.name!r} {group.refused}; {_ADVICE}")
    wanted = _silenced(model, gone, example)
    _cut(gone)
    for name, parameter in smaller.named_parameters():
        parameter.requires_grad_(model.get_parameter(name).requires_grad)
    _compare(model, smaller, gone, wanted, example)
    return smaller


_ADVICE = "give masks, or scores, of the layers that may be cut; the others stay whole"


def _owners(found: list[Group]) -> dict[str, list[tuple[Group, Member]]]:
    """For each layer's weight, the groups of its outputs: several where it is added to maps laid side by side."""
    owners: dict[str, list[tuple[Group, Member]]] = {}
    for group in found:
        for layer in group.layers:
            owners.setdefault(f"{layer.name}.weight", []).append((group, layer))
    return owners


def _given(found: list[Group], channels: Mapping[str, Tensor]) -> dict[str, Tensor]:
    owners = _owners(found)
    keep: dict[str, Tensor] = {}
    for name, mask in channels.items():
        mask = _as_bool(name, mask).cpu()
        for group, layer in (pair for parameter in select(name, owners) for pair in owners[parameter]):
            size = n_outputs(layer.module)
            if mask.shape != (size,):
                raise ValueError(f"{name!r} has {size} channels; its mask has shape {tuple(mask.shape)}")
            kept = keep.setdefault(group.name, torch.ones(group.size, dtype=torch.bool))
            kept[layer.channels[~mask[layer.entries]]] = False
    for group in found:
        mask = keep.get(group.name)
        if mask is None or mask.all():
            continue
        if group.fixed:
            raise ValueError(f"the channels of {group.name!r} {group.fixed}; they cannot be removed")
        if not mask.any():
            raise ValueError(f"no channel of {group.name!r} would be left; a layer needs at least one")
    return keep


def _ranked(
    found: list[Group], fraction: float, scores: Mapping[str, Tensor] | None, min_keep: int
) -> dict[str, Tensor]:
    if not isinstance(fraction, Real):
        raise TypeError(f"channels must be a fraction or a mapping of masks, not {type(fraction).__name__}")
    fraction = check_sparsity(fraction, "channels")
    if min_keep < 1:
        raise ValueError(f"min_keep must be at least 1 channel, not {min_keep}")
    owners = _owners(found)
    if scores is None:
        scores = {name: pairs[0][1].module.weight.detach().abs() for name, pairs in owners.items()}
    check_finite(scores, "scores of")
    totals: dict[str, Tensor] = {}
    for name, score in scores.items():
        for group, layer in (pair for parameter in select(name, owners) for pair in owners[parameter]):
            total = totals.setdefault(group.name, torch.zeros(group.size, dtype=torch.float64))
            total.index_add_(0, layer.channels, _of_units(name, score, layer)[layer.entries])
    sizes = {group.name: group.size for group in found if group.name in totals and not group.fixed}
    return {
        name: keep_largest([totals[name]], max(0, min(round(fraction * size), size - min_keep)))[0]
        for name, size in sizes.items()
    }


def _of_units(name: str, score: Tensor, layer: Member) -> Tensor:
    """[channels of the layer]: a score for each, summed over its weights where there is one a weight."""
    if score.ndim > 1 and score.shape == layer.module.weight.shape and getattr(layer.module, "transposed", False):
        score = score.transpose(0, 1)  # [in, out, ...]
    size = n_outputs(layer.module)
    if score.ndim == 0 or len(score) != size:
        raise ValueError(f"{name!r} has {size} channels; its scores have shape {tuple(score.shape)}")
    return score.detach().cpu().double().flatten(1).sum(1) if score.ndim > 1 else score.detach().cpu().double()


def _cut(gone: list[tuple[Group, Tensor]]) -> None:
    """Remove the entries of all groups, each axis once: a layer may lose channels of several groups."""
    axes: dict[tuple, tuple[Member, set[int]]] = {}
    for group, removed in gone:
        for member in group.members:
            _, entries = axes.setdefault((member.name, member.cut), (member, set()))
            entries.update(member.entries[removed[member.channels]].tolist())
    for member, entries in axes.values():
        member.cut(member.module, sorted(entries))


@torch.no_grad()
def _silenced(model: nn.Module, gone: list[tuple[Group, Tensor]], example: forward.Inputs) -> Tensor:
    """The model's outputs with 0 in the removed channels of every layer and normalisation."""
    tensors: dict[str, Tensor] = {}
    for group, removed in gone:
        for member in group.members:
            module = model.get_submodule(member.name)
            if not member.out or isinstance(module, nn.PReLU):
                continue
            for name in ("weight", "bias", "running_mean") if isinstance(module, _BatchNorm) else ("weight", "bias"):
                value = tensors.get(f"{member.name}.{name}", getattr(module, name, None))
                if value is not None:
                    axis = 1 if value.ndim > 1 and getattr(module, "transposed", False) else 0
                    entries = member.entries[removed[member.channels]].to(value.device)
                    tensors[f"{member.name}.{name}"] = value.index_fill(axis, entries, 0)

    def silent(*inputs: Tensor, **named: Tensor) -> object:
        return torch.func.functional_call(model, tensors, inputs, named)

    with forward.evaluating(model):
        return forward.logits(silent, example)


def _compare(
    model: nn.Module, smaller: nn.Module, gone: list[tuple[Group, Tensor]], expected: Tensor, example: forward.Inputs
) -> None:
    off, allowed = _difference(smaller, expected, example)
    if off <= allowed:
        return
    if len(gone) > 1:  # which of them is it?
        for group, removed in gone:
            alone = {layer.name: _mask(model, layer, removed) for layer in group.layers}
            structured(model, alone, example=example)
    names = ", ".join(repr(group.name) for group, _ in gone)
    raise TypeError(
        f"the channels of {names} cannot simply be cut: the smaller model differs from the one with zeros in their "
        f"place by {off:.3g} (allowed {allowed:.3g}), as where a normalisation averages over channels or an activation "
        f"does not turn 0 into 0; {_ADVICE}"
    )


def _mask(model: nn.Module, layer: Member, removed: Tensor) -> Tensor:
    mask = torch.ones(n_outputs(model.get_submodule(layer.name)), dtype=torch.bool)  # the layer itself is cut by now
    mask[layer.entries[removed[layer.channels]]] = False
    return mask


@torch.no_grad()
def _difference(smaller: nn.Module, expected: Tensor, example: forward.Inputs) -> tuple[float, float]:
    """How far the outputs are apart, and how far rounding may take them: other widths split long sums otherwise."""
    allowed = 1000 * torch.finfo(expected.dtype).eps * max(1e-12, expected.abs().max().item())
    try:
        with forward.evaluating(smaller):
            got = forward.logits(smaller, example)
    except RuntimeError:  # shapes that no longer fit
        return float("inf"), allowed
    return ((expected - got).abs().max().item() if expected.shape == got.shape else float("inf")), allowed
