"""Resuming a model's forward at a layer: what ran before comes from a cache.

A model is cut into *units*, the largest modules that hold none of the layers of interest, and those layers. Nothing
a unit computed before the first edit can change, so its recorded output stands in for it and the code between the
units (residual sums, reshapes) runs again. This needs no knowledge of the architecture: a unit called twice is
cached call by call, and one whose output cannot be kept simply runs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from nbkit import forward
from nbkit.errors import LayerDidNotRun
from nbkit.hooks._attach import attach

Calls = dict[nn.Module, list[Any]]  # what each unit returned, call by call; RUN for a call that has to run again
RUN = object()
_PLAIN = (Tensor, int, float, bool, complex, str, bytes, type(None))


class _Reached(BaseException):
    """Ends a forward at a layer; not an Exception, so that a model's own ``except`` does not swallow it."""


@dataclass(frozen=True)
class Dual:
    """A tensor and its derivative along a direction (``None`` where it is zero)."""

    primal: Tensor
    tangent: Tensor | None = None


def units(model: nn.Module, layers: Iterable[nn.Module]) -> list[nn.Module]:
    """The modules to cache when the forward is to be resumed at ``layers``: these, and the largest without any."""
    wanted = set(layers)
    found: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        container = isinstance(module, (nn.ModuleList, nn.ModuleDict))  # these are never called themselves
        if module in wanted or not (container or wanted.intersection(module.modules())):
            found.append(module)
            return
        for child in module.children():
            visit(child)

    visit(model)
    return found


def run(
    model: nn.Module, inputs: forward.Inputs, *, cached: Calls, keep: Sequence[nn.Module] = (),
    until: nn.Module | None = None,
) -> tuple[Any, Calls]:  # fmt: skip
    """One forward with the calls in ``cached`` answered from it.

    Returns the model's output (``None`` when it ended at ``until``) and what the modules ``keep`` returned, before any
    hook on them saw it: hooks act again each time. Nothing is kept of a forward that never came to ``until``.
    """
    kept: Calls = {}
    keeping = set(keep)

    def patch(module: nn.Module, original: Callable) -> Callable:
        known = cached.get(module, ())
        calls = iter(range(len(known)))

        def call(*args, **kwargs):
            i = next(calls, None)
            answered = i is not None and known[i] is not RUN
            output = _copied(known[i]) if answered else original(*args, **kwargs)
            if module in keeping:
                kept.setdefault(module, []).append(_kept(output))
            if module is until:
                raise _Reached
            return output

        return call

    with _patched({*cached, *keeping, *([until] if until is not None else [])}, patch):
        try:
            output = forward.call(model, inputs)
            return output, kept if until is None else {}
        except _Reached:
            return None, kept


def reach(model: nn.Module, inputs: forward.Inputs, module: nn.Module, at: str = "output") -> Tensor:
    """What a module puts out (takes in), with autograd; the forward ends there."""
    seen: list[Tensor] = []

    def stop(tensor: Tensor, module: nn.Module) -> None:
        seen.append(tensor)
        raise _Reached

    undo = attach(module, at, stop)
    try:
        forward.call(model, inputs)
    except _Reached:
        return seen[0]
    finally:
        undo()
    raise LayerDidNotRun("the layer did not run in the forward pass")


@contextmanager
def _patched(modules: Iterable[nn.Module], patch: Callable[[nn.Module, Callable], Callable]) -> Iterator[None]:
    before = [(m, m.__dict__.get("forward")) for m in modules]
    try:
        for module, _ in before:
            module.forward = patch(module, module.forward)
        yield
    finally:
        for module, own in before:
            if own is not None:
                module.forward = own
            else:
                module.__dict__.pop("forward", None)


def _copied(tree: Any) -> Any:
    """Copies, as what follows may work in place; none of one row seen many times, where torch refuses to write."""
    return tree_map(lambda v: v.clone() if isinstance(v, Tensor) and not _one_row(v) else v, tree)


def _one_row(tensor: Tensor) -> bool:
    return tensor.ndim > 0 and len(tensor) > 1 and tensor.stride(0) == 0


def _kept(output: Any) -> Any:
    if all(isinstance(v, _PLAIN) for v in tree_leaves(output)):
        return _copied(output)
    return RUN


def map_calls(calls: Calls, fn: Callable[[Any], Any], kind: type) -> Calls:
    """``fn`` of every value of type ``kind`` in what was kept."""
    change = lambda v: fn(v) if isinstance(v, kind) else v  # noqa: E731
    return {m: [c if c is RUN else tree_map(change, c) for c in recorded] for m, recorded in calls.items()}


class _LinearRule(TorchFunctionMode):
    """The forward derivative of a linear layer in one product; torch multiplies by the weight's zero tangent too."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not nn.functional.linear or kwargs or not all(isinstance(a, Tensor | None) for a in args):
            return func(*args, **kwargs)
        x, *parameters = args
        value, slope = forward_ad.unpack_dual(x)
        if slope is None or any(p is not None and forward_ad.unpack_dual(p).tangent is not None for p in parameters):
            return func(*args)
        return forward_ad.make_dual(func(value, *parameters), func(slope, parameters[0]))


@contextmanager
def forward_mode() -> Iterator[None]:
    """Carry derivatives forward (``torch.autograd.forward_ad``) with kernels that know how; no graph is kept."""
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        # the fused attention kernels have no forward derivative; the plain one gives the same numbers
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.no_grad(), forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH), _LinearRule():
            with warnings.catch_warnings():  # torch warns about itself at its first dual tensor
                warnings.simplefilter("ignore", DeprecationWarning)
                forward_ad.make_dual(torch.zeros(1), torch.zeros(1))
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def make_dual(value: Dual) -> Tensor:
    return value.primal if value.tangent is None else forward_ad.make_dual(value.primal, value.tangent)


def unpack_dual(tensor: Tensor) -> Dual:
    if not tensor.is_floating_point():
        return Dual(tensor)
    primal, tangent = forward_ad.unpack_dual(tensor)
    return Dual(primal.detach(), None if tangent is None else tangent.detach())


def graph_bytes(model: nn.Module, run_once: Callable[[], Any]) -> int:
    """Bytes autograd keeps for one call of ``run_once``, the model's own parameters and buffers left out."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}
    alive = []  # a freed block's address may come again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run_once()
    return sum(kept.values())
