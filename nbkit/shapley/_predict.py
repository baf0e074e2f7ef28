"""Which number of a model's output is explained: the output of a module, estimator or callable as one score a row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nbkit import forward

Output = None | int | str | Callable[[Any], Any]


def predictor(model: Any, target: Output, first: Any) -> tuple[Callable[[Any], np.ndarray], str]:
    """``(rows -> scores [n] float64, what they are)``. ``first`` is a row or more, as the model takes them.

    Raises: ValueError (several outputs and none named, a class the model does not have), IndexError, TypeError.
    """
    if isinstance(model, nn.Module):
        score, name = module_score(model, target, first)

        def scores(rows: Tensor) -> np.ndarray:
            with torch.no_grad(), forward.evaluating(model):
                return score(rows).cpu().double().numpy()

        return scores, name
    if hasattr(model, "predict"):
        return _estimator(model, target, first)
    if callable(model):
        return _function(model, target, first, getattr(model, "__name__", type(model).__name__))
    raise TypeError(
        f"model must be a torch module, a fitted estimator or a callable, not {type(model).__name__}"
    )


def module_score(model: nn.Module, target: Output, first: Tensor) -> tuple[Callable[[Tensor], Tensor], str]:
    """``(tensor -> scores [n] that keep autograd, what they are)`` for a torch module.

    Raises: as ``predictor``; TypeError naming both types where the module fails on another than that of its weights.
    """
    forward.check_device(model, first)
    with forward.naming_types(model, first), torch.no_grad(), forward.evaluating(model):
        shape = forward.logits(model, first).shape
    if callable(target):
        return (lambda rows: forward.scores(forward.call(model, rows), target)), _name(target)
    if len(shape) == 1 or shape[1:] == (1,):
        _column(target, 1)
        return (lambda rows: forward.logits(model, rows).reshape(-1)), "output"
    if len(shape) != 2:
        raise ValueError(
            f"the module returns {tuple(shape)}; [N] or [N, C] is explained, or pass a callable target="
        )
    column = _column(target, shape[1])
    return (lambda rows: forward.logits(model, rows)[:, column]), f"output {column}"


def class_index(classes: Any, target: Output) -> int:
    """The column of ``predict_proba`` that ``target`` names; None is the second of two classes (or the only one).

    Raises: ValueError naming the classes.
    """
    labels = list(np.asarray(classes).tolist())
    if target is None and len(labels) <= 2:
        return len(labels) - 1
    shown = ", ".join(map(repr, labels))
    if target is None:
        raise ValueError(
            f"the model has {len(labels)} classes; name the one to explain: target= one of {shown}"
        )
    if target not in labels:
        raise ValueError(f"target={target!r} is not a class of the model; its classes are {shown}")
    return labels.index(target)


def _estimator(model: Any, target: Output, first: Any):
    if not hasattr(model, "classes_"):
        outputs = as_array(model.predict(first)) if target is None else np.empty(0)
        if outputs.ndim == 2 and outputs.shape[1] > 1:
            raise ValueError(
                f"the model predicts {outputs.shape[1]} numbers; name the one to explain: target= 0 to "
                f"{outputs.shape[1] - 1}, or a callable"
            )
        return _function(model.predict, target, first, "prediction")
    # trees count their outputs; of others one row tells
    several = model.n_outputs_ > 1 if hasattr(model, "n_outputs_") else np.ndim(model.predict(first)) > 1
    if several and not callable(target):
        raise ValueError(
            f"{type(model).__name__} predicts several labels a row; explain one of them: "
            "explain(lambda X: probability of that label [N], X), or a callable target= on what predict_proba gives"
        )
    if not hasattr(model, "predict_proba"):
        raise ValueError(
            f"{type(model).__name__} gives no probabilities; explain its margin: explain(model.decision_function, X)"
        )
    if callable(target):
        return _function(model.predict_proba, target, first, _name(target))
    column = class_index(model.classes_, target)
    label = np.asarray(model.classes_).tolist()[column]
    return (lambda rows: as_array(model.predict_proba(rows))[:, column]), f"P({label})"


def _function(call: Callable, target: Output, first: Any, name: str):
    if callable(target):
        return (lambda rows: _one_a_row(as_array(target(call(rows))), len(rows), "target=")), _name(target)
    shape = as_array(call(first)).shape
    if len(shape) == 1:
        _column(target, 1)
        return (lambda rows: _one_a_row(as_array(call(rows)), len(rows), "the model")), name
    if len(shape) != 2:
        raise ValueError(f"the model returns shape {shape} for {len(first)} rows; it must be [N] or [N, C]")
    column = _column(target, shape[1])
    return (lambda rows: as_array(call(rows))[:, column]), name if shape[1] == 1 else f"{name}[:, {column}]"


def _column(target: Output, n: int) -> int:
    if target is None:
        if n > 2:
            raise ValueError(
                f"the model has {n} outputs; name the one to explain: target= 0 to {n - 1}, or a callable"
            )
        return n - 1
    if isinstance(target, bool) or not isinstance(target, (int, np.integer)):
        raise TypeError(f"target must be None, the index of an output or a callable, not {target!r}")
    if not 0 <= target < n:
        raise IndexError(f"target {target} is out of range; the model has outputs 0 to {n - 1}")
    return int(target)


def as_array(values: Any) -> np.ndarray:
    """What a model returned, as float64.

    Raises: TypeError where it is not one array of numbers (labels, or a list with one array an output).
    """
    if isinstance(values, Tensor):
        values = values.detach().cpu()
    try:
        return np.asarray(values, dtype=float)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"the model returns {type(values).__name__}, not an array of numbers: {error}"
        ) from None


def _one_a_row(values: np.ndarray, n: int, who: str) -> np.ndarray:
    if values.shape != (n,):
        raise ValueError(f"{who} must return one score a row, [{n}], not {values.shape}")
    return values


def _name(target: Callable) -> str:
    name = getattr(target, "__name__", type(target).__name__)
    return "output" if name == "<lambda>" else name
