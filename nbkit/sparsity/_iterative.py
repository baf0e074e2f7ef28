"""Iterative magnitude pruning: train, drop the smallest weights, wind back, again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nbkit.sparsity._allocate import prune_surviving
from nbkit.sparsity._criteria import magnitude
from nbkit.sparsity._masks import Masks
from nbkit.sparsity._weights import prunable
from nbkit.training import state


class Round(NamedTuple):
    """One round: the mask it trained under, the trained state, and what ``train`` returned."""

    masks: Masks
    trained: dict[str, Tensor]
    result: Any


def iterative_magnitude(
    model: nn.Module,
    train: Callable[[nn.Module, Masks], Any],
    *,
    rounds: int,
    rate: float = 0.2,
    per_layer: Mapping[str, float] | None = None,
    scope: str = "layer",
    rewind_to: Mapping[str, Tensor] | None = None,
) -> list[Round]:
    """Rounds 0 (dense) to ``rounds``; ``model`` gives the values to wind back to and is left as it is.

    Each round starts from ``masks * rewind_to``, trains, and then loses the fraction ``rate`` of its surviving weights
    of smallest magnitude, in each layer or (``scope="global"``) of all together.

    Args:
        train: ``train(model, masks)`` trains in place with pruned weights held at 0 (``training.fit(...,
            post_step=masks.post_step)`` does) and returns whatever should be kept of it.
        per_layer: layers with a rate of their own, as in :func:`prune_surviving`.
        rewind_to: the values to wind back to, by default the model's own; say, those after a few steps of training.

    Raises: ValueError, before any training, where rounds is below 1, a rate is outside [0, 1) or a layer would be
    emptied; and after a training that moved pruned weights. LayerNotFound (per_layer).

    Source: Frankle and Carbin 2019 (arXiv 1803.03635), strategy 1; with ``rewind_to``, Frankle et al. 2019
    (arXiv 1903.01611).

    >>> found = iterative_magnitude(model, train, rounds=10, per_layer={"head": 0.1})
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, not {rounds}")
    options = {"scope": scope, "per_layer": per_layer}
    start = state(model) if rewind_to is None else dict(rewind_to)
    masks = Masks({name: torch.ones(w.shape, dtype=torch.bool) for name, w in prunable(model).items()})
    if scope == "layer":  # how many weights fall does not depend on their values: a bad rate shows before training
        rehearsal = masks
        for _ in range(rounds):
            rehearsal = prune_surviving(rehearsal, magnitude(model), rate, **options)
    prune_surviving(masks, magnitude(model), rate, **options)
    work, found = copy.deepcopy(model), []
    for r in range(rounds + 1):
        masks.rewind(work, start)
        result = train(work, masks)
        if any(w[~masks[name].to(w.device)].any() for name, w in prunable(work).items()):
            raise ValueError("train moved pruned weights: hold them at 0, as with post_step=masks.post_step")
        found.append(Round(masks, state(work), result))
        if r < rounds:
            masks = prune_surviving(masks, magnitude(work), rate, **options)
    return found
