"""``explain``: Shapley values of any model of a table, by the method that suits it, over shap."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import nn

from nbkit._rows import rows_at_once
from nbkit.errors import did_you_mean
from nbkit.shapley._explanation import Explanation, owners, warn_of_gap
from nbkit.shapley._game import Game, exact, game
from nbkit.shapley._gradients import expected_gradients
from nbkit.shapley._predict import Output
from nbkit.shapley._trees import Plan, plan, tree_shap

METHODS = ("auto", "tree", "permutation", "kernel", "exact", "gradient")
AUTO_EXACT = 8  # 256 coalitions, about what ten antithetic permutations of 8 features need


def explain(
    model: Any,
    X: Any,
    background: Any = None,
    *,
    target: Output = None,
    method: str = "auto",
    seed: int = 0,
    n_samples: int | None = None,
    tolerance: float = 1e-3,
    batch: int = 16384,
    output: Output = None,
) -> Explanation:
    """Interventional Shapley values of each row of ``X`` [N, P] against the rows of ``background`` [B, P].

    phi_j = sum over S of |S|! (P - |S| - 1)! / P! * (v(S + j) - v(S)) with v(S) = mean over background rows b of
    f(x_S, b_rest): Shapley 1953; Lundberg and Lee 2017, equation 4, with features outside S drawn from the background.

    ``model``: a scikit-learn estimator or Pipeline, a torch module, or a callable on the table. X and background are
    DataFrames, arrays or tensors; the model sees what it would be given (a DataFrame with its dtypes, a tensor on its
    device). The background should be training rows and is used whole; None takes up to 100 rows of X.

    ``target``: what is explained. A classifier's P(second class) by default where it has two, else a class label; a
    regressor's prediction; for a torch module or callable the output as returned, and an index where there are
    several (a module that returns logits is explained in logits). A callable turns the model's output
    (``predict_proba`` for a classifier) into one score a row.

    ``method``:

    - ``exact``: all 2^P coalitions, P <= 12.
    - ``tree``: interventional Tree SHAP, also behind imputers and scalers, in the output's own units. Exact for single
      trees, forests and boosted regressors; for boosted classifiers shap rescales the values of the log-odds so that
      they add up to the probability, which only approximates its Shapley values.
    - ``permutation``: ``n_samples`` antithetic orders a row (default 10); unbiased, always adds up.
    - ``kernel``: shap's weighted regression on ``n_samples`` coalitions a row (default 2 P + 2048); always adds up.
    - ``gradient``: expected gradients of a torch module, ``n_samples`` a row (default 1000). They estimate
      Aumann-Shapley values, which differ from Shapley values where features interact, and add up only in the limit.
    - ``auto``: tree where it is exact, else exact up to 8 features, else gradient for a torch module with float
      inputs, else permutation.

    ``batch`` bounds the rows of one model call (fewer in wide tables). The gap between prediction and base value + sum
    of values is part of the result; an ``AdditivityWarning`` says so where it exceeds ``tolerance``, as a share of the
    largest |prediction - base value|. ``output`` is the old name of ``target``.

    Returns an ``Explanation``; ``values`` is [N, P]. Raises: ValueError (other columns in the background, too many
    features, a method that cannot explain this model, an unknown class), IndexError (target out of range), NotFinite
    (missing values the model does not take), TypeError.

    >>> explain(forest, X_test, X_train, target="AD").mean_abs()
    """
    if output is not None:
        warnings.warn("explain(output=) is now explain(target=)", FutureWarning, stacklevel=2)
        target = output if target is None else target
    if method not in METHODS:
        raise ValueError(f"method {method!r} is unknown{did_you_mean(str(method), METHODS)}")
    if n_samples is not None and n_samples < 1:
        raise ValueError(f"n_samples must be at least 1, not {n_samples}")
    played = game(model, X, background, target=target, seed=seed, batch=batch)
    features = played.table.x.shape[1]
    how = plan(played) if method in ("auto", "tree") else None
    if method == "auto":
        method = _choose(played, how)
    if method == "tree":
        if isinstance(how, str):
            raise ValueError(
                f"method='tree' cannot explain this model: {how}; use 'exact', 'permutation' or 'auto'"
            )
        return warn_of_gap(
            _finish(played, tree_shap(how), played.table.names, played.table.frame, method, how.predicted), tolerance
        )
    if method == "exact":
        values = exact(played, np.arange(features))
    elif method == "gradient":
        values = expected_gradients(played, draws=n_samples or 1000, seed=seed)
    elif method == "permutation":
        values = _permutation(played, n_samples or 10, seed)
    else:
        values = _kernel(played, n_samples, seed)
    return warn_of_gap(_finish(played, values, played.table.names, played.table.frame, method), tolerance)


def group_shapley(
    model: Any,
    X: Any,
    background: Any,
    groups: Mapping[str, Sequence[str | int]],
    *,
    target: Output = None,
    seed: int = 0,
    tolerance: float = 1e-3,
    batch: int = 16384,
) -> Explanation:
    """Exact Shapley values with groups of features as the players: a group comes from x or from b as one.

    ``groups`` maps a name to its features, as for ``group``; a feature in none is a player of its own. At most 12
    players. The value of a group is the sum of its members' values where members interact with no other feature, not
    otherwise (Owen 1977; ``group`` gives that sum). Other arguments, result and errors as for ``explain``; ``values``
    is [N, players].

    >>> group_shapley(forest, X_test, X_train, aspects(X_train, 0.5), target="AD")
    """
    played = game(model, X, background, target=target, seed=seed, batch=batch)
    names, owner = owners(groups, played.table.names)
    data = played.table.frame if len(names) == len(owner) else None
    if data is not None:
        data = data.iloc[:, np.argsort(owner)].set_axis(names, axis=1)
    return warn_of_gap(_finish(played, exact(played, owner), names, data, "exact"), tolerance)


def _choose(played: Game, how: Plan | str) -> str:
    if isinstance(how, Plan) and how.exact:
        return "tree"
    if played.table.x.shape[1] <= AUTO_EXACT:
        return "exact"
    differentiable = (
        isinstance(played.model, nn.Module) and played.table.decode(played.table.x[:1]).is_floating_point()
    )
    return "gradient" if differentiable else "permutation"


def _finish(
    played: Game, values: np.ndarray, names: list[str], data: Any, method: str,
    predicted: tuple[np.ndarray, np.ndarray] | None = None,
) -> Explanation:  # fmt: skip
    if predicted is None:
        predicted = played.predict(played.table.x.copy()), played.predict(played.table.background.copy())
    return Explanation(
        values=values,
        base_value=float(predicted[1].mean()),
        prediction=predicted[0],
        data=data,
        feature_names=names,
        method=method,
        output=played.output_name,
        background=len(played.table.background),
    )


def _permutation(played: Game, permutations: int, seed: int) -> np.ndarray:
    """Antithetic permutation sampling [N, P]: features join in a random order, then leave in the same order.

    Mitchell et al. 2022, "Sampling permutations for Shapley value estimation" (antithetic sampling). Orders and values
    are those of ``shap.PermutationExplainer(seed=seed)``, which would first compile for ten seconds, and would take
    numbers within 1e-5 of each other (timestamps, say) for equal.
    """
    n, p = played.table.x.shape
    rng = np.random.RandomState(seed)
    joining = np.tri(p + 1, p, -1, dtype=bool)  # row k: the first k in the order are in
    steps = np.concatenate([joining, ~joining[1:]])  # ... and then the first k are out again
    sign = np.array([[1.0], [-1.0]])
    result = np.zeros((n, p))
    together = rows_at_once(permutations, steps.size)  # orders whose masks are held at a time
    for i in range(n):
        order, orders = np.arange(p), []
        for _ in range(permutations):
            rng.shuffle(order)
            orders.append(order.copy())
        for start in range(0, permutations, together):
            some = orders[start : start + together]
            masks = np.concatenate([steps[:, np.argsort(o)] for o in some])
            v = played.values(np.array([i]), masks).reshape(len(some), 2 * p + 1)
            for o, change in zip(some, np.diff(v), strict=True):
                result[i, o] += (sign * change.reshape(2, p)).sum(0)
    return result / (2 * permutations)


def _kernel(played: Game, coalitions: int | None, seed: int) -> np.ndarray:
    """Kernel SHAP [N, P] through shap, which is given the coalitions as its table: a row of ones, a row of zeros.

    Given the features it would take numbers within 1e-5 of each other for equal and know no text.
    """
    import shap

    features = played.table.x.shape[1]
    result = np.empty(played.table.x.shape)
    row = 0
    with numpy_seeded(seed):
        explainer = shap.KernelExplainer(
            lambda masks: played.values(np.array([row]), np.asarray(masks) > 0.5)[0], np.zeros((1, features))
        )
        for row in range(len(result)):
            # shap's default l1_reg keeps ten features of a row and sets the others to zero
            result[row] = explainer.shap_values(
                np.ones(features), nsamples=coalitions or "auto", l1_reg=False, silent=True
            )
    return result


@contextmanager
def numpy_seeded(seed: int) -> Iterator[None]:
    """shap draws from numpy's global generator; it gets back the state it had."""
    state = np.random.get_state()
    try:
        np.random.seed(seed)
        yield
    finally:
        np.random.set_state(state)
