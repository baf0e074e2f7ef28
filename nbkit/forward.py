"""Calling a model the same way everywhere: inputs checked, logits found, a target turned into one score an example.

Every method of the kit is a function of (model, inputs, target). What those three may be is said here, once:

- ``inputs``: a tensor ``[N, ...]``, or a dict of tensors passed as keyword arguments (as transformers models take).
  Axis 0 of each is the examples; a tensor of length 1 there, such as position ids ``[1, T]``, serves all of them.
- the model's output: a tensor, or a tuple / dict / ``ModelOutput`` whose ``logits`` (else first) tensor is used.
- ``target``: ``None`` (the class each example is given), an int, a tensor of ints ``[N]``, or a callable on the
  model's output that returns one score an example, ``[N]``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Integral
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from nbkit.errors import NotFinite

Inputs = Tensor | Mapping[str, Any]
Target = None | int | Tensor | Callable[[Any], Tensor]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Run the model in evaluation mode; every submodule gets back the mode it had, also after an exception.

    Raises: TypeError where a backward pass inside runs a part again (activation checkpointing) that does not allow it.
    """
    modes = [(m, m.training) for m in model.modules()]
    try:
        if any(mode for _, mode in modes):
            model.eval()
        yield model
    except RuntimeError as error:
        if "torch.utils.checkpoint" not in f"{type(error).__module__} {error}":
            raise
        raise TypeError(
            f"{type(model).__name__} uses activation checkpointing, which does not go with this method; switch it off "
            "(transformers: model.gradient_checkpointing_disable())"
        ) from error
    finally:
        for module, mode in modes:
            if module.training != mode:
                module.training = mode


@contextmanager
def requiring_grad(parameters: Iterable[Tensor], needed: bool) -> Iterator[None]:
    """Inside, autograd follows these leaf tensors (``needed``) or leaves them out; afterwards each is as it was."""
    turned = [p for p in parameters if p.is_leaf and p.requires_grad != needed]
    try:
        for parameter in turned:
            parameter.requires_grad_(needed)
        yield
    finally:
        for parameter in turned:
            parameter.requires_grad_(not needed)


def check_inputs(inputs: Inputs, *, name: str = "inputs") -> Inputs:
    """Return ``inputs`` unchanged, or raise. An additive mask in a dict, of 0 and -inf, is fine.

    Raises: TypeError (neither tensor nor dict of tensors), ValueError (no examples, no values, axis 0 of different
    lengths), NotFinite (NaN or inf).
    """
    tensors = inputs.items() if isinstance(inputs, Mapping) else [(name, inputs)]
    tensors = [(k, v) for k, v in tensors if isinstance(v, Tensor) or not isinstance(inputs, Mapping)]
    if not tensors:
        raise TypeError(f"{name}: a dict of inputs holds no tensor")
    for key, value in tensors:
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor or a dict of tensors, not {type(value).__name__}")
        if value.ndim == 0 or value.shape[0] == 0:
            raise ValueError(f"{key} is empty: its shape is {tuple(value.shape)}, and axis 0 must hold examples")
        if value.is_meta:
            raise ValueError(f"{key} is on the device meta, which holds shapes and no values")
        # the sum of finite values is finite unless it overflows, and is much cheaper than looking at each
        if value.is_floating_point() and not value.sum().isfinite() and not torch.isfinite(value).all():
            bad = ~torch.isfinite(value)
            if not isinstance(inputs, Mapping) or not (value[bad] == -torch.inf).all() or value[~bad].any():
                raise NotFinite(f"{key} holds {bad.sum().item()} NaN or infinite values of {value.numel()}")
    lengths = {key: len(value) for key, value in tensors}
    odd = [key for key, length in lengths.items() if length not in (1, max(lengths.values()))]
    if odd:
        raise ValueError(
            f"axis 0 of every tensor must hold the examples, or have length 1; here are {lengths}. A tensor that all "
            f"examples share ({', '.join(odd)}, or the others?) goes in once an example, t.expand(n, *t.shape), or "
            "bound inside a module around the model"
        )
    return inputs


_CHECKED: WeakKeyDictionary[nn.Module, set] = WeakKeyDictionary()  # what check_examples saw of a model already


def check_examples(model: nn.Module, inputs: Inputs) -> None:
    """Raise ValueError where axis 0 of a dict's tensors is not the examples: the first alone is answered otherwise.

    Lengths cannot tell class prototypes ``[C, D]`` or a mask ``[T, T]`` from examples where C or T happens to be N.
    So the model runs on one and on two of them, once for tensors of these names and lengths.
    """
    n = batch_size(inputs)
    tensors = inputs.items() if isinstance(inputs, Mapping) else ()
    names = tuple(key for key, value in tensors if isinstance(value, Tensor) and len(value) == n)
    if n < 2 or len(names) < 2 or (names, n) in _CHECKED.setdefault(model, set()):
        return
    one, two = (_answer(model, take(inputs, slice(0, size))) for size in (1, 2))
    if one is None and two is None:
        return  # the method's own call will say what is wrong
    fits = one is not None and two is not None and one.shape[1:] == two.shape[1:] and len(two) == 2 * len(one)
    if not fits or not torch.allclose(two[: len(one)], one, rtol=1e-2, atol=1e-3 * float(one.abs().max())):
        raise ValueError(
            f"one of {', '.join(map(repr, names))}, all of length {n}, does not hold an example a row: the model "
            "answers the first example otherwise when it comes alone. Give what all examples share once an example, "
            "t.expand(n, *t.shape), or bind it inside a module around the model"
        )
    _CHECKED[model].add((names, n))


def _answer(model: nn.Module, inputs: Inputs) -> Tensor | None:
    try:
        with evaluating(model), torch.no_grad():
            return first_tensor(call(model, inputs)).float()
    except (RuntimeError, ValueError, IndexError):
        return None


def check_device(model: nn.Module, inputs: Inputs) -> None:
    """Raise ValueError where model and inputs live on different devices, or as :func:`check_examples`."""
    where = {p.device for p in model.parameters()} | {b.device for b in model.buffers()}
    tensors = inputs.values() if isinstance(inputs, Mapping) else [inputs]
    for value in tensors:
        if isinstance(value, Tensor) and where and value.device not in where:
            there = ", ".join(sorted(map(str, where)))
            raise ValueError(f"inputs are on {value.device} but the model is on {there}; move one with .to(...)")
    check_examples(model, inputs)


@contextmanager
def naming_types(model: nn.Module, x: Tensor) -> Iterator[None]:
    """Where the model fails inside on ``x`` and holds numbers of another type, say so: TypeError naming both types."""
    weights = next((p for p in model.parameters() if p.is_floating_point()), x)
    try:
        yield
    except RuntimeError as error:
        if x.dtype == weights.dtype:
            raise
        types = f"X holds {x.dtype} and the model {weights.dtype}, on which it fails"
        raise TypeError(f"{types}: {error}; give X.to({weights.dtype})") from error


def batch_size(inputs: Inputs) -> int:
    """Number of examples: the length of axis 0, in a dict of the longest."""
    if isinstance(inputs, Mapping):
        return max(len(v) for v in inputs.values() if isinstance(v, Tensor) and v.ndim)
    return inputs.shape[0]


def take(inputs: Inputs, index: Any) -> Inputs:
    """The examples ``index`` (slice or integer tensor) of ``inputs``; a dict's tensor of length 1 serves them all."""
    if not isinstance(inputs, Mapping):
        return inputs[index]
    n = batch_size(inputs)
    return {k: v[index] if isinstance(v, Tensor) and v.ndim and len(v) == n else v for k, v in inputs.items()}


def call(model: nn.Module, inputs: Inputs) -> Any:
    """``model(inputs)`` or, for a dict, ``model(**inputs)``; the output as the model gives it.

    The model gets a copy of plain floating inputs: its first operation may work in place, which a leaf of autograd does
    not allow and a caller does not expect.
    """
    if isinstance(inputs, Mapping):
        return model(**{name: _copied(value) for name, value in inputs.items()})
    return model(_copied(inputs))


def _copied(value: Any) -> Any:
    return value.clone() if type(value) is Tensor and value.is_floating_point() else value


def outside_inference_mode(method: Callable) -> Callable:
    """Let ``method(model, inputs, ...)`` be called under ``torch.inference_mode()``, where autograd follows nothing.

    Tensors made in that mode are copied: autograd saves none of them, and nothing may be written into them outside.
    """

    @functools.wraps(method)
    def outside(*args, **settings):
        with torch.inference_mode(False):
            return method(*map(_ordinary, args), **{name: _ordinary(value) for name, value in settings.items()})

    return outside


def _ordinary(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _ordinary(item) for name, item in value.items()}
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


def first_tensor(output: Any) -> Tensor:
    """The tensor a module's output is about: itself, its ``logits``, or the first tensor of a tuple or dict.

    Raises: TypeError where there is none.
    """
    if isinstance(output, Tensor):
        return output
    named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(named, Tensor):
        return named
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    for value in values:
        if isinstance(value, Tensor):
            return value
    raise TypeError(f"no tensor in an output of type {type(output).__name__}")


def logits(model: nn.Module, inputs: Inputs) -> Tensor:
    """The model's logits, usually ``[N, C]``."""
    return first_tensor(call(model, inputs))


def resolve_target(output: Any, target: Target) -> Target:
    """Fix a target before a model is called many times: ``None`` becomes the predicted classes ``[N]``, ints ``[N]``.

    Raises: IndexError (class out of range), ValueError (wrong number of targets), TypeError.
    """
    if callable(target):
        return target
    values = first_tensor(output)
    if values.ndim == 1 and target is None:
        return lambda out: first_tensor(out)
    if values.ndim != 2:
        raise ValueError(
            f"the output has shape {tuple(values.shape)}; a class target needs [N, C]: pass a callable on the output"
        )
    n, classes = values.shape
    if target is None:
        return values.argmax(1).detach()
    if isinstance(target, bool) or not isinstance(target, (Integral, Tensor)):
        raise TypeError(f"target must be None, an int, a tensor of ints or a callable, not {type(target).__name__}")
    index = torch.as_tensor(target if isinstance(target, Tensor) else int(target), device=values.device)
    if index.is_floating_point() or index.dtype == torch.bool:
        raise TypeError(f"target must hold ints, not {index.dtype}")
    index = index.long().expand(n) if index.ndim == 0 else index.long()
    if index.shape != (n,):
        raise ValueError(f"target has shape {tuple(index.shape)}; for {n} inputs it must be an int or [{n}]")
    if bool(((index < 0) | (index >= classes)).any()):
        wrong = index[(index < 0) | (index >= classes)][0].item()
        raise IndexError(f"target {wrong} is out of range; the model has classes 0 to {classes - 1}")
    return index


def scores(output: Any, target: Target) -> Tensor:
    """One score an example, ``[N]``: the target's logit, or what the callable returns; in float32 or better.

    Raises: as ``resolve_target``; ValueError where a callable does not return one value an example.
    """
    target = resolve_target(output, target)
    values = first_tensor(output)
    if callable(target):
        result = target(output)
        if not isinstance(result, Tensor) or result.ndim != 1 or result.shape[0] != values.shape[0]:
            shape = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise ValueError(f"a target callable must return [N] = [{values.shape[0]}] scores, not {shape}")
        return wide(result)
    return wide(values.gather(1, target[:, None]).squeeze(1))


def wide(x: Tensor) -> Tensor:
    """The same numbers in a type in which sums and squares keep their digits: half precisions become float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
