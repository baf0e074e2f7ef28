"""The importance a model has of itself: coefficients, impurity, gain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd


def native(model: Any, feature_names: Sequence[str] | None = None, *, X: Any = None) -> pd.Series:
    """The importance that a fitted estimator carries, a Series [P] of numbers >= 0 named after what it is.

    - ``|coef_|`` of a linear model (mean over classes). Comparable between features only on standardised data: put a
      StandardScaler into the Pipeline, or give ``X`` [N, P] and each is multiplied by the standard deviation of what
      the linear model sees of it.
    - ``impurity`` of trees and forests, ``gain`` of boosted trees (XGBoost, LightGBM, HistGradientBoosting; for
      scikit-learn's GradientBoosting the impurity of its trees), each summing to 1.

    Reads the last step of a Pipeline (and the best estimator of a search). Features that a selector drops get 0;
    behind a step that recodes columns (one-hot, say) the Series has the recoded names.

    Raises: TypeError (a model with no importance of its own), ValueError (another number of names).

    >>> native(make_pipeline(StandardScaler(), LogisticRegression()).fit(X, y))
    """
    import pandas as pd

    model = getattr(model, "best_estimator_", model)
    before, last = (model[:-1], model[-1]) if hasattr(model, "named_steps") else (None, model)
    values, kind = _own(last)
    inputs = _input_names(model, feature_names)
    names = _names(before, inputs, len(values))
    if kind == "|coef_|" and X is not None:
        seen = X if before is None or len(before) == 0 else before.transform(X)
        values, kind = values * np.nanstd(np.asarray(seen, dtype=float), axis=0), "|coef_| x std"
    series = pd.Series(values, index=names, name=kind)
    if inputs is not None and set(names) <= set(inputs):
        series = series.reindex(inputs, fill_value=0.0)
    return series


def _own(model: Any) -> tuple[np.ndarray, str]:
    if hasattr(model, "coef_"):
        coef = model.coef_.toarray() if hasattr(model.coef_, "toarray") else np.asarray(model.coef_)
        return np.abs(np.atleast_2d(coef)).mean(0), "|coef_|"
    if hasattr(model, "_predictors") and hasattr(model, "n_features_in_"):
        return _share(_histogram_gain(model)), "gain"
    if hasattr(model, "booster_"):  # LightGBM's own default counts splits
        return _share(model.booster_.feature_importance("gain")), "gain"
    if hasattr(model, "feature_importances_"):
        return np.asarray(model.feature_importances_, dtype=float), "gain" if _is_xgboost(
            model
        ) else "impurity"
    raise TypeError(
        f"{type(model).__name__} has no importance of its own (or is not fitted); permutation works for any model"
    )


def _histogram_gain(model: Any) -> np.ndarray:
    """Sum of the gain of all splits of a scikit-learn HistGradientBoosting model, by feature; it publishes none."""
    total = np.zeros(model.n_features_in_)
    for trees in model._predictors:
        for tree in trees:
            splits = tree.nodes[tree.nodes["is_leaf"] == 0]
            np.add.at(total, splits["feature_idx"], splits["gain"])
    return total


def _share(values: Any) -> np.ndarray:
    values = np.asarray(values, dtype=float)
    return values / values.sum() if values.sum() > 0 else values


def _is_xgboost(model: Any) -> bool:
    return type(model).__module__.startswith("xgboost")


def _input_names(model: Any, given: Sequence[str] | None) -> list[str] | None:
    known = getattr(model, "feature_names_in_", None)
    expected = getattr(model, "n_features_in_", None)
    names = (
        [str(n) for n in given] if given is not None else None if known is None else [str(n) for n in known]
    )
    if names is None:
        return None if expected is None else [f"x{j}" for j in range(expected)]
    if expected is not None and len(names) != expected:
        raise ValueError(f"{len(names)} feature names for a model of {expected} features")
    return names


def _names(before: Any, inputs: list[str] | None, n: int) -> list[str]:
    if before is not None and len(before):
        try:
            inputs = [str(name) for name in before.get_feature_names_out(inputs)]
        except (AttributeError, TypeError, ValueError):  # a step that cannot name what it gives
            pass
    if inputs is None or len(inputs) != n:
        said = "none" if inputs is None else len(inputs)
        raise ValueError(f"the model has an importance for {n} features and there are {said} names for them")
    return inputs
