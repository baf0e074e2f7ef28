"""Scores of many outputs at once: [K, N, C] outputs of a torch module or callable against the same N targets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nbkit.errors import did_you_mean
from nbkit.importance._result import scoring_name

Scorer = Callable[[Tensor], np.ndarray]


def make_scorer(
    scoring: Any, y: np.ndarray, example: Tensor, *, labels: np.ndarray | None = None, logits: bool
) -> tuple[Scorer, str]:
    """``(outputs [K, N] or [K, N, C] -> scores [K] float64, the scoring's name)``; higher is better.

    ``scoring``: a scikit-learn scorer name, a callable ``(y, output) -> float`` on arrays, or None for accuracy (class
    outputs) or r2. ``logits`` says whether outputs are logits (of a module) or probabilities. ``example`` [N, ...] is
    one output, whose shape decides. ``labels`` are the text that the numbers in y stand for.

    Raises: ValueError (unknown scoring, y that does not fit the outputs, a scoring that one output cannot answer),
    IndexError (a label out of range).
    """
    classes = example.ndim == 2
    kind = "classes" if classes else "number" if example.is_floating_point() else "labels"
    two_values = y.dtype.kind in "biuUO" and len(np.unique(y)) <= 2
    if scoring is None:
        if kind == "number" and two_values:
            raise ValueError(
                "y has two values and the model one output: name scoring=, 'roc_auc', 'accuracy' or 'r2' for example"
            )
        scoring = "r2" if kind == "number" else "accuracy"
    if callable(scoring):
        name = scoring_name(scoring)
        return (lambda outputs: np.array([float(scoring(y, o.numpy())) for o in outputs.cpu()])), name
    if not isinstance(scoring, str):
        raise TypeError(f"scoring must be a name, a callable (y, output) -> float or None, not {scoring!r}")
    if y.ndim != 1:
        raise ValueError(
            f"y has shape {y.shape}; scoring={scoring!r} needs [N] (a callable scoring takes any)"
        )
    target = _class_target(y, example.shape[1], labels, logits) if classes else y
    score, kinds = _BATCHED.get(scoring, (None, ()))
    if kind in kinds:
        truth = torch.as_tensor(target.copy())  # torch warns of a Series' read-only values
        return (lambda outputs: score(outputs.cpu(), truth, logits).numpy()), scoring  # mps has no float64
    return _one_by_one(scoring, kind, target, example.shape[-1], logits), scoring


def _class_target(y: np.ndarray, n: int, labels: np.ndarray | None, logits: bool) -> np.ndarray:
    """y as column indices. Labels of text, and a function's numbers that are no indices (the columns of scikit-learn's
    ``predict_proba``), are the columns in sorted order."""
    outside = (y < 0) | (y >= n) | (y != y.astype(np.int64))
    if labels is None and not outside.any():
        return y.astype(np.int64)
    if labels is None and logits:
        raise IndexError(f"label {y[outside][0]} is out of range; the model has classes 0 to {n - 1}")
    known, index = np.unique(y, return_inverse=True)
    shown = (known if labels is None else labels).tolist()
    if len(known) != n:
        raise ValueError(
            f"y holds {len(known)} labels ({shown[0]!r} to {shown[-1]!r}) and the model has {n} outputs"
        )
    return index


def _accuracy(outputs: Tensor, y: Tensor, logits: bool) -> Tensor:
    predicted = outputs.argmax(-1) if outputs.ndim == 3 else outputs
    return (predicted == y).double().mean(1)


def _log_loss(outputs: Tensor, y: Tensor, logits: bool) -> Tensor:
    log_p = outputs.double().log_softmax(-1) if logits else outputs.double().clamp_min(1e-15).log()
    return log_p.gather(2, y.expand(len(outputs), -1)[..., None]).squeeze(2).mean(1)


def _squared(outputs: Tensor, y: Tensor, logits: bool) -> Tensor:
    return -((outputs.double() - y.double()) ** 2).mean(1)


def _absolute(outputs: Tensor, y: Tensor, logits: bool) -> Tensor:
    return -(outputs.double() - y.double()).abs().mean(1)


def _r2(outputs: Tensor, y: Tensor, logits: bool) -> Tensor:
    spread = ((y.double() - y.double().mean()) ** 2).mean()
    if spread == 0:
        raise ValueError("r2 is not defined: y is constant")
    return 1 + _squared(outputs, y, logits) / spread


_BATCHED = {  # each with the kinds of output it reads
    "accuracy": (_accuracy, ("classes", "labels")),
    "neg_log_loss": (_log_loss, ("classes",)),
    "neg_mean_squared_error": (_squared, ("number",)),
    "neg_mean_absolute_error": (_absolute, ("number",)),
    "r2": (_r2, ("number",)),
}


def _two_labels(y: np.ndarray) -> np.ndarray:
    known = np.array([0, 1], dtype=y.dtype) if np.isin(y, (0, 1)).all() else np.unique(y)
    if len(known) != 2:
        raise ValueError(f"one output tells two labels apart; y holds {len(known)}")
    return known


def _one_by_one(scoring: str, kind: str, y: np.ndarray, columns: int, logits: bool) -> Scorer:
    """Any other scorer of scikit-learn, given an estimator that already knows its outputs."""
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
    from sklearn.metrics import get_scorer, get_scorer_names

    if scoring not in get_scorer_names():
        raise ValueError(f"scoring {scoring!r} is unknown{did_you_mean(scoring, get_scorer_names())}")
    scorer = get_scorer(scoring)
    classes = np.arange(columns) if kind == "classes" else np.unique(y)
    if kind == "number" and not scorer._score_func.__module__.endswith("_regression"):
        kind, classes = "margin", _two_labels(y)  # how far a row is on the side of the second label

    def predict(self, output):
        if kind == "margin":
            return classes[(output > (0 if logits else 0.5)).astype(int)]
        return output.argmax(1) if kind == "classes" else output

    def predict_proba(self, output):
        values = torch.as_tensor(output).double()
        if kind == "margin":
            second = values.sigmoid() if logits else values
            return torch.stack([1 - second, second], -1).numpy()
        return values.softmax(-1).numpy() if logits else output

    def decision_function(self, output):
        return output

    methods = {
        "classes": {"predict": predict, "predict_proba": predict_proba},
        "labels": {"predict": predict},
        "number": {"predict": predict},
        "margin": {
            "predict": predict,
            "predict_proba": predict_proba,
            "decision_function": decision_function,
        },
    }[kind]
    shared = {"classes_": classes, "__sklearn_is_fitted__": lambda self: True}
    mixin = RegressorMixin if kind == "number" else ClassifierMixin
    known = type("KnownOutputs", (mixin, BaseEstimator), methods | shared)()

    return lambda outputs: np.array([scorer(known, o, y) for o in outputs.cpu().numpy()])
