"""Joint attribution of a set of neurons, and the greedy search for an influential path through the layers."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from nbkit import forward, hooks
from nbkit._rows import batches, target_of
from nbkit.errors import NotFinite
from nbkit.neurons._group import Group, make_group, sizes
from nbkit.neurons._passes import Passes, Recompute, Resume, UnclearLayout
from nbkit.neurons._sites import check

MAX_BYTES = 2**29


@dataclass(frozen=True, eq=False)
class NeuronPath:
    """What :func:`neuron_path` found. With ``top_k`` above 1 every ``[N, L]`` below is ``[N, L, k]``, best first.

    Attributes:
        layers: the L layer names.
        path: ``[N, L]`` ints, the unit chosen in each layer.
        scores: ``[N, L]``, the greedy score of each choice when it was made.
        activations: ``[N, L]``, what the chosen units put out on the clean input (summed over positions).
        joint: ``[N]``, the joint attribution score of the whole path.
    """

    layers: tuple[str, ...]
    path: Tensor
    scores: Tensor
    activations: Tensor
    joint: Tensor

    def _repr_html_(self) -> str:
        shown = self.path[:8]
        units = lambda cell: " ".join(map(str, cell.reshape(-1).tolist()))  # noqa: E731
        head = "".join(f"<th>{i}</th>" for i in range(len(shown)))
        body = "".join(
            f"<tr><th style='text-align:left'>{name}</th>" + "".join(f"<td>{units(p[i])}</td>" for p in shown) + "</tr>"
            for i, name in enumerate(self.layers)
        )
        foot = "".join(f"<td>{v:.3g}</td>" for v in self.joint[: len(shown)].tolist())
        more = f"<p>and {len(self.path) - len(shown)} more</p>" if len(self.path) > len(shown) else ""
        return (
            f"<table><tr><th style='text-align:left'>unit of layer, for input</th>{head}</tr>{body}"
            f"<tr><th style='text-align:left'>joint attribution score</th>{foot}</tr></table>{more}"
        )


@forward.outside_inference_mode
def joint_attribution(
    model: nn.Module, inputs: forward.Inputs, path: Tensor | NeuronPath, target: forward.Target = None, *,
    layers: Iterable[str] | None = None, steps: int = 20, positions: Any = 0, max_bytes: int = MAX_BYTES,
) -> Tensor:  # fmt: skip
    """The joint attribution score (JAS) of a set of neurons, one or k in each of L layers.

    ``JAS = (sum_n w_n / m) * sum_{a = 0, 1/m, ..., (m-1)/m} sum_j dP(a w_1, ..., a w_N) / dw_j``, where w_n are the
    clean activations: the members are scaled together from 0 towards their values while all other units of the
    edited positions keep theirs: an earlier member acts on P past the later edited rows (through residual sums and
    attention), never through them. The cross terms n != j are part of it, so it adds up to P(w) - P(0) only for N = 1.

    Args:
        path: units ``[N, L]``, or ``[L]`` for all inputs alike, or ``[N, L, k]``; or a :class:`NeuronPath`.
        target: the class whose softmax **probability** is P (the model's output is taken for logits): an int, ints
            ``[N]``, None (the predicted class). Or a callable on the model's output, taken as it is, that gives one
            score a row whatever the number of rows.
        layers: L names (or patterns) of layers whose *output* holds the neurons: for a transformer the activation
            function between the two linear layers of its MLP. A :class:`NeuronPath` has its own.
        steps: m, at least 2; the left Riemann rule never evaluates the input itself.
        positions: where neurons are read and edited. 0 is the class token of ``[N, T, F]`` (``[N, F]`` layers have no
            positions and ignore it); more positions, or None for all, count a unit once at each of them.
        max_bytes: about how much autograd may keep at once.

    Returns: ``[N]``, in the unit of P; on the CPU.

    Raises: LayerNotFound, LayerDidNotRun; IndexError (unit, position or target out of range); ValueError; NotFinite.

    Source: Wang et al. 2025, arXiv 2503.09046, and the authors' code for the Riemann sum.

    >>> joint_attribution(vit, images, found, labels)
    """
    if isinstance(path, NeuronPath):
        layers, path = path.layers if layers is None else layers, path.path
    if layers is None:
        raise TypeError("name the layers of the path with layers=")
    names, n = _checked(model, inputs, target, layers, steps, max_bytes)
    path = _checked_path(path, n, len(names))
    kept = []
    size, pieces = sizes(model, inputs, names, steps, max_bytes)
    for chosen in batches(n, size):
        part, labels = forward.take(inputs, chosen), target_of(target, chosen)
        group = make_group(model, part, labels, names, steps, positions, pieces)
        units = path[chosen].to(group.clean[0].device)
        _check_units(group, units)
        kept.append(_joint(model, group, units).cpu())
    return torch.cat(kept)


@forward.outside_inference_mode
def neuron_path(
    model: nn.Module, inputs: forward.Inputs, target: forward.Target = None, *, layers: Iterable[str],
    steps: int = 20, top_k: int = 1, positions: Any = 0, reuse: bool = True, max_bytes: int = MAX_BYTES,
    progress: bool = False,
) -> NeuronPath:  # fmt: skip
    """The neuron path of each input: one unit a layer, chosen greedily from the first layer to the last.

    In layer l every unit i is scored at once, ``(w_i + sum_q w_q) / m * sum_a [dP/dw_i + sum_q dP/dw_q]``, where q runs
    over the units chosen before, those are scaled by a alone in their row, the whole row of layer l is scaled by a, and
    the largest score (signed) wins. So a candidate's score is not its JAS with its neighbours held; the ``joint`` score
    of the finished path is (:func:`joint_attribution`).

    Args:
        target: as :func:`joint_attribution`. The paper uses the true class: pass the labels.
        layers: L names or patterns, in the order the model runs them.
        steps, positions: as :func:`joint_attribution`.
        top_k: units to choose in each layer.
        reuse: resume every step at its layer instead of running the model from its input. What the earlier edits do to
            the rest is carried along as a derivative (forward mode), so the result is the same. Where an operation of
            the model has no forward derivative, everything is recomputed, with a warning.
        max_bytes: about how much autograd may keep at once.
        progress: show a bar.

    Returns: :class:`NeuronPath`, on the CPU.

    Raises: as :func:`joint_attribution`; ValueError for layers out of order or ``top_k`` above a layer's width.

    Cost, in passes forward and backward through the whole model for each input: ``(L + 1) m`` recomputed, about
    ``(L / 2 + 1) m`` with ``reuse``.

    Source: Wang et al. 2025, arXiv 2503.09046 (layer-progressive neuron locating) and the authors' code.

    >>> neuron_path(vit, images, labels, layers="blocks.*.mlp.act").path                                # [N, L]
    """
    names, n = _checked(model, inputs, target, layers, steps, max_bytes)
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
        raise ValueError(f"top_k must be an int of at least 1, not {top_k!r}")
    kind: type[Passes] = Resume if reuse else Recompute
    size, pieces = sizes(model, inputs, names, steps, max_bytes)
    waiting, done = batches(n, size), 0
    kept: list[tuple[Tensor, ...]] = []
    with tqdm(total=n * len(names), desc="neuron path", disable=not progress) as bar:
        while waiting:
            chosen = waiting.pop(0)
            part, labels = forward.take(inputs, chosen), target_of(target, chosen)
            group = make_group(model, part, labels, names, steps, positions, pieces)
            _check_search(group, names, top_k)
            try:
                found = _search(model, group, top_k, kind, bar)
            except UnclearLayout:  # one input at a time needs no layout
                waiting = [slice(i, i + 1) for i in range(chosen.start, n)]
                bar.n = done
                continue
            except RuntimeError as error:
                if kind is Recompute or not _no_forward_derivative(error):
                    raise
                warnings.warn(f"recomputing every step in full: {str(error).splitlines()[0]}", stacklevel=3)
                kind, bar.n = Recompute, done
                waiting.insert(0, chosen)
                continue
            done = bar.n
            kept.append(tuple(t.cpu() for t in found))
    path, scores, activations, joint = map(torch.cat, zip(*kept, strict=True))
    if top_k == 1:
        path, scores, activations = path.squeeze(2), scores.squeeze(2), activations.squeeze(2)
    return NeuronPath(tuple(names), path, scores, activations, joint)


def _no_forward_derivative(error: RuntimeError) -> bool:
    """Whether an operation of the model cannot carry derivatives forward, and nothing else is wrong."""
    return isinstance(error, NotImplementedError) or "forward AD" in str(error) or "forward-mode" in str(error)


def _search(model: nn.Module, group: Group, top_k: int, kind: type[Passes], bar: tqdm) -> tuple[Tensor, ...]:
    """Path, scores and activations ``[g, L, k]``, and the joint score ``[g]``."""
    n = len(group.clean[0])
    path = torch.empty(n, 0, top_k, dtype=torch.long, device=group.clean[0].device)
    scores, activations = [], []
    with forward.evaluating(model):
        passes = [group.passes(kind, model, alphas) for alphas in group.pieces]
        for layer, clean in enumerate(group.clean):
            masks = group.masks(path)
            slopes, earlier = 0, 0
            for alphas, run in zip(group.pieces, passes, strict=True):
                rows = [group.rows(q, alphas, mask) for q, mask in enumerate(masks)]
                by_unit, by_path = run.slopes([*rows, group.rows(layer, alphas)], masks)
                slopes, earlier = slopes + by_unit, earlier + by_path
            own = clean.sum(1)
            before = torch.stack([own.new_zeros(n), *(a.sum(1) for a in activations)]).sum(0)
            score = (own + before[:, None]) / group.steps * (slopes + earlier[:, None])
            if not torch.isfinite(score).all():
                raise NotFinite(f"layer {group.sites[layer].name!r}: the scores hold NaN or infinite values")
            best, unit = score.topk(top_k, 1)
            path = torch.cat([path, unit[:, None]], 1)
            scores.append(best)
            activations.append(own.gather(1, unit))
            masks = group.masks(path)
            for alphas, run in zip(group.pieces, passes, strict=True):
                run.advance([group.rows(q, alphas, mask) for q, mask in enumerate(masks)], masks)
            bar.update(n)
        joint = _joint(model, group, path, passes)
    return path, torch.stack(scores, 1), torch.stack(activations, 1), joint


def _joint(model: nn.Module, group: Group, path: Tensor, passes: list[Passes] | None = None) -> Tensor:
    """The joint score of a path ``[g, L, k]``."""
    masks = group.masks(path)
    total, slope = 0, 0
    for clean, mask in zip(group.clean, masks, strict=True):
        total = total + (clean.sum(1) * mask).sum(1)
    with forward.evaluating(model):
        passes = passes or [group.passes(Recompute, model, alphas) for alphas in group.pieces]
        for alphas, run in zip(group.pieces, passes, strict=True):
            slope = slope + run.path_slope([group.rows(q, alphas, mask) for q, mask in enumerate(masks)], masks)
    return total / group.steps * slope


def _checked(model, inputs, target, layers, steps, max_bytes) -> tuple[list[str], int]:
    n = check(model, inputs, target)
    names = hooks.resolve(model, layers)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 2:
        raise ValueError(f"steps must be an int of at least 2, not {steps!r}: the first step is at 0")
    if max_bytes <= 0:
        raise ValueError(f"max_bytes must be positive, not {max_bytes}")
    return names, n


def _check_search(group: Group, names: list[str], top_k: int) -> None:
    if group.ran != names:
        raise ValueError(f"name the layers in the order they run: {', '.join(group.ran)}")
    for where, clean in zip(group.sites, group.clean, strict=True):
        if top_k > clean.shape[2]:
            raise ValueError(f"top_k is {top_k}, but layer {where.name!r} has {clean.shape[2]} units")


def _check_units(group: Group, path: Tensor) -> None:
    for layer, (where, clean) in enumerate(zip(group.sites, group.clean, strict=True)):
        units, width = path[:, layer], clean.shape[2]
        wrong = units[(units < 0) | (units >= width)]
        if wrong.numel():
            raise IndexError(f"unit {wrong[0].item()} is out of range; layer {where.name!r} has units 0 to {width - 1}")
        if (units.sort(1).values.diff(dim=1) == 0).any():
            raise ValueError(f"the path names a unit of layer {where.name!r} twice for one input")


def _checked_path(path: Tensor, n: int, layers: int) -> Tensor:
    path = torch.as_tensor(path)
    if path.is_floating_point() or path.dtype == torch.bool:
        raise TypeError(f"a path holds unit numbers (ints), not {path.dtype}")
    path = path.long().expand(n, -1) if path.ndim == 1 else path.long()
    path = path[:, :, None] if path.ndim == 2 else path
    if path.ndim != 3 or path.shape[:2] != (n, layers):
        raise ValueError(f"path must be [{layers}], [{n}, {layers}] or [{n}, {layers}, k], not {tuple(path.shape)}")
    return path
