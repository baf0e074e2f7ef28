"""Permutation importance of any model: the loss of score when one column is shuffled, many shuffles a forward."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nbkit._rows import rows_at_once
from nbkit.importance._result import Importance, read_table, scoring_name
from nbkit.importance._rows import Rows, make_rows
from nbkit.importance._scoring import make_scorer


def permutation(
    model: Any,
    X: Any,
    y: Any,
    *,
    scoring: Any = None,
    n_repeats: int = 5,
    seed: int = 0,
    n_jobs: int | None = None,
    batch: int = 4096,
) -> Importance:
    """The loss of score when a column of ``X`` [N, P] is shuffled, ``n_repeats`` times each: ``values`` [P, R].

    Breiman 2001, "Random forests", section 10; Fisher, Rudin and Dominici 2019. The shuffles are those of
    ``sklearn.inspection.permutation_importance(random_state=seed)``, and so are the values.

    ``model``: a fitted scikit-learn estimator (scikit-learn does the work, columns spread over ``n_jobs``), a torch
    module, or a callable on the table. Module and callable must treat rows independently: shuffled copies are stacked
    into calls of at most ``batch`` rows, and rows that a shuffle leaves as they were are not run again. Of a
    ``Sequential`` that starts with a Linear layer on 64 features or more, that layer is updated for the one feature
    that changed instead of run (equal up to float32 rounding). ``X`` is a DataFrame, array or tensor; a module gets a
    tensor, a callable what was given.

    ``scoring``: a scikit-learn scorer name; None is the estimator's own score, or accuracy for outputs [N, C] and r2
    for [N]. A module's outputs are taken as logits, a callable's as probabilities; a single one [N] or [N, 1] is then
    that of the second of two labels where ``scoring`` compares labels. A scoring callable is ``(estimator, X, y) ->
    float`` for an estimator, ``(y, output) -> float`` for a module or callable.

    ``y`` [N] (or [N, 1]) are for a module's outputs [N, C] their indices, or C labels of text in sorted order.

    Raises: ValueError (shapes, unknown scoring, no repeats), IndexError (a label that a module has no output for),
    NotFinite (X of a module, or y), TypeError (among others, X of a type that the module does not take).

    >>> permutation(net, X_test, y_test, scoring="accuracy", n_repeats=30).mean
    """
    if n_repeats < 1 or batch < 1:
        raise ValueError(f"n_repeats and batch must be at least 1, not {n_repeats} and {batch}")
    if isinstance(scoring, (list, tuple, dict, set)):
        raise TypeError(f"scoring must be one scorer, not {type(scoring).__name__}; call once for each")
    table, target, names = read_table(X, y)
    if not isinstance(model, nn.Module) and hasattr(model, "fit"):
        from sklearn.inspection import permutation_importance

        options = {"scoring": scoring, "n_repeats": n_repeats, "random_state": seed, "n_jobs": n_jobs}
        found = permutation_importance(model, table, target, **options)
        # scikit-learn keeps only the differences; the permuted scores differ from the baseline by them
        baseline = _own_score(model, table, target, scoring)
        values, scored = found.importances, scoring_name(scoring) if scoring is not None else "score"
    else:
        labels, target = (
            (None, target) if target.dtype.kind in "biuf" else np.unique(target, return_inverse=True)
        )
        rows, logits = make_rows(model, X, table, labels), isinstance(model, nn.Module)
        sources = _shuffles(seed, len(target), n_repeats)
        batch = rows_at_once(batch, rows.features)
        values, baseline, scored = _batched(rows, target, labels, scoring, sources, batch, logits)
    return Importance(values, np.atleast_1d(baseline), names, "permutation", scored)


def _own_score(model: Any, table: Any, target: np.ndarray, scoring: Any) -> float:
    from sklearn.metrics import check_scoring

    return float(check_scoring(model, scoring=scoring)(model, table, target))


def _shuffles(seed: int, n: int, repeats: int) -> np.ndarray:
    """The row that each row's value comes from, [R, N], as scikit-learn draws it.

    It seeds every column with the same number, shuffles one index array again and again, and applies it to the column
    as the shuffle before left it.
    """
    rng = np.random.RandomState(np.random.RandomState(seed).randint(np.iinfo(np.int32).max + 1))
    order, source = np.arange(n), np.arange(n)
    sources = []
    for _ in range(repeats):
        rng.shuffle(order)
        source = source[order]
        sources.append(source)
    return np.stack(sources)


def _batched(
    rows: Rows,
    y: np.ndarray,
    labels: np.ndarray | None,
    scoring: Any,
    sources: np.ndarray,
    batch: int,
    logits: bool,
) -> tuple[np.ndarray, float, str]:
    """``(values [P, R], baseline, name of the scoring)`` in calls of at most ``batch`` rows."""
    n, repeats = len(y), len(sources)
    base = torch.cat([rows.run(rows.take(slice(i, i + batch))) for i in range(0, n, batch)])
    score, name = make_scorer(scoring, y, base, labels=labels, logits=logits)
    baseline = score(base[None])[0]
    sources = torch.as_tensor(sources, device=rows.device)
    scores = []
    for tasks in torch.arange(rows.features * repeats, device=rows.device).split(max(1, 4 * batch // n)):
        column, source = tasks // repeats, sources[tasks % repeats]
        scores.append(score(_outputs(rows, base, column, source, batch)))
    return baseline - np.concatenate(scores).reshape(rows.features, repeats), baseline, name


def _outputs(rows: Rows, base: Tensor, column: Tensor, source: Tensor, batch: int) -> Tensor:
    """Outputs [K, N, ...] with ``column`` [K] of each copy taken from the rows ``source`` [K, N]."""
    copies, n = source.shape
    changed = rows.changed(column, source)
    if (
        n <= batch and changed.sum() > 0.8 * changed.numel()
    ):  # whole copies are cheaper to build than picked rows
        pieces = zip(column.split(batch // n), source.split(batch // n), strict=True)
        return torch.cat([rows.run(rows.copies(c, s)) for c, s in pieces]).view(copies, *base.shape)
    outputs = base.repeat(copies, *[1] * base.ndim).view(copies, *base.shape)
    copy, row = changed.nonzero(as_tuple=True)
    for start in range(0, len(row), batch):
        k, i = copy[start : start + batch], row[start : start + batch]
        outputs[k, i] = rows.run(rows.shuffled(i, column[k], source[k, i]))
    return outputs
