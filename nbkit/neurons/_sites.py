"""Where a neuron is read: a layer at chosen positions, as rows ``[N, P, F]`` (examples, positions, neurons)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from nbkit import forward, hooks
from nbkit._rows import check_target
from nbkit.hooks._attach import attach
from nbkit.hooks._select import position_index

REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda rows: rows.mean(1),
    "sum": lambda rows: rows.sum(1),
    "max": lambda rows: rows.amax(1),
}


@dataclass(frozen=True)
class Site:
    """One layer and the positions its neurons are read at (``None``: everywhere, and for ``[N, F]`` layers)."""

    name: str
    module: nn.Module
    positions: Any = None

    def rows(self, tensor: Tensor) -> Tensor:
        """The neurons of the layer's output ``tensor`` at the site's positions, ``[N, P, F]``."""
        moved = tensor.movedim(hooks.neuron_axis(tensor, self.module), -1)
        flat = moved.reshape(moved.shape[0], -1, moved.shape[-1])
        if self.positions is None:
            return flat
        places, _ = position_index(self.positions, tuple(moved.shape[1:-1]), tensor.device)
        return flat[:, places]

    def overwrite(self, rows: Tensor) -> hooks.Edit:
        """An edit that puts ``rows`` ``[N, P, F]`` where the site is; autograd and forward-mode flow into them."""

        def change(part: Tensor, axis: int) -> Tensor:
            # a copy: what follows may work in place, which a leaf of autograd does not allow
            return rows.reshape(part.movedim(axis, -1).shape).movedim(-1, axis).clone()

        return hooks.Edit(change, None, self.positions, label="overwrite")


def site(
    module: nn.Module, name: str, tensor: Tensor, positions: Any, examples: int, *, whole_maps: bool = False
) -> Site:
    """The site of a layer whose output is ``tensor``; position 0 of a layer without positions is the layer itself,
    and with ``whole_maps`` that of a map is the whole map.

    Raises: ValueError (positions that the layer does not have, an output whose axis 0 does not count examples),
    IndexError (a position out of range).
    """
    shape = tuple(tensor.shape)
    if shape[0] != examples:
        raise ValueError(f"layer {name!r} puts out {shape} for {examples} examples; axis 0 must count examples")
    if type(positions) is int and positions == 0:
        if tensor.ndim == 2 or (whole_maps and tensor.ndim > 3):
            positions = None
    found = Site(name, module, positions)
    try:
        found.rows(tensor[:1])
    except (ValueError, IndexError) as error:
        hint = ""
        if tensor.ndim > 3 and isinstance(positions, int):
            hint = "; name a place (row, column), or None for the whole map"
        raise type(error)(f"layer {name!r}: {error}{hint}") from None
    return found


class Observed(NamedTuple):
    """What :func:`observe` saw; ``sites`` and ``rows`` in the order the layers were named, ``ran`` in that they ran."""

    output: Any
    sites: list[Site]
    rows: list[Tensor]
    ran: list[str]


def observe(
    model: nn.Module, inputs: forward.Inputs, layers: str | Iterable[str], positions: Any, *, whole_maps: bool = False
) -> Observed:
    """One clean forward: the model's output, and the rows ``[N, P, F]`` of some layers.

    Raises: LayerNotFound, LayerDidNotRun, and as :func:`site`.
    """
    names = hooks.resolve(model, layers)
    modules = {name: hooks.get_layer(model, name) for name in names}
    ran: list[str] = []
    with ExitStack() as stack:
        stack.enter_context(forward.evaluating(model))
        stack.enter_context(torch.no_grad())
        for name, module in modules.items():
            stack.callback(module.register_forward_hook(lambda *_, name=name: ran.append(name)).remove)
        acts = stack.enter_context(hooks.record(model, names, to=None))
        output = forward.call(model, inputs)
    n = forward.batch_size(inputs)
    check_axes(model, inputs, acts, n)
    sites = [site(modules[name], name, acts[name], positions, n, whole_maps=whole_maps) for name in names]
    return Observed(output, sites, [s.rows(acts[s.name]) for s in sites], ran)


_COUNTED: WeakKeyDictionary[nn.Module, set] = WeakKeyDictionary()  # layers and lengths looked at already


def check_axes(model: nn.Module, inputs: forward.Inputs, acts: Mapping[str, Tensor], n: int) -> None:
    """Raise ValueError for a layer whose axis 0 has the length of the examples and counts something else.

    Steps of time, or rows of a parameter, happen to be as many: for one example there would be one row, and is not.
    """
    seen = _COUNTED.setdefault(model, set())
    doubtful = [name for name, act in acts.items() if n > 1 and act.shape[0] == n and (name, n) not in seen]
    if not doubtful:
        return
    with forward.evaluating(model), torch.no_grad(), hooks.record(model, doubtful, to=None) as alone:
        forward.call(model, forward.take(inputs, slice(0, 1)))
    for name in doubtful:
        if name in alone and alone[name].shape[0] != 1:
            raise ValueError(
                f"layer {name!r} puts out {tuple(alone[name].shape)} for one example and {tuple(acts[name].shape)} for "
                f"{n}; axis 0 must count examples"
            )
        seen.add((name, n))


@contextmanager
def overwriting(sites: Iterable[Site], rows: Iterable[Tensor]) -> Iterator[None]:
    """Put ``rows`` where ``sites`` are, in every forward inside the context.

    Unlike ``hooks.edit`` it does not mind a layer that did not run: a resumed forward skips some on purpose.
    """
    with ExitStack() as stack:
        for where, values in zip(sites, rows, strict=True):
            stack.callback(attach(where.module, "output", where.overwrite(values)))
        yield


def reduced(rows: Tensor, how: str | None) -> Tensor:
    """``[N, P, F]`` to ``[N, F]`` by ``"mean"``, ``"sum"`` or ``"max"`` over positions; ``None`` keeps them."""
    if how is None:
        return rows
    if how not in REDUCTIONS:
        raise ValueError(f"reduce must be one of {', '.join(map(repr, REDUCTIONS))} or None, not {how!r}")
    return REDUCTIONS[how](rows)


def check(model: nn.Module, inputs: forward.Inputs, target: forward.Target = None) -> int:
    """Check inputs, device and a tensor of targets; the number of examples."""
    forward.check_inputs(inputs)
    forward.check_device(model, inputs)
    n = forward.batch_size(inputs)
    check_target(target, n)
    return n
