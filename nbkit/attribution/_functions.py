"""Seeing every function that a model applies to its tensors, whether a module or plain code calls it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class Rules(TorchFunctionMode):
    """Runs a model with some of its functions replaced, while in force (``with rules:``); the model is not touched.

    A subclass gives ``apply(name, func, args, kwargs)``, called for every torch function; ``name`` is the function's
    own name without the underscore of an in-place variant. Inside ``apply`` functions run as usual.
    """

    def apply(self, name: str, func: Any, args: tuple, kwargs: dict) -> Any:
        raise NotImplementedError

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", str(func))
        plain = name if name.startswith("__") else name.rstrip("_")
        return self.apply(plain, func, args, kwargs or {})


class LocatedRules(Rules):
    """Rules that know which layer is running, and can refuse a function by saying where it was met."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self._running: list[tuple[str, nn.Module]] = []
        self._refused: TypeError | None = None

    @property
    def place(self) -> tuple[str, nn.Module]:
        """Name of the innermost module that is running, and that module."""
        return self._running[-1] if self._running else ("", self.model)

    def refuse(self, why: str) -> NoReturn:
        """Stop with a TypeError that says where; an operator (``x * y``) would turn it into one about operand types."""
        name, module = self.place
        kind = type(module).__name__
        place = f"layer {name!r} ({kind})" if name else f"the forward of {kind}"
        self._refused = TypeError(f"{why}, met in {place}")
        raise self._refused

    @contextmanager
    def running(self) -> Iterator[None]:
        """Apply the rules to every forward inside the context.

        Raises: TypeError for a scripted or compiled model, whose functions cannot be seen.
        """
        for name, module in self.model.named_modules():
            if not transparent(module):
                kind = type(module).__name__
                raise TypeError(f"layer {name!r} is scripted or compiled ({kind}): its functions cannot be replaced")
        with ExitStack() as stack:
            for name, module in self.model.named_modules():
                stack.callback(module.register_forward_pre_hook(self._entering(name)).remove)
                stack.callback(module.register_forward_hook(self._leaving()).remove)
            stack.enter_context(self)
            try:
                yield
            except TypeError:
                if self._refused is not None:
                    raise self._refused from None
                raise
            finally:
                self._running.clear()

    def _entering(self, name: str):
        return lambda module, args: self._running.append((name, module))

    def _leaving(self):
        def leave(module, args, output):
            self._running.pop()

        return leave


def transparent(module: nn.Module) -> bool:
    """Whether the functions of a module can be seen: not scripted, not compiled."""
    return not isinstance(module, torch.jit.ScriptModule) and "_orig_mod" not in module._modules


def writes_in_place(func: Any, kwargs: dict) -> bool:
    """Whether a call overwrites its first argument (``relu_``, ``relu(x, inplace=True)``)."""
    name = getattr(func, "__name__", "")
    return bool(kwargs.get("inplace")) or (name.endswith("_") and not name.endswith("__"))


def finish(func: Any, args: tuple, kwargs: dict, result: Tensor) -> Tensor:
    """Hand back ``result``, writing it into the first argument where the function replaced would have done so."""
    return args[0].copy_(result) if writes_in_place(func, kwargs) else result
