"""From scores to masks: how many weights go, from which layers, and when."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral, Real

import torch
from torch import Tensor, nn

from nbkit.sparsity._masks import Masks
from nbkit.sparsity._select import keep_largest
from nbkit.sparsity._weights import (
    Names,
    check_finite,
    check_scope,
    check_sparsity,
    prunable,
    same_names,
    select,
)


def magnitude_mask(
    model: nn.Module, sparsity: float, scope: str = "global", *, min_keep: int | float = 0, layers: Names = None,
    exclude: Names = (),
) -> Masks:  # fmt: skip
    """Masks that keep the largest weights of ``model``; the model itself is not changed.

    The same masks as ``mask_from_scores(magnitude(model), ...)``, without a copy of the weights: time grows with
    their number, memory with the masks (one byte a weight). See :func:`mask_from_scores` for the counts, ties,
    ``scope`` and ``min_keep``, and :func:`prunable` for ``layers`` and ``exclude``. Sparsity 0 gives masks of ones.

    Raises: ValueError (sparsity outside [0, 1), min_keep that cannot be met, nothing to prune), NotFinite (NaN or
    infinite weights), LayerNotFound.

    Source: global magnitude pruning, Gupta et al. 2022 (arXiv 2209.14624), with an exact count where the authors'
    code keeps everything at the threshold.

    >>> magnitude_mask(model, 0.95, min_keep=0.0005, exclude="head").apply(model)
    """
    sparsity = check_sparsity(sparsity)
    weights = prunable(model, layers=layers, exclude=exclude)
    check_finite(weights, "weight")
    return _masks(weights, sparsity, scope, min_keep, magnitudes=True)


def mask_from_scores(
    scores: Mapping[str, Tensor], sparsity: float, scope: str = "global", *, min_keep: int | float = 0
) -> Masks:
    """Masks that keep the weights with the largest scores.

    ``scores`` maps parameter names to tensors of the parameters' shapes, as the criteria return them.

    Counts are exact: ``round(sparsity * N)`` weights fall, half to even, as in ``torch.nn.utils.prune``. ``scope=
    "global"`` ranks all N scores together, ``"layer"`` each tensor by itself with its own N. Of equal scores the
    earlier falls first: the earlier tensor of ``scores``, then the lower flat index.

    ``min_keep`` protects a number of weights in every layer (int), or that fraction of all N (float, rounded down):
    the best ``min_keep`` of each layer are kept (all of a smaller one), and one global threshold over the rest makes
    up the same total. This mends layer collapse. Layers that would keep fewer by their own count make ``scope=
    "layer"`` impossible to meet.

    Raises: ValueError naming both numbers where ``min_keep`` asks for more weights than ``sparsity`` leaves;
    ValueError for sparsity outside [0, 1) or an unknown scope; NotFinite.

    >>> mask_from_scores({"w": torch.tensor([3.0, 1.0, 2.0, 4.0])}, 0.5)["w"]
    tensor([ True, False, False,  True])
    """
    sparsity = check_sparsity(sparsity)
    return _masks(_checked(scores), sparsity, scope, min_keep)


def mask_from_densities(scores: Mapping[str, Tensor], densities: Mapping[str, float]) -> Masks:
    """Masks that keep the given fraction of each layer: its weights with the largest scores.

    ``densities`` has the names of ``scores`` and values in [0, 1]: from :func:`erk`, :func:`uniform`, or
    ``masks.densities()`` for other weights in the same numbers. The total kept is ``sum(density * n)`` rounded, and
    layers round up by largest remainder, so that masks of equal sparsity have equal counts. Ties as in
    :func:`mask_from_scores`.

    Raises: ValueError (other names, a density outside [0, 1]), NotFinite.

    >>> mask_from_densities(random(model, seed=0), magnitude_mask(model, 0.9).densities())
    """
    scores = _checked(scores)
    same_names(scores, densities, "densities do not fit the scores")
    for name, density in densities.items():
        if not 0 <= density <= 1:
            raise ValueError(f"the density of {name!r} must lie in [0, 1]; it is {density}")
    exact = {name: densities[name] * scores[name].numel() for name in scores}
    # Rounding to 9 digits keeps (k / n) * n at k, so that densities taken from masks give back their counts.
    floors = {name: int(round(value, 9)) for name, value in exact.items()}
    spare = max(0, round(sum(exact.values())) - sum(floors.values()))
    upwards = sorted(exact, key=lambda name: floors[name] - exact[name])[:spare]
    kept = {name: floors[name] + (name in upwards) for name in scores}
    return _cpu({n: keep_largest([score], score.numel() - kept[n])[0] for n, score in scores.items()})


def prune_surviving(
    masks: Masks, scores: Mapping[str, Tensor], rate: float, *, scope: str = "layer",
    per_layer: Mapping[str, float] | None = None,
) -> Masks:  # fmt: skip
    """One round of iterative pruning: the fraction ``rate`` of the surviving weights, those of lowest score, falls.

    ``round(rate * survivors)`` fall (half to even) in each layer, or with ``scope="global"`` of all survivors ranked
    together. ``per_layer`` gives layers a rate of their own, ``{"fc3": 0.1}``; these are always ranked by
    themselves, and 0 leaves one alone. Ten weights at rate 0.2 go 10, 8, 6, 5. The masks are nested: nothing returns.

    Raises: ValueError (a rate outside [0, 1), other names or shapes, a layer left without a weight), NotFinite,
    LayerNotFound (unknown name in ``per_layer``).

    Source: Frankle and Carbin 2019 (arXiv 1803.03635), iterative pruning, strategy 1, step 3.

    >>> masks = prune_surviving(masks, magnitude(model), 0.2, per_layer={"output": 0.1})
    """
    check_scope(scope)
    scores = _checked(scores)
    same_names(masks, scores, "scores do not fit the masks")
    for name, mask in masks.items():
        if mask.shape != scores[name].shape:
            shapes = f"{tuple(mask.shape)} and {tuple(scores[name].shape)}"
            raise ValueError(f"mask and scores of {name!r} have shapes {shapes}")
    rates = dict.fromkeys(masks, check_sparsity(rate, "rate"))
    own: set[str] = set()
    for layer, layer_rate in (per_layer or {}).items():
        chosen = select(layer, masks)
        own |= chosen
        rates.update(dict.fromkeys(chosen, check_sparsity(layer_rate, f"rate of {layer!r}")))
    together = [n for n in masks if scope == "global" and n not in own]
    groups = ([together] if together else []) + [[n] for n in masks if n not in together]
    result: dict[str, Tensor] = {}
    for names in groups:
        gone = {n: ~masks[n].to(scores[n].device) for n in names}
        pruned = sum(int(torch.count_nonzero(gone[n])) for n in names)
        survivors = sum(masks[n].numel() for n in names) - pruned
        ranked = [scores[n].masked_fill(gone[n], -torch.inf) for n in names]
        result.update(zip(names, keep_largest(ranked, pruned + round(rates[names[0]] * survivors)), strict=True))
    for name in masks:
        if masks[name].any() and not result[name].any():
            raise ValueError(f"rate {rates[name]} would leave no weight of {name!r}; lower it there with per_layer")
    return _cpu({name: result[name] for name in masks})


def _masks(
    tensors: Mapping[str, Tensor], sparsity: float, scope: str, min_keep: int | float, *,
    magnitudes: bool = False,
) -> Masks:  # fmt: skip
    check_scope(scope)
    sizes = {name: t.numel() for name, t in tensors.items()}
    floors = _floors(sizes, min_keep)
    groups = [list(tensors)] if scope == "global" else [[name] for name in tensors]
    for names in groups:  # all checked before any work
        total, asked = sum(sizes[n] for n in names), sum(floors[n] for n in names)
        left = total - round(sparsity * total)
        if asked > left:
            where = f"{len(names)} layers" if scope == "global" else f"layer {names[0]!r}"
            raise ValueError(
                f"min_keep protects {asked} weights of {where}, but sparsity {sparsity} leaves {left} of {total}"
            )
    kept: dict[str, Tensor] = {}
    for names in groups:
        remove = round(sparsity * sum(sizes[n] for n in names))
        kept.update(_keep({n: tensors[n] for n in names}, remove, floors, magnitudes))
    return _cpu({name: kept[name] for name in tensors})


def _keep(
    tensors: dict[str, Tensor], remove: int, floors: Mapping[str, int], magnitudes: bool
) -> dict[str, Tensor]:
    """Protect the best ``floors[name]`` of each tensor, then rank the rest together.

    A layer above its floor keeps its protected weights anyway: they outrank the others it keeps. So only layers that
    fall below are set to exactly their floor, and the others ranked again, until none falls below.
    """
    masks: dict[str, Tensor] = {}
    free = dict(tensors)
    while free:
        ranked = dict(zip(free, keep_largest(list(free.values()), remove, magnitudes=magnitudes), strict=True))
        short = [n for n, mask in ranked.items() if floors[n] and int(torch.count_nonzero(mask)) < floors[n]]
        if not short:
            return masks | ranked
        for name in short:
            tensor = free.pop(name)
            masks[name] = keep_largest([tensor], tensor.numel() - floors[name], magnitudes=magnitudes)[0]
            remove -= tensor.numel() - floors[name]
    return masks


def _floors(sizes: Mapping[str, int], min_keep: int | float) -> dict[str, int]:
    if isinstance(min_keep, bool) or not isinstance(min_keep, Real):
        raise TypeError(f"min_keep must be an int or a float, not {type(min_keep).__name__}")
    if not 0 <= min_keep or not (isinstance(min_keep, Integral) or min_keep < 1):
        raise ValueError(f"min_keep must be a number of weights >= 0, or a fraction in [0, 1); it is {min_keep}")
    floor = int(min_keep) if isinstance(min_keep, Integral) else int(min_keep * sum(sizes.values()))
    return {name: min(floor, size) for name, size in sizes.items()}


def _checked(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if not scores or not any(s.numel() for s in scores.values()):
        raise ValueError("there are no scores to rank")
    check_finite(scores, "scores of")
    return dict(scores)


def _cpu(masks: dict[str, Tensor]) -> Masks:
    return Masks({name: mask.cpu() for name, mask in masks.items()})
