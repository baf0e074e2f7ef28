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


def make_scorer(scoring: Any, y: np.ndarray, example: Tensor, *, logits: bool) -> tuple[Scorer, str]:
    """``(outputs [K, N] or [K, N, C] -> scores [K] float64, the scoring's name)``; higher is better.

    ``scoring``: a scikit-learn scorer name, a callable ``(y, output) -> float`` on arrays, or None for accuracy (class
    outputs) or r2. ``logits`` says whether class outputs are logits or probabilities. ``example`` [N, ...] is one
    output, whose shape decides.

    Raises: ValueError (unknown scoring, y that does not fit the outputs, a scoring that one output cannot answer).
    """
    classes = example.ndim == 2
    kind = "classes" if classes else "number" if example.is_floating_point() else "labels"
    two_values = y.dtype.kind in "biuUO" and len(np.unique(y)) <= 2
    if scoring is None:
        if kind == "number" and two_values:
            raise ValueError(
                "y has two values and the model one output: name scoring=, 'roc_auc' or 'r2' for example"
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
    target = _class_target(y, example.shape[1]) if classes else y
    score, kinds = _BATCHED.get(scoring, (None, ()))
    if kind in kinds:
        truth = torch.as_tensor(target.copy())  # torch warns of a Series' read-only values
        return (lambda outputs: score(outputs.cpu(), truth, logits).numpy()), scoring  # mps has no float64
    return _one_by_one(scoring, kind, target, example.shape[-1], logits), scoring


def _class_target(y: np.ndarray, n: int) -> np.ndarray:
    """y as column indices: class c is column c, or the c-th label in sorted order where labels are not 0 to C-1."""
    if y.dtype.kind in "biu" and y.min() >= 0 and y.max() < n:
        return y.astype(np.int64)
    known, index = np.unique(y, return_inverse=True)
    if len(known) != n:
        raise ValueError(
            f"y holds {len(known)} labels ({known[0]!r} to {known[-1]!r}) and the model has {n} outputs"
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


def _one_by_one(scoring: str, kind: str, y: np.ndarray, columns: int, logits: bool) -> Scorer:
    """Any other scorer of scikit-learn, given an estimator that already knows its outputs."""
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
    from sklearn.metrics import get_scorer, get_scorer_names

    if scoring not in get_scorer_names():
        raise ValueError(f"scoring {scoring!r} is unknown{did_you_mean(scoring, get_scorer_names())}")
    scorer = get_scorer(scoring)
    if kind == "number" and getattr(scorer, "_response_method", "predict") != "predict":
        kind = "margin"  # roc_auc and its like rank the rows by one number

    def predict(self, output):
        return output.argmax(1) if kind == "classes" else output

    def predict_proba(self, output):
        return torch.as_tensor(output).double().softmax(-1).numpy() if logits else output

    def decision_function(self, output):
        return output

    methods = {
        "classes": {"predict": predict, "predict_proba": predict_proba},
        "labels": {"predict": predict},
        "number": {"predict": predict},
        "margin": {"decision_function": decision_function},
    }[kind]
    classes = np.unique(y) if kind != "classes" else np.arange(columns)
    shared = {"classes_": classes, "__sklearn_is_fitted__": lambda self: True}
    mixin = RegressorMixin if kind == "number" else ClassifierMixin
    known = type("KnownOutputs", (mixin, BaseEstimator), methods | shared)()

    return lambda outputs: np.array([scorer(known, o, y) for o in outputs.cpu().numpy()])
