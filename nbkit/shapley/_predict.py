"""Which number of a model's output is explained: the output of a module, estimator or callable as one score a row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nbkit import forward

Output = None | int | str | Callable[[Any], Any]


def predictor(model: Any, output: Output, first: Any) -> tuple[Callable[[Any], np.ndarray], str]:
    """``(rows -> scores [n] float64, what they are)``. ``first`` is a row or more, as the model takes them.

    Raises: ValueError (several outputs and none named, a class the model does not have), IndexError, TypeError.
    """
    if isinstance(model, nn.Module):
        score, name = module_score(model, output, first)

        def scores(rows: Tensor) -> np.ndarray:
            with torch.no_grad(), forward.evaluating(model):
                return score(rows).cpu().double().numpy()

        return scores, name
    if hasattr(model, "predict"):
        return _estimator(model, output, first)
    if callable(model):
        return _function(model, output, first, getattr(model, "__name__", type(model).__name__))
    raise TypeError(
        f"model must be a torch module, a fitted estimator or a callable, not {type(model).__name__}"
    )


def module_score(model: nn.Module, output: Output, first: Tensor) -> tuple[Callable[[Tensor], Tensor], str]:
    """``(tensor -> scores [n] that keep autograd, what they are)`` for a torch module.

    Raises: as ``predictor``; TypeError naming both types where the module fails on another than that of its weights.
    """
    forward.check_device(model, first)
    with forward.naming_types(model, first), torch.no_grad(), forward.evaluating(model):
        shape = forward.logits(model, first).shape
    if callable(output):
        return (lambda rows: forward.scores(forward.call(model, rows), output)), _name(output)
    if len(shape) == 1 or shape[1:] == (1,):
        _column(output, 1)
        return (lambda rows: forward.logits(model, rows).reshape(-1)), "output"
    if len(shape) != 2:
        raise ValueError(
            f"the module returns {tuple(shape)}; [N] or [N, C] is explained, or pass a callable output="
        )
    column = _column(output, shape[1])
    return (lambda rows: forward.logits(model, rows)[:, column]), f"output {column}"


def class_index(classes: Any, output: Output) -> int:
    """The column of ``predict_proba`` that ``output`` names; None is the second of two classes (or the only one).

    Raises: ValueError naming the classes.
    """
    labels = list(np.asarray(classes).tolist())
    if output is None and len(labels) <= 2:
        return len(labels) - 1
    shown = ", ".join(map(repr, labels))
    if output is None:
        raise ValueError(
            f"the model has {len(labels)} classes; name the one to explain: output= one of {shown}"
        )
    if output not in labels:
        raise ValueError(f"output={output!r} is not a class of the model; its classes are {shown}")
    return labels.index(output)


def _estimator(model: Any, output: Output, first: Any):
    if not hasattr(model, "classes_"):
        return _function(model.predict, output, first, "prediction")
    if not hasattr(model, "predict_proba"):
        raise ValueError(
            f"{type(model).__name__} gives no probabilities; explain its margin: explain(model.decision_function, X)"
        )
    if callable(output):
        return _function(model.predict_proba, output, first, _name(output))
    column = class_index(model.classes_, output)
    label = np.asarray(model.classes_).tolist()[column]
    return (lambda rows: as_array(model.predict_proba(rows))[:, column]), f"P({label})"


def _function(call: Callable, output: Output, first: Any, name: str):
    if callable(output):
        return (lambda rows: _one_a_row(as_array(output(call(rows))), len(rows), "output=")), _name(output)
    shape = as_array(call(first)).shape
    if len(shape) == 1:
        _column(output, 1)
        return (lambda rows: _one_a_row(as_array(call(rows)), len(rows), "the model")), name
    if len(shape) != 2:
        raise ValueError(f"the model returns shape {shape} for {len(first)} rows; it must be [N] or [N, C]")
    column = _column(output, shape[1])
    return (lambda rows: as_array(call(rows))[:, column]), name if shape[1] == 1 else f"{name}[:, {column}]"


def _column(output: Output, n: int) -> int:
    if output is None:
        if n > 2:
            raise ValueError(
                f"the model has {n} outputs; name the one to explain: output= 0 to {n - 1}, or a callable"
            )
        return n - 1
    if isinstance(output, bool) or not isinstance(output, (int, np.integer)):
        raise TypeError(f"output must be None, the index of an output or a callable, not {output!r}")
    if not 0 <= output < n:
        raise IndexError(f"output {output} is out of range; the model has outputs 0 to {n - 1}")
    return int(output)


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


def _name(output: Callable) -> str:
    name = getattr(output, "__name__", type(output).__name__)
    return "output" if name == "<lambda>" else name
