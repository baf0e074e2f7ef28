"""Attaching a function to the tensor a module puts out or takes in, whatever it is wrapped in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nbkit import forward


def attach(module: nn.Module, at: str, fn: Callable[[Tensor, nn.Module], Tensor | None]) -> Callable[[], None]:
    """Call ``fn`` on the module's first output (input) tensor and pass on what it returns; gives back the undo."""

    def on_output(module, args, kwargs, output):
        new = fn(forward.first_tensor(output), module)
        return None if new is None else _swapped(output, new)

    def on_input(module, args, kwargs):
        if any(isinstance(a, Tensor) for a in args):
            new = fn(forward.first_tensor(args), module)
            return None if new is None else (_swapped(args, new), kwargs)
        new = fn(forward.first_tensor(kwargs), module)
        return None if new is None else (args, _swapped(kwargs, new))

    if at == "input":
        return module.register_forward_pre_hook(on_input, with_kwargs=True).remove
    return module.register_forward_hook(on_output, with_kwargs=True).remove


def _swapped(container: Any, new: Tensor) -> Any:
    """``container`` with its first tensor (``forward.first_tensor``) replaced; the original is left as it is.

    Whatever else it holds that repeats values of that tensor is replaced along with it: the last hidden state of a
    recurrent layer is the last step of its output.
    """
    old = forward.first_tensor(container)
    if container is old:
        return new
    if isinstance(container, Mapping):
        values = {k: _following(v, old, new) for k, v in container.items()}
        return values if type(container) is dict else type(container)(**values)
    return _like(container, [_following(v, old, new) for v in container])


def _like(container: Any, values: list) -> Any:
    return type(container)(*values) if hasattr(container, "_fields") else type(container)(values)


def _following(value: Any, old: Tensor, new: Tensor) -> Any:
    if value is old:
        return new
    if isinstance(value, (tuple, list)):
        return _like(value, [_following(v, old, new) for v in value])
    if not isinstance(value, Tensor) or value.ndim < 2 or value.shape[-1] == 0 or new.shape != old.shape:
        return value
    return _last_states(value, old, new)


def _last_states(states: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """``states`` [layers x directions, (N,) H] where they are the ends of the steps ``old`` [T, ...] or [N, T, ...]."""
    size = states.shape[-1]
    if old.ndim != states.ndim or old.shape[-1] % size:
        return states
    rows = list(states)
    for i, state in enumerate(rows):
        for first in range(0, old.shape[-1], size):
            columns = slice(first, first + size)
            ends = [(axis, end) for axis in range(old.ndim - 1) for end in (-1, 0)]
            for axis, end in ends:
                there = old.select(axis, end)[..., columns]
                if there.shape == state.shape and torch.equal(there, state):
                    rows[i] = new.select(axis, end)[..., columns]
    return torch.stack(rows) if any(a is not b for a, b in zip(rows, states, strict=True)) else states


def check_at(at: str) -> None:
    if at not in ("output", "input"):
        raise ValueError(f"at must be 'output' or 'input', not {at!r}")
