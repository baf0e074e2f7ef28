"""Changing what layers put out: an edit selects neurons and positions and says what becomes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nbkit.errors import LayerDidNotRun, NotFinite
from nbkit.hooks._attach import attach, check_at
from nbkit.hooks._names import get_layer, neuron_axis
from nbkit.hooks._select import neuron_index, position_index


@dataclass(frozen=True)
class Edit:
    """One change to a layer: ``change`` maps the selected values and their neuron axis to new values.

    Made by :func:`zero`, :func:`scale`, :func:`clamp`, :func:`replace`; several in a list apply from left to right.
    The selected values have shape ``[N, p, k]`` where positions are named (``[N, k]`` for one position), else the
    layer's own layout with ``k`` neurons on the neuron axis. ``axis`` says which axis that is where
    :func:`neuron_axis` cannot know.
    """

    change: Callable[[Tensor, int], Tensor]
    neurons: Any = None
    positions: Any = None
    at: str = "output"
    label: str = "edit"
    axis: int | None = None

    def __call__(self, tensor: Tensor, module: nn.Module | None = None) -> Tensor:
        """The edited copy of ``tensor``; differentiable; ``tensor`` itself is not written to."""
        axis = neuron_axis(tensor, module) if self.axis is None else _named_axis(self.axis, tensor)
        index = neuron_index(self.neurons, tensor.shape[axis], tensor.device)
        if self.positions is None:
            part = tensor if index is None else tensor.index_select(axis, index)
            new = self._changed(part, axis)
            return new if index is None else tensor.index_copy(axis, index, new)
        moved = tensor.movedim(axis, -1)
        flat = moved.reshape(moved.shape[0], -1, moved.shape[-1])
        places, single = position_index(self.positions, tuple(moved.shape[1:-1]), tensor.device)
        units = torch.arange(flat.shape[-1], device=flat.device) if index is None else index
        part = flat[:, places[:, None], units]
        new = self._changed(part[:, 0] if single else part, -1)
        out = flat.clone()
        out[:, places[:, None], units] = new[:, None] if single else new
        out = out.reshape(moved.shape).movedim(-1, axis)
        # another memory layout would let the next convolution pick another kernel, with other last digits
        return out.contiguous() if tensor.is_contiguous() else out

    def _changed(self, part: Tensor, axis: int) -> Tensor:
        new = self.change(part, axis)
        if not isinstance(new, Tensor):
            raise TypeError(f"{self.label}: the replacement must be a tensor, not {type(new).__name__}")
        new = new.to(device=part.device, dtype=part.dtype)
        if new.shape == part.shape:
            return new
        try:
            return new.expand(part.shape).clone()  # what follows may work in place
        except RuntimeError:
            shapes = f"{tuple(new.shape)} does not fit the values it replaces, {tuple(part.shape)}"
            raise ValueError(f"{self.label}: a replacement of shape {shapes}") from None


def zero(neurons=None, *, positions=None, at: str = "output", axis: int | None = None) -> Edit:
    """Set neurons to 0. ``neurons``: None (all), int, ints, slice, bool mask; the rest as in :func:`edit`."""
    return Edit(lambda part, axis: _cleared(part), neurons, positions, at, "zero", axis)


def scale(
    neurons=None, k: float | Tensor = 1.0, *, positions=None, at: str = "output", axis: int | None = None
) -> Edit:  # fmt: skip
    """Multiply neurons by ``k``, a number or one number a selected neuron ``[k]``. Raises NotFinite."""
    factor = _finite(k, "scale")
    return Edit(lambda part, axis: part * _per_neuron(factor, part, axis), neurons, positions, at, "scale", axis)


def clamp(
    neurons=None, value: float | Tensor = 0.0, *, positions=None, at: str = "output", axis: int | None = None
) -> Edit:  # fmt: skip
    """Hold neurons at ``value``, a number or one number a selected neuron ``[k]``. Raises NotFinite."""
    held = _finite(value, "clamp")

    def change(part: Tensor, axis: int) -> Tensor:
        return _cleared(part) + _per_neuron(held, part, axis)

    return Edit(change, neurons, positions, at, "clamp", axis)


def replace(
    value: Tensor | Callable[[Tensor], Tensor], neurons=None, *, positions=None, at: str = "output",
    axis: int | None = None,
) -> Edit:  # fmt: skip
    """Put a tensor, or ``fn(selected values)``, in place of the selected values (shapes: see :class:`Edit`).

    Raises: TypeError (neither), NotFinite (a tensor with NaN or infinite values).
    """
    if isinstance(value, Tensor):
        _finite(value, "replace")
    elif not callable(value):
        raise TypeError(f"replace takes a tensor or a function of one, not {type(value).__name__}")

    def change(part: Tensor, axis: int) -> Any:
        new = value if isinstance(value, Tensor) else value(part)
        # a copy: an in-place activation that follows would write into the caller's tensor
        return new.clone() if isinstance(new, Tensor) else new

    return Edit(change, neurons, positions, at, "replace", axis)


@contextmanager
def edit(model: nn.Module, edits: Mapping[str, Edit | Sequence[Edit]]) -> Iterator[nn.Module]:
    """Run the model with some of its values changed; autograd flows through the edits.

    Args:
        edits: layer name -> an :class:`Edit` or a list of them (applied from left to right).

    An edit selects neurons (module docstring) and, optionally, positions: for tokens ``[N, T, F]`` an int, ints or a
    slice (negative ints count from the end); for maps ``[N, C, H, W]`` a pair ``(row, column)`` or a list of pairs;
    or a bool mask over the position axes. ``at="input"`` edits what the layer takes in. ``axis`` names the axis that
    counts neurons (negative: from the end) where :func:`neuron_axis` cannot know: 1 for a ReLU after a Conv1d.

    Raises: LayerNotFound; TypeError (not an Edit); in the forward, IndexError (neuron, position or axis out of range)
    and ValueError (a replacement that does not fit); on leaving, LayerDidNotRun where the model ran without the layer.

    >>> with edit(model, {"blocks.3.mlp.act": scale([7], 2.0, positions=0)}):
    ...     model(x)
    """
    if not isinstance(edits, Mapping):
        raise TypeError(f"edits must be a dict of layer names, not {type(edits).__name__}")
    plan: list[tuple[str, Edit]] = []
    for name, wanted in edits.items():
        get_layer(model, name)
        for one in wanted if isinstance(wanted, (list, tuple)) else [wanted]:
            if not isinstance(one, Edit):
                raise TypeError(f"layer {name!r}: an edit is zero, scale, clamp or replace, not {type(one).__name__}")
            check_at(one.at)
            plan.append((name, one))
    ran: set[str] = set()
    passes: list[int] = []

    def apply(tensor: Tensor, module: nn.Module, name: str, one: Edit) -> Tensor:
        ran.add(name)
        try:
            return one(tensor, module)
        except IndexError as error:
            raise IndexError(f"layer {name!r}: {error}") from None

    with ExitStack() as stack:
        stack.callback(model.register_forward_hook(lambda *_: passes.append(1)).remove)
        for name, one in plan:
            stack.callback(attach(get_layer(model, name), one.at, lambda t, m, n=name, e=one: apply(t, m, n, e)))
        yield model
    missed = [name for name, _ in plan if name not in ran]
    if passes and missed:
        raise LayerDidNotRun(f"layer {missed[0]!r} did not run in the forward pass, so its edit had no effect")


def _named_axis(axis: int, tensor: Tensor) -> int:
    if isinstance(axis, bool) or not isinstance(axis, int):
        raise TypeError(f"axis must be an int, not {axis!r}")
    if not -tensor.ndim < axis < tensor.ndim or axis == 0:
        raise IndexError(f"axis {axis} cannot count the neurons of shape {tuple(tensor.shape)}; axis 0 counts examples")
    return axis % tensor.ndim


def _cleared(part: Tensor) -> Tensor:
    # zeros that stay in the graph: what lies below gets a gradient of zero instead of an autograd error
    return part.masked_fill(torch.ones_like(part, dtype=torch.bool), 0)


def _finite(value: float | Tensor, label: str) -> Tensor:
    try:
        value = torch.as_tensor(value, dtype=None if isinstance(value, Tensor) else torch.get_default_dtype())
    except (TypeError, ValueError):
        raise TypeError(f"{label}: the value must be a number or a tensor, not {value!r}") from None
    if (bad := (~torch.isfinite(value)).sum().item()) > 0:
        shown = value.item() if value.ndim == 0 else f"{bad} NaN or infinite values of {value.numel()}"
        raise NotFinite(f"{label}: the value must be finite, not {shown}")
    return value


def _per_neuron(value: Tensor, part: Tensor, axis: int) -> Tensor:
    value = value.to(device=part.device, dtype=part.dtype)
    if value.ndim != 1:
        return value
    if value.shape[0] not in (1, part.shape[axis]):
        raise ValueError(f"{value.shape[0]} values were given for {part.shape[axis]} neurons; give one, or one each")
    shape = [1] * part.ndim
    shape[axis] = -1
    return value.view(shape)
