"""The passes a path search makes through the model: each from the start, or each resumed at its layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nbkit import forward
from nbkit.neurons._replay import Calls, Dual, forward_mode, make_dual, map_calls, run, units, unpack_dual
from nbkit.neurons._sites import Site, overwriting


class UnclearLayout(Exception):
    """It cannot be told which axis of a cached tensor counts rows."""


class Passes:
    """Derivatives of the score by the path's units and by the candidate units of the next layer.

    Everywhere below, ``rows`` are what layers 0, 1, ... are overwritten with, ``[R, P, F]`` each, and ``masks`` say
    which units are on the path, ``[g, F]`` each. The R rows are g inputs at some steps, step by step; results are
    summed over steps.
    """

    def __init__(self, model: nn.Module, inputs: forward.Inputs, sites: Sequence[Site], score: Callable[[Any], Tensor],
                 examples: int):  # fmt: skip
        self.model, self.inputs, self.sites, self.score, self.examples = model, inputs, list(sites), score, examples

    def slopes(self, rows: list[Tensor], masks: list[Tensor]) -> tuple[Tensor, Tensor]:
        """With the last of ``rows`` a whole row of candidates: dP/dw for each ``[g, F]``, and summed over the path's
        units in the layers before ``[g]``."""
        raise NotImplementedError

    def advance(self, rows: list[Tensor], masks: list[Tensor]) -> None:
        """The next layer's units are chosen; ``rows`` and ``masks`` now include them."""

    def path_slope(self, rows: list[Tensor], masks: list[Tensor]) -> Tensor:
        """dP/dw summed over all units of the whole path, ``[g]``."""
        raise NotImplementedError

    def by_example(self, values: Tensor) -> Tensor:
        """``[R, ...]`` summed to one number an input, ``[g]``."""
        return values.reshape(-1, self.examples, values[0].numel()).sum((0, 2))

    def directions(self, masks: list[Tensor], rows: list[Tensor]) -> list[Tensor]:
        """1 at the path's units and 0 elsewhere, in the shape of ``rows``."""
        return [
            m[None, :, None, :].expand(r.shape[0] // self.examples, -1, r.shape[1], -1).flatten(0, 1).to(r.dtype)
            for m, r in zip(masks, rows, strict=False)
        ]

    def gradients(self, rows: list[Tensor], by: list[Tensor], cached: Calls) -> list[Tensor | None]:
        """Derivatives of the summed scores by each of ``by``, with the layers of ``rows`` overwritten."""
        with torch.enable_grad(), overwriting(self.sites[: len(rows)], rows):
            output, _ = run(self.model, self.inputs, cached=cached)
            score = self.score(output)
            if not score.requires_grad:
                return [None] * len(by)
            return list(torch.autograd.grad(score.sum(), by, allow_unused=True))


class Recompute(Passes):
    """Every pass runs the whole model: the plain reading of the method."""

    def slopes(self, rows, masks):
        leaves = [r.detach().requires_grad_() for r in rows]
        *earlier, last = self._gradients(leaves)
        total = last.new_zeros(self.examples)
        for grad, direction in zip(earlier, self.directions(masks, rows), strict=True):
            total = total + self.by_example(grad * direction)
        return last.sum(1).unflatten(0, (-1, self.examples)).sum(0), total

    def path_slope(self, rows, masks):
        leaves = [r.detach().requires_grad_() for r in rows]
        pairs = zip(self._gradients(leaves), self.directions(masks, rows), strict=True)
        return torch.stack([self.by_example(grad * direction) for grad, direction in pairs]).sum(0)

    def _gradients(self, leaves: list[Tensor]) -> list[Tensor]:
        grads = self.gradients(leaves, leaves, cached={})
        return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, grads, strict=True)]


class Resume(Passes):
    """Every pass starts at its layer.

    The edits before it are fixed by then, and the search needs only the *sum* of the derivatives by the path's units:
    one directional derivative. It is carried forward to the layer once (the tangents of what is cached) and meets
    there the gradients that the backward pass brings: the sum over cached tensors of <gradient, tangent>. Carried on
    to the end, it is the derivative in the joint score.
    """

    def __init__(self, *args):
        super().__init__(*args)
        self.cached: Calls = {}  # units -> what they returned, Dual where it is a tensor
        self.layer = -1
        self.final: Tensor | None = None
        self.advance([], [])

    def slopes(self, rows, masks):
        leaves: list[Tensor] = []
        tangents: list[Tensor] = []

        def leaf(value: Dual) -> Tensor:
            if value.tangent is None:
                return value.primal
            leaves.append(value.primal.detach().requires_grad_())
            tangents.append(value.tangent)
            return leaves[-1]

        cached = map_calls(self.cached, leaf, Dual)
        # a layer whose own output is cached is edited again; those within a larger unit do not run
        rows = [r.detach().requires_grad_() for r in rows]
        leaves += rows[:-1]
        tangents += self.directions(masks, rows)
        last, *earlier = self.gradients(rows, [rows[-1], *leaves], cached)
        last = torch.zeros_like(rows[-1]) if last is None else last
        total = last.new_zeros(self.examples)
        for grad, tangent in zip(earlier, tangents, strict=True):
            if grad is not None:
                total = total + self._meet(grad, tangent, len(last))
        return last.sum(1).unflatten(0, (-1, self.examples)).sum(0), total

    def advance(self, rows, masks):
        self.layer += 1
        remaining = [s.module for s in self.sites[self.layer :]]
        keep = units(self.model, remaining) if remaining else []
        with forward_mode():
            duals = [make_dual(Dual(r, d)) for r, d in zip(rows, self.directions(masks, rows), strict=True)]
            with overwriting(self.sites[: len(rows)], duals):
                cached = map_calls(self.cached, make_dual, Dual)
                until = remaining[0] if remaining else None
                output, kept = run(self.model, self.inputs, cached=cached, keep=keep, until=until)
            self.cached = map_calls(kept, unpack_dual, Tensor)
            if until is None:
                final = unpack_dual(self.score(output))
                self.final = torch.zeros_like(final.primal) if final.tangent is None else final.tangent

    def path_slope(self, rows, masks):
        return self.by_example(self.final)

    def _meet(self, grad: Tensor, tangent: Tensor, rows: int) -> Tensor:
        product = grad * tangent
        if self.examples == 1:
            return product.sum()[None]
        # Rows are counted by axis 0 unless another axis could hold them: [T, N, F] layouts, windows of a map.
        if product.shape[0] != rows or any(size % rows == 0 for size in product.shape[1:]):
            raise UnclearLayout
        return self.by_example(product)
