"""Sparsity: score weights, choose which to keep, and hold a model to that choice.

>>> masks = magnitude_mask(model, 0.9)                        # or mask_from_scores(snip(model, x, y), 0.9)
>>> masks.apply(model)                                        # 90 % of the weights are 0
>>> with masks.enforced(model):                               # and stay 0 in training
...     fit(model, data)
>>> masks.report(), flops(model, x, masks=masks)              # what is left, and what it costs

Prunable are the weights of Linear and Conv layers; biases and normalisations are not (:func:`prunable`). A sparsity is
the fraction of those that is removed: exactly ``round(sparsity * N)`` weights (half to even, as torch's own pruning),
the earliest of equal scores first.

Criteria return ``{parameter name: scores}``: :func:`magnitude`, :func:`lamp`, :func:`snip`, :func:`taylor`,
:func:`logit_sensitivity`, :func:`random`. Allocations return ``{parameter name: density}``: :func:`uniform`,
:func:`erk`.
"""

from __future__ import annotations

from nbkit.sparsity._allocate import magnitude_mask, mask_from_densities, mask_from_scores, prune_surviving
from nbkit.sparsity._criteria import lamp, logit_sensitivity, magnitude, random, snip, taylor
from nbkit.sparsity._flops import flops, sparsity_report, transformer_macs
from nbkit.sparsity._iterative import Round, iterative_magnitude
from nbkit.sparsity._masks import Masks
from nbkit.sparsity._nested import mask_of_round, rounds_survived
from nbkit.sparsity._schedule import erk, schedule, uniform
from nbkit.sparsity._structured import structured
from nbkit.sparsity._weights import prunable

__all__ = [
    "Masks", "Round", "erk", "flops", "iterative_magnitude", "lamp", "logit_sensitivity", "magnitude",
    "magnitude_mask", "mask_from_densities", "mask_from_scores", "mask_of_round", "prunable", "prune_surviving",
    "random", "rounds_survived", "schedule", "snip", "sparsity_report", "structured", "taylor",
    "transformer_macs", "uniform",
]  # fmt: skip
