"""Greedy forward selection: add the feature that helps held-out rows most, until none helps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from nbkit import runtime
from nbkit.errors import UnknownName, did_you_mean
from nbkit.importance._refit import check_estimator, fit_and_score, read_validation
from nbkit.importance._result import read_table, scoring_name, take_rows

if TYPE_CHECKING:
    import pandas as pd

ROUNDING = 1e-12  # the noise of a score's last digits is no improvement


@dataclass(frozen=True, eq=False, repr=False)
class Selection:
    """What forward selection chose and how.

    ``selected``: the chosen features in order of choice, then those always kept. ``path``: a row a step with ``step``,
    ``feature``, ``score``. ``scores`` [rounds, candidates]: the score of adding each candidate in each round, NaN once
    it is in; the last round is the one that brought nothing, unless ``max_features`` or the candidates ran out.
    """

    selected: list[str]
    path: pd.DataFrame
    scores: pd.DataFrame
    always: list[str]
    scoring: str

    def __repr__(self) -> str:
        steps = " -> ".join(
            f"{f} ({s:.4g})" for f, s in zip(self.path["feature"], self.path["score"], strict=True)
        )
        return f"forward selection by {self.scoring}: {steps}" + (
            f"; always {self.always}" if self.always else ""
        )

    def _repr_html_(self) -> str:
        return f"<div>{escape(repr(self))}</div>{self.path.to_html(index=False)}"


def forward_selection(
    model: Any,
    X: Any,
    y: Any,
    *,
    validation: float | tuple[Any, Any] = 0.2,
    scoring: Any = None,
    groups: Any = None,
    always: Sequence[str] = (),
    max_features: int | None = None,
    seed: int = 0,
    n_jobs: int | None = None,
) -> Selection:
    """Forward selection on one split: start empty, add the feature whose addition scores highest on the held-out rows,
    stop when the best is not strictly higher than the step before (Bloch and Friedrich 2022).

    Each candidate is a fresh clone of ``model`` fitted on the training part, through ``runtime.parallel`` (with a
    ColumnTransformer in it as for ``drop_column``). Of equal candidates the first is taken: by name for a DataFrame,
    so that the order of its columns does not matter, by position for an array. The first feature is always taken.

    ``validation``: the share of rows held out (stratified for a classifier; whole ``groups`` [N], one subject's visits
    say, where given), drawn with ``seed``; or a pair (X, y), and then all rows train. ``always``: features that are no
    candidates and are appended to the choice afterwards. ``max_features`` bounds the choice. ``scoring`` as in
    scikit-learn; None is accuracy for a classifier, r2 for a regressor.

    Raises: ValueError (share outside (0, 1), no candidate, a fold with one class, shapes, a ColumnTransformer by
    position or without any of the columns), UnknownName, NotFinite, TypeError.

    >>> forward_selection(SVC(), X_train, y_train, always=["Age"]).selected
    """
    from sklearn.base import is_classifier, is_regressor

    check_estimator(model)
    if scoring is None:
        scoring = "accuracy" if is_classifier(model) else "r2" if is_regressor(model) else None
    table, target, names = read_table(X, y)
    unknown = [name for name in always if str(name) not in names]
    if unknown:
        raise UnknownName(f"always names {unknown[0]!r}{did_you_mean(str(unknown[0]), names)}")
    always = [str(name) for name in always]
    candidates = [j for j, name in enumerate(names) if name not in always]
    if hasattr(table, "columns"):
        candidates.sort(key=lambda j: names[j])
    if not candidates:
        raise ValueError("no feature is left to choose from: all are in always")
    if max_features is not None and max_features < 1:
        raise ValueError(f"max_features must be at least 1, not {max_features}")
    fold = _split(model, table, target, names, validation, groups, seed)

    chosen: list[int] = []
    steps, rounds = [], []
    best = -np.inf
    while len(chosen) < min(max_features or len(candidates), len(candidates)):
        left = [j for j in candidates if j not in chosen]
        scores = runtime.parallel(
            lambda j, so_far=tuple(chosen): fit_and_score(model, fold, [*so_far, j], scoring),
            left,
            n_jobs=n_jobs,
        )
        rounds.append(dict(zip((names[j] for j in left), scores, strict=True)))
        top = int(np.argmax(scores))  # the first of equals
        if not scores[top] > best + ROUNDING:
            break
        best = scores[top]
        chosen.append(left[top])
        steps.append({"step": len(chosen), "feature": names[left[top]], "score": best})
    return _selection(names, chosen, steps, rounds, candidates, always, scoring)


def _selection(names, chosen, steps, rounds, candidates, always, scoring) -> Selection:
    import pandas as pd

    scores = pd.DataFrame(rounds, index=pd.RangeIndex(1, len(rounds) + 1, name="round"))
    scores = scores.reindex(columns=[names[j] for j in candidates])
    selected = [names[j] for j in chosen] + always
    return Selection(selected, pd.DataFrame(steps), scores, always, scoring_name(scoring or "score"))


def _split(model, table, target, names, validation, groups, seed) -> tuple[Any, np.ndarray, Any, np.ndarray]:
    from sklearn.base import is_classifier
    from sklearn.model_selection import GroupShuffleSplit, train_test_split

    if isinstance(validation, (tuple, list)):
        return (table, target, *read_validation(validation, names))
    if isinstance(validation, bool) or not isinstance(validation, (int, float)) or not 0 < validation < 1:
        raise ValueError(f"validation must be a share in (0, 1) or a pair (X, y), not {validation!r}")
    if groups is not None:
        groups = np.asarray(groups)
        if groups.shape != (len(target),):
            raise ValueError(
                f"groups has shape {groups.shape}; it needs one entry for each of the {len(target)} rows"
            )
        splitter = GroupShuffleSplit(n_splits=1, test_size=validation, random_state=seed)
        train, held = next(splitter.split(table, target, groups))
    else:
        stratify = target if is_classifier(model) else None
        rows = np.arange(len(target))
        train, held = train_test_split(rows, test_size=validation, random_state=seed, stratify=stratify)
    return take_rows(table, train), target[train], take_rows(table, held), target[held]
