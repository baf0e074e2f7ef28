"""What the score does when one neuron is silenced, for many neurons a forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from tqdm.auto import tqdm

from nbkit import forward, hooks
from nbkit._rows import batches, check_batch, target_of
from nbkit.errors import NotFinite
from nbkit.hooks._attach import attach
from nbkit.hooks._select import neuron_index
from nbkit.neurons._basic import _one
from nbkit.neurons._replay import Calls, map_calls, run, units
from nbkit.neurons._sites import Site, check, observe


@forward.outside_inference_mode
def ablation_effect(
    model: nn.Module, inputs: forward.Inputs, target: forward.Target = None, *, layer: str, neurons: Any = None,
    value: float | Tensor = 0.0, positions: Any = None, batch: int = 64, progress: bool = False,
) -> Tensor:  # fmt: skip
    """The change of the target's score when each neuron alone is set to ``value``: edited minus clean.

    Every row of a batch is a copy of an input with another neuron edited. What runs before the layer runs once an
    input, where its copies are seen to be the same as running copies; else once a batch.

    Args:
        target: None (the predicted class), an int, ints ``[N]``, or a callable on the model's output that gives one
            score a row, whatever the number of rows. For a class the score is the model's output (its logit).
        layer: a dotted name; its output is edited.
        neurons: None (all), int, ints, slice or bool mask.
        value: one number, or one a neuron ``[K]`` (a mean over data, for instance).
        positions: tokens, places in a map, or None for all: where the neuron is edited.
        batch: rows a forward.
        progress: show a bar.

    Returns: ``[N, K]``, one column a chosen neuron, in the unit of the score; on the CPU.

    Raises: LayerNotFound, LayerDidNotRun; IndexError (neuron, position or target out of range); ValueError; NotFinite.

    >>> ablation_effect(cnn, images, layer="features.8").min(1)                      # the neuron missed the most
    """
    n = check(model, inputs, target)
    check_batch(batch)
    kept = []
    with forward.evaluating(model), torch.no_grad(), tqdm(total=n, desc="ablation", disable=not progress) as bar:
        _, (where,), (rows,), _ = observe(model, forward.take(inputs, slice(0, 1)), _one(layer), positions)
        index = neuron_index(neurons, rows.shape[-1], rows.device)
        index = torch.arange(rows.shape[-1], device=rows.device) if index is None else index
        if not index.numel():
            raise ValueError("no neuron was chosen")
        values = _values(value, index, rows)
        copied = None  # whether copies of what ran before the layer will do: found out with the first batch
        for chosen in batches(n, max(1, batch // len(index))):  # examples whose neurons fit in one batch together
            part = forward.take(inputs, chosen)
            found, copied = _effects(model, part, target_of(target, chosen), where, index, values, batch, copied)
            kept.append(found.cpu())
            bar.update(chosen.stop - chosen.start)
    return torch.cat(kept)


def _effects(
    model, inputs, target, where: Site, neurons: Tensor, values: Tensor, batch: int, copied: bool | None
) -> tuple[Tensor, bool]:
    output = forward.call(model, inputs)
    labels = forward.resolve_target(output, target)
    clean = forward.scores(output, labels)
    n, k = len(clean), min(len(neurons), batch)
    copies = torch.arange(n, device=neurons.device).repeat_interleave(k)
    repeated = forward.take(inputs, copies)
    cached, copied = _before(model, inputs, repeated, copies, where, copied)
    effects = torch.empty(n, len(neurons), dtype=clean.dtype, device=clean.device)
    for start in range(0, len(neurons), k):
        start = min(start, len(neurons) - k)  # the last batch overlaps: every batch has the size that was cached
        edited = slice(start, start + k)
        undo = attach(where.module, "output", _one_a_row(where, neurons[edited].repeat(n), values[edited].repeat(n)))
        try:
            output, _ = run(model, repeated, cached=cached)
        except RuntimeError:  # something writes in place, into one row that stands for many
            if not copied:
                raise
            output = None
        finally:
            undo()
        if output is None:
            return _effects(model, inputs, target, where, neurons, values, batch, False)
        score = forward.scores(output, target_of(labels, copies))
        effects[:, edited] = score.unflatten(0, (n, k)) - clean[:, None]
    return effects, copied


def _before(model, inputs, repeated, copies: Tensor, where: Site, copied: bool | None) -> tuple[Calls, bool]:
    """What ran before the layer, for the repeated inputs: copies of what it gave for the inputs, or all run.

    Copies are right where axis 0 of all that was kept counts examples, and nothing looks across them: tried once.
    """
    keep, n = units(model, [where.module]), forward.batch_size(inputs)

    def kept(rows: forward.Inputs) -> Calls:
        return run(model, rows, cached={}, keep=keep, until=where.module)[1]

    def copy(t: Tensor) -> Tensor:
        if not t.ndim or len(t) != n:
            return t
        return t.expand(len(copies), *t.shape[1:]) if n == 1 else t[copies]

    if copied is not False:
        quick = map_calls(kept(inputs), copy, Tensor)
        if copied:
            return quick, True
    exact = kept(repeated)
    return exact, copied is None and _same(quick, exact)


def _same(a: Calls, b: Calls) -> bool:
    mine, theirs = (tree_leaves(list(calls.values())) for calls in (a, b))
    if a.keys() != b.keys() or len(mine) != len(theirs):
        return False
    pairs = [(x, y) for x, y in zip(mine, theirs, strict=True) if isinstance(x, Tensor) or isinstance(y, Tensor)]
    return all(
        isinstance(x, Tensor) and isinstance(y, Tensor) and x.shape == y.shape
        and torch.allclose(x.float(), y.float(), rtol=1e-4, atol=1e-5)
        for x, y in pairs
    )  # fmt: skip


def _one_a_row(where: Site, neurons: Tensor, values: Tensor) -> hooks.Edit:
    """An edit that sets neuron ``neurons[r]`` of row ``r`` to ``values[r]`` at the site's positions."""

    def change(part: Tensor, axis: int) -> Tensor:
        moved = part.movedim(axis, -1)
        shape = (len(neurons),) + (1,) * (moved.ndim - 2) + (-1,)
        mine = nn.functional.one_hot(neurons, moved.shape[-1]).bool().view(shape)
        return torch.where(mine, values.view(shape), moved).movedim(-1, axis)

    return hooks.Edit(change, None, where.positions, label="ablation")


def _values(value: float | Tensor, neurons: Tensor, rows: Tensor) -> Tensor:
    values = torch.as_tensor(value, dtype=rows.dtype, device=rows.device)
    if not torch.isfinite(values).all():
        raise NotFinite("value holds NaN or infinite values")
    if values.ndim > 1 or (values.ndim == 1 and len(values) != len(neurons)):
        raise ValueError(f"value must be a number or [{len(neurons)}], one a chosen neuron, not {tuple(values.shape)}")
    return values.expand(len(neurons))
