"""Attaching a function to the tensor a module puts out or takes in, whatever it is wrapped in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

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
    """``container`` with its first tensor (``forward.first_tensor``) replaced; the original is left as it is."""
    old = forward.first_tensor(container)
    if container is old:
        return new
    if isinstance(container, Mapping):
        values = {k: new if v is old else v for k, v in container.items()}
        return values if type(container) is dict else type(container)(**values)
    values = [new if v is old else v for v in container]
    return type(container)(*values) if hasattr(container, "_fields") else type(container)(values)


def check_at(at: str) -> None:
    if at not in ("output", "input"):
        raise ValueError(f"at must be 'output' or 'input', not {at!r}")
