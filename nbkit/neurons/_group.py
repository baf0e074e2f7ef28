"""Inputs whose rows fit in memory together: every input at every step of the integral."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nbkit import forward
from nbkit._rows import batches, target_of
from nbkit.neurons._passes import Passes
from nbkit.neurons._replay import graph_bytes
from nbkit.neurons._sites import Site, observe, overwriting


@dataclass
class Group:
    """Some inputs whose rows (every input at every step) fit in memory together, and what is known about them."""

    inputs: forward.Inputs
    sites: list[Site]
    clean: list[Tensor]  # [g, P, F] a layer
    ran: list[str]
    score: Callable[[Any, Tensor], Tensor]  # of an output and the input each of its rows copies
    steps: int
    pieces: list[Tensor]  # the steps 0, 1/m, ..., (m-1)/m, in the pieces that run together

    def masks(self, path: Tensor) -> list[Tensor]:
        """``[g, F]`` a layer, True at the path's units ``[g, L, k]``."""
        found = []
        for layer, clean in enumerate(self.clean[: path.shape[1]]):
            blank = torch.zeros(clean.shape[0], clean.shape[2], dtype=torch.bool, device=clean.device)
            found.append(blank.scatter(1, path[:, layer], True))
        return found

    def rows(self, layer: int, alphas: Tensor, mask: Tensor | None = None) -> Tensor:
        """The clean rows scaled by every step (where ``mask`` is True), step by step, ``[m*g, P, F]``."""
        clean = self.clean[layer]
        factor = alphas.view(-1, 1, 1, 1)
        factor = factor if mask is None else torch.where(mask[None, :, None, :], factor, torch.ones_like(factor))
        return (factor * clean).flatten(0, 1)

    def passes(self, kind: type[Passes], model: nn.Module, alphas: Tensor) -> Passes:
        """What runs the model on one row for each input at each of ``alphas``, step by step."""
        n = len(self.clean[0])
        index = torch.arange(n, device=alphas.device).repeat(len(alphas))
        score = lambda output: self.score(output, index)  # noqa: E731
        return kind(model, forward.take(self.inputs, index), self.sites, score, n)


def make_group(
    model: nn.Module, inputs: forward.Inputs, target: forward.Target, names: list[str], steps: int, positions: Any,
    pieces: list[slice],
) -> Group:  # fmt: skip
    """One clean forward of ``inputs``: their rows, and the score of the paper (see ``joint_attribution``)."""
    output, sites, clean, ran = observe(model, inputs, names, positions)
    labels = forward.resolve_target(output, target)

    def score(output: Any, index: Tensor) -> Tensor:
        wanted = target_of(labels, index)
        if callable(wanted):
            return forward.scores(output, wanted)
        return forward.scores(forward.first_tensor(output).softmax(-1), wanted)

    if not callable(labels) and forward.first_tensor(output).shape[1] == 1:
        raise ValueError("the model has one output, whose softmax is always 1: pass a callable as target")
    dtype, device = clean[0].dtype, clean[0].device
    alphas = [torch.arange(p.start, p.stop, dtype=dtype, device=device) / steps for p in pieces]
    return Group(inputs, sites, clean, ran, score, steps, alphas)


def sizes(
    model: nn.Module, inputs: forward.Inputs, names: list[str], steps: int, max_bytes: int
) -> tuple[int, list[slice]]:  # fmt: skip
    """How many inputs to treat together, and the pieces of the steps to run at once, within ``max_bytes``."""
    one = forward.take(inputs, slice(0, 1))
    _, sites, rows, ran = observe(model, one, names, None)
    first = names.index(ran[0])

    def run_once():
        with forward.evaluating(model), torch.enable_grad():
            with overwriting([sites[first]], [rows[first].clone().requires_grad_()]):
                return forward.call(model, one)

    fitting = max(1, int(max_bytes // max(1, graph_bytes(model, run_once))))
    return max(1, fitting // steps), batches(steps, fitting)
