"""Drop-column importance: what a model loses when it is fitted without a feature."""

from __future__ import annotations

from typing import Any

import numpy as np

from nbkit import runtime
from nbkit.importance._result import (
    Importance,
    feature_names,
    read_table,
    scoring_name,
    take_columns,
    take_rows,
)


def drop_column(
    model: Any,
    X: Any,
    y: Any,
    *,
    validation: tuple[Any, Any] | None = None,
    cv: Any = 5,
    groups: Any = None,
    scoring: Any = None,
    n_jobs: int | None = None,
) -> Importance:
    """The loss of score on held-out rows when the model is refitted without a column: ``values`` [P, folds].

    "LOCO", Lei et al. 2018, section 6. Clones of ``model`` (any scikit-learn estimator, fitted or not) are fitted
    (P + 1) * folds times through ``runtime.parallel``; ``model`` is left alone. Give it a ``random_state``: without
    one the refits differ by chance as well. A ColumnTransformer in it names its columns or selects them by type: a
    refit takes what is left of the names.

    ``validation`` = (X, y) fits once on all rows and scores on those; otherwise ``cv``, a number of folds (stratified
    for a classifier) or a scikit-learn splitter, with ``groups`` [N] for one that keeps groups together. ``scoring``
    as in scikit-learn; None is the estimator's own score.

    Raises: ValueError (one feature only, other columns in ``validation``, shapes, a ColumnTransformer by position),
    NotFinite (y), TypeError.

    >>> drop_column(RandomForestClassifier(random_state=0), X, y, cv=5, n_jobs=2).mean
    """
    from sklearn.base import is_classifier
    from sklearn.model_selection import check_cv

    check_estimator(model)
    table, target, names = read_table(X, y)
    if len(names) < 2:
        raise ValueError(f"dropping the only feature {names[0]!r} leaves nothing to fit on")
    if validation is not None:
        held, held_y = read_validation(validation, names)
        folds = [(table, target, held, held_y)]
    else:
        splits = check_cv(cv, target, classifier=is_classifier(model)).split(table, target, groups)
        folds = [(take_rows(table, a), target[a], take_rows(table, b), target[b]) for a, b in splits]
    kept = [list(range(len(names)))] + [[k for k in range(len(names)) if k != j] for j in range(len(names))]
    work = [(columns, fold) for columns in range(len(kept)) for fold in range(len(folds))]

    def score(item: tuple[int, int]) -> float:
        return fit_and_score(model, folds[item[1]], kept[item[0]], scoring)

    scores = np.array(runtime.parallel(score, work, n_jobs=n_jobs)).reshape(len(kept), len(folds))
    return Importance(
        scores[0] - scores[1:], scores[0], names, "drop-column", scoring_name(scoring or "score")
    )


def check_estimator(model: Any) -> None:
    """Raise TypeError for what cannot be cloned and fitted."""
    if not hasattr(model, "fit") or not hasattr(model, "get_params"):
        raise TypeError(
            f"{type(model).__name__} cannot be refitted; it needs fit and get_params as in scikit-learn"
        )


def read_validation(validation: Any, names: list[str]) -> tuple[Any, np.ndarray]:
    """``(X, y)`` of the held-out rows, checked against the feature names."""
    if not isinstance(validation, (tuple, list)) or len(validation) != 2:
        raise TypeError("validation must be a pair (X, y)")
    held, held_y, held_names = read_table(*validation, what="validation X")
    if len(held_names) != len(names) or (hasattr(held, "columns") and held_names != names):
        raise ValueError(f"validation has the columns {held_names}, X has {names}")
    return held, held_y


def fit_and_score(
    model: Any, fold: tuple[Any, np.ndarray, Any, np.ndarray], columns: list[int], scoring: Any
) -> float:
    """Score on the second half of ``fold`` = (X, y, X, y) of a clone fitted on the first, with these columns only.

    Raises: ValueError where the score is not a number (a fold with one class, for one), or a ColumnTransformer cannot
    do without a column.
    """
    from sklearn.metrics import check_scoring

    X, y, held, held_y = fold
    fitted = clone_for(model, feature_names(X), columns).fit(take_columns(X, columns), y)
    score = float(check_scoring(fitted, scoring=scoring)(fitted, take_columns(held, columns), held_y))
    if not np.isfinite(score):
        values, counts = np.unique(held_y, return_counts=True)
        shown = dict(zip(values.tolist()[:5], counts.tolist()[:5], strict=True))
        raise ValueError(f"{scoring_name(scoring or 'score')} is {score} on held-out rows with y {shown}")
    return score


def clone_for(model: Any, names: list[str], columns: list[int]) -> Any:
    """A clone of ``model`` whose ColumnTransformers name none of the columns that are left out.

    Raises: ValueError where one goes by position, or where no column that is left reaches the model.
    """
    from sklearn.base import clone
    from sklearn.compose import ColumnTransformer

    fresh = clone(model)
    kept = [names[k] for k in columns]
    left_out = set(names) - set(kept)
    for part in [fresh, *fresh.get_params(deep=True).values()] if left_out else []:
        if isinstance(part, ColumnTransformer):
            part.transformers = [(name, step, _still(chosen, left_out)) for name, step, chosen in part.transformers]
            used = [step for _, step, chosen in part.transformers if callable(chosen) or len(chosen)]
            if all(isinstance(step, str) and step == "drop" for step in [*used, part.remainder]):
                raise ValueError(f"a ColumnTransformer of the model takes none of the columns {kept}; leave out of X "
                                 "what the model does not use, or let it have remainder='passthrough'")  # fmt: skip
    return fresh


def _still(chosen: Any, left_out: set[str]) -> Any:
    """What is left of a ColumnTransformer's columns: names, or a callable that chooses among those it is given."""
    if callable(chosen):
        return chosen
    if isinstance(chosen, str):
        return [] if chosen in left_out else chosen
    names = [None] if isinstance(chosen, slice) else np.ravel(chosen).tolist()
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"a ColumnTransformer of the model takes columns by position ({chosen}), which is another "
                         "column once one is left out; name them, or use make_column_selector")  # fmt: skip
    return [name for name in names if name not in left_out]
