"""Masks that shrink round by round, kept as one small integer a weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from nbkit.sparsity._masks import Masks


def rounds_survived(masks: Sequence[Masks]) -> dict[str, Tensor]:
    """How many of the masks after the first keep each weight, ``{parameter name: uint8}`` in the weights' shape.

    Where every mask lies within the one before, as in iterative pruning, the counts hold all of them
    (:func:`mask_of_round` takes one out again). The first mask must keep everything; up to 255 more may follow.

    Raises: ValueError where there are fewer than two masks or too many, where the first drops a weight, or where one
    keeps what an earlier one dropped.

    >>> survived = rounds_survived([dense, *masks_of_each_round])
    """
    if not 2 <= len(masks) <= 256:
        raise ValueError(f"masks must be 2 to 256 in number, the first keeping everything; there are {len(masks)}")
    if masks[0].sparsity > 0:
        raise ValueError(f"the first mask must keep everything; it drops {masks[0].sparsity:.1%}")
    for r, (earlier, later) in enumerate(zip(masks, masks[1:], strict=False), 1):
        if (earlier & later) != later:
            raise ValueError(f"the masks are not nested: mask {r} keeps a weight that mask {r - 1} had dropped")
    return {name: torch.stack([m[name] for m in masks[1:]]).sum(0).to(torch.uint8) for name in masks[0]}


def mask_of_round(survived: Mapping[str, Tensor], r: int) -> Masks:
    """The mask of round ``r`` out of :func:`rounds_survived`; round 0 keeps everything.

    Raises: IndexError for a negative round, or one after which no weight is left.

    >>> mask_of_round(survived, 3).sparsity
    """
    last = max((int(rounds.max()) for rounds in survived.values()), default=0)
    if not 0 <= r <= last:
        raise IndexError(f"round {r} is out of range; there are rounds 0 to {last}")
    return Masks({name: rounds >= r for name, rounds in survived.items()})
