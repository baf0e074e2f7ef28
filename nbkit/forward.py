"""Calling a model the same way everywhere: inputs checked, logits found, a target turned into one score an example.

Every method of the kit is a function of (model, inputs, target). What those three may be is said here, once:

- ``inputs``: a tensor ``[N, ...]``, or a dict of tensors passed as keyword arguments (as transformers models take).
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

import torch
from torch import Tensor, nn

from nbkit.errors import NotFinite

Inputs = Tensor | Mapping[str, Any]
Target = None | int | Tensor | Callable[[Any], Tensor]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Run the model in evaluation mode; every submodule gets back the mode it had, also after an exception."""
    modes = [(m, m.training) for m in model.modules()]
    try:
        if any(mode for _, mode in modes):
            model.eval()
        yield model
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
    """Return ``inputs`` unchanged, or raise.

    Raises: TypeError (neither tensor nor dict of tensors), ValueError (no examples, no values), NotFinite (NaN or inf).
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
        # the sum of finite values is finite unless it overflows, and is much cheaper than looking at each
        if value.is_meta:
            raise ValueError(f"{key} is on the device meta, which holds shapes and no values")
        if value.is_floating_point() and not value.sum().isfinite() and not torch.isfinite(value).all():
            bad = (~torch.isfinite(value)).sum().item()
            raise NotFinite(f"{key} holds {bad} NaN or infinite values of {value.numel()}")
    return inputs


def check_device(model: nn.Module, inputs: Inputs) -> None:
    """Raise ValueError where model and inputs live on different devices."""
    where = {p.device for p in model.parameters()} | {b.device for b in model.buffers()}
    tensors = inputs.values() if isinstance(inputs, Mapping) else [inputs]
    for value in tensors:
        if isinstance(value, Tensor) and where and value.device not in where:
            there = ", ".join(sorted(map(str, where)))
            raise ValueError(f"inputs are on {value.device} but the model is on {there}; move one with .to(...)")


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
    """Number of examples: the length of axis 0 of the (first) tensor."""
    value = next(v for v in inputs.values() if isinstance(v, Tensor)) if isinstance(inputs, Mapping) else inputs
    return value.shape[0]


def take(inputs: Inputs, index: Any) -> Inputs:
    """The examples ``index`` (slice or integer tensor) of ``inputs``, for a tensor or a dict of tensors alike."""
    if isinstance(inputs, Mapping):
        return {k: v[index] if isinstance(v, Tensor) else v for k, v in inputs.items()}
    return inputs[index]


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
    """One score an example, ``[N]``: the target's logit, or what the callable returns.

    Raises: as ``resolve_target``; ValueError where a callable does not return one value an example.
    """
    target = resolve_target(output, target)
    values = first_tensor(output)
    if callable(target):
        result = target(output)
        if not isinstance(result, Tensor) or result.ndim != 1 or result.shape[0] != values.shape[0]:
            shape = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise ValueError(f"a target callable must return [N] = [{values.shape[0]}] scores, not {shape}")
        return result
    return values.gather(1, target[:, None]).squeeze(1)
