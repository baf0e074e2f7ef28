"""Going on with some of the tokens: everything else a block is given, masks and rotary terms, is cut along."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nbkit import forward
from nbkit.errors import LayerDidNotRun
from nbkit.hooks._names import get_layer

Chooser = Callable[[Tensor], Tensor | tuple[Tensor, Tensor]]


@contextmanager
def narrow(model: nn.Module, choosers: Mapping[str, Chooser], *, renumber: bool = False) -> Iterator[Mapping]:
    """Inside, the model goes on with the chosen tokens alone from each named block on.

    Args:
        choosers: name of a transformer block (a module that takes the hidden states ``[N, T, D]``) -> a function of
            those states as they come in that returns the places to keep, ints ``[N, k]`` or ``[k]`` for all examples,
            in any order: kept tokens stay in their own. It may return a pair, the places and states ``[N, k, D]`` to
            go on with in their stead (row j belongs to place j), such as merged ones.
        renumber: kept tokens get the positions 0 to k - 1 (rotary terms, position ids). By default each keeps its own.

    Yields: a mapping of each named block to the places it kept in the last pass, ``[N, k]``, counted from 0 in the
    tokens of the whole sequence, on the model's device. It is filled as the blocks run.

    The siblings that run behind a narrowing block (members of the same ``ModuleList`` or ``Sequential``) are given by
    the model whatever belongs to all tokens; it is cut there too: of an argument with ``mask`` in its name every axis
    of the last two that counts tokens, of any other tensor (position ids ``[N, T]``, the pair of rotary terms
    ``[N, T, d]``) the second. Arguments that begin with ``encoder_`` belong to another sequence and stay. What the
    model does after the blocks sees ``k`` tokens: logits ``[N, k, V]``, a class token at 0 if it was kept.

    Raises: TypeError, LayerNotFound; in the forward ValueError (places that are not ints ``[N, k]``, out of range,
    twice; hidden states that are not ``[N, T, D]``; a cache that holds earlier tokens already); on leaving,
    LayerDidNotRun where the model ran without the block.

    >>> with narrow(vit, {"blocks.3": lambda h: h[:, 1:].norm(dim=-1).topk(24).indices + 1}) as kept:
    ...     logits = vit(x)
    """
    if not isinstance(choosers, Mapping):
        raise TypeError(f"choosers must be a dict of block names, not {type(choosers).__name__}")
    for name, chooser in choosers.items():
        get_layer(model, name)
        if not callable(chooser):
            raise TypeError(f"block {name!r}: a chooser is a function of hidden states, not {type(chooser).__name__}")
    state = _Narrowing(choosers, renumber)
    with ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(state.begin, with_kwargs=True).remove)
        stack.callback(model.register_forward_hook(lambda *_: state.end()).remove)
        for parent in dict.fromkeys(name.rpartition(".")[0] for name in choosers):
            container = get_layer(model, parent) if parent else model
            for child, block in container.named_children():
                name = f"{parent}.{child}" if parent else child
                hook = block.register_forward_pre_hook(state.hook(name, parent), with_kwargs=True)
                stack.callback(hook.remove)
        yield state.kept
    missed = [name for name in choosers if name not in state.kept]
    if state.passes and missed:
        raise LayerDidNotRun(f"block {missed[0]!r} did not run in the forward pass, so no token was left out there")


class _Narrowing:
    """What has been left out so far in the pass that runs, a list of places for each container of blocks."""

    def __init__(self, choosers: Mapping[str, Chooser], renumber: bool):
        self.choosers, self.renumber, self.passes = choosers, renumber, 0
        self.kept: dict[str, Tensor] = {}
        self.places: dict[str, tuple[Tensor, int]] = {}  # container -> places left, tokens at its start

    def begin(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        for value in (*args, *kwargs.values()):
            if callable(getattr(value, "get_seq_length", None)) and value.get_seq_length() > 0:
                raise ValueError("the cache holds earlier tokens already; narrow a pass without one")
        self.places.clear()
        self.kept.clear()

    def end(self) -> None:
        self.places.clear()
        self.passes += 1

    def hook(self, name: str, container: str):
        def before(block: nn.Module, args: tuple, kwargs: dict):
            chosen = name in self.choosers
            if not chosen and container not in self.places:
                return None
            hidden = forward.first_tensor(args if any(isinstance(a, Tensor) for a in args) else kwargs)
            if hidden.ndim != 3:
                raise ValueError(f"block {name!r} takes {tuple(hidden.shape)}, not hidden states [N, T, D]")
            new = hidden
            if chosen:
                new = self._choose(name, container, hidden)
            places, tokens = self.places[container]
            if new.shape[1] != places.shape[1]:
                counts = f"{new.shape[1]} tokens where {places.shape[1]} are left"
                raise ValueError(f"block {name!r} was given {counts}: it does not follow on the narrowed blocks")
            names = inspect.signature(block.forward).parameters
            cut = _Cut(hidden, new, places, tokens, self.renumber)
            given = dict(zip(names, args, strict=False))  # what lies in *args beyond them has no name, and stays
            args = (*(cut(k, v) for k, v in given.items()), *args[len(given) :])
            return args, {k: cut(k, v) for k, v in kwargs.items()}

        return before

    def _choose(self, name: str, container: str, hidden: Tensor) -> Tensor:
        answer = self.choosers[name](hidden)
        index, new = answer if isinstance(answer, tuple) else (answer, None)
        index = _checked(name, index, hidden)
        order = index.argsort(-1)
        index = index.gather(1, order)
        at = index.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
        if new is None:
            new = hidden.gather(1, at)
        elif not isinstance(new, Tensor) or new.shape != at.shape:
            shape = tuple(getattr(new, "shape", ()))
            raise ValueError(f"block {name!r}: states of shape {shape} were given for {tuple(at.shape)}")
        else:
            new = new.to(hidden).gather(1, order.unsqueeze(-1).expand_as(new))
        before = self.places.get(container)
        tokens = before[1] if before else hidden.shape[1]
        self.kept[name] = before[0].gather(1, index) if before else index
        self.places[container] = self.kept[name], tokens
        return new


def _checked(name: str, index: Any, hidden: Tensor) -> Tensor:
    n, tokens, _ = hidden.shape
    if not isinstance(index, Tensor) or index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        what = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise ValueError(f"block {name!r}: the places to keep must be ints [N, k], not {what}")
    index = index.to(device=hidden.device, dtype=torch.long)
    if index.ndim == 1:
        index = index.expand(n, -1)
    if index.ndim != 2 or len(index) != n or not index.shape[1]:
        raise ValueError(f"block {name!r}: places of shape {tuple(index.shape)} for {n} examples; [{n}, k] is needed")
    if index.min() < 0 or index.max() >= tokens:
        raise ValueError(f"block {name!r}: places {int(index.min())} to {int(index.max())} of {tokens} tokens")
    ordered = index.sort(-1).values
    if (ordered[:, 1:] == ordered[:, :-1]).any():
        raise ValueError(f"block {name!r}: a token was chosen twice")
    return index


class _Cut:
    """What a block is given, with the hidden states replaced and what counts all tokens cut to those that are left."""

    def __init__(self, hidden: Tensor, new: Tensor, places: Tensor, tokens: int, renumber: bool):
        self.hidden, self.new, self.places, self.tokens = hidden, new, places, tokens
        self.numbers = torch.arange(places.shape[1], device=places.device).expand_as(places) if renumber else places

    def __call__(self, name: str, value: Any) -> Any:
        if value is self.hidden:
            return self.new
        if isinstance(value, Tensor):
            return self._tensor(name, value)
        if type(value) in (tuple, list):
            return type(value)(self(name, v) for v in value)
        if type(value) is dict:
            return {k: self(k, v) for k, v in value.items()}
        return value

    def _tensor(self, name: str, value: Tensor) -> Tensor:
        if name.startswith("encoder_") or value.ndim < 2 or len(value) not in (1, len(self.places)):
            return value
        if "mask" not in name:
            return self._gathered(value, 1, self.numbers) if value.shape[1] == self.tokens else value
        for axis in range(max(1, value.ndim - 2), value.ndim):  # the axis of the heads may be as long
            if value.shape[axis] == self.tokens:
                value = self._gathered(value, axis, self.places)
        return value

    def _gathered(self, value: Tensor, axis: int, places: Tensor) -> Tensor:
        value = value.expand(len(places), *value.shape[1:])
        shape = [len(places), *[1] * (value.ndim - 1)]
        shape[axis] = places.shape[1]
        wanted = list(value.shape)
        wanted[axis] = places.shape[1]
        return value.gather(axis, places.view(shape).expand(wanted))
