"""Boosters of other libraries: under every objective the values agree with brute force, by whatever method is taken."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest

from nbkit import shapley

lgb, xgb = pytest.importorskip("lightgbm"), pytest.importorskip("xgboost")

LGBM = [
    "regression", "regression_l1", "huber", "fair", "poisson", "quantile", "mape", "gamma", "tweedie",
    "cross_entropy", "cross_entropy_lambda",
]  # fmt: skip
XGB = [
    "reg:squarederror", "reg:squaredlogerror", "reg:logistic", "reg:pseudohubererror", "reg:absoluteerror",
    "reg:quantileerror", "reg:gamma", "reg:tweedie", "count:poisson", "survival:cox",
]  # fmt: skip
rng = np.random.default_rng(0)
X = rng.normal(size=(120, 4))
SHARE = 1 / (1 + np.exp(-X[:, 0] - X[:, 1] * X[:, 2]))  # in (0, 1): every objective takes it
ROWS, BACKGROUND = X[:4], X[40:60]


def lgbm(kind=lgb.LGBMRegressor, **options):
    return kind(n_estimators=12, min_child_samples=4, verbose=-1, n_jobs=1, **options)


def xgboost(kind=xgb.XGBRegressor, **options):
    return kind(n_estimators=12, max_depth=3, n_jobs=1, **options)


def agrees_with_brute_force(model, rows=ROWS, background=BACKGROUND, target=None):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # lightgbm: a table without names
        found = shapley.explain(model, rows, background, target=target)
        brute = shapley.explain(model, rows, background, target=target, method="exact")
    scale = np.abs(brute.values).max()
    np.testing.assert_allclose(found.values, brute.values, atol=1e-4 * scale)
    assert np.abs(found.additivity_gap).max() <= 1e-4 * scale
    return found.method


@pytest.mark.parametrize("objective", LGBM)
def test_lightgbm_regressors(objective):
    method = agrees_with_brute_force(lgbm(objective=objective).fit(X, SHARE))
    linked = objective in ("poisson", "gamma", "tweedie", "cross_entropy", "cross_entropy_lambda")
    assert method == ("exact" if linked else "tree")


@pytest.mark.parametrize("objective", XGB)
def test_xgboost_regressors(objective):
    options = {"quantile_alpha": 0.4} if objective == "reg:quantileerror" else {}
    method = agrees_with_brute_force(xgboost(objective=objective, **options).fit(X, SHARE))
    linked = {"reg:logistic", "reg:gamma", "reg:tweedie", "count:poisson", "survival:cox"}
    assert method == ("exact" if objective in linked else "tree")


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("make", [
    lambda: lgbm(lgb.LGBMClassifier), lambda: xgboost(xgb.XGBClassifier),
    lambda: lgbm(lgb.LGBMClassifier, boosting_type="rf", bagging_freq=1, bagging_fraction=0.6),
    lambda: xgboost(xgb.XGBClassifier, booster="dart", rate_drop=0.3),
])  # fmt: skip
def test_classifiers(make, classes):
    y = pd.qcut(SHARE, classes, labels=False)
    for target in range(classes):
        assert agrees_with_brute_force(make().fit(X, y), target=target) == "exact"


def test_rankers_and_several_targets():
    relevance = pd.qcut(SHARE, 4, labels=False)
    agrees_with_brute_force(lgbm(lgb.LGBMRanker).fit(X, relevance, group=[40, 40, 40]))
    agrees_with_brute_force(xgboost(xgb.XGBRanker).fit(X, relevance, group=[40, 40, 40]))
    both = xgboost().fit(X, np.c_[X[:, 0], 3 * X[:, 1]])
    for target in (0, 1):
        agrees_with_brute_force(both, target=target)
    with pytest.raises(ValueError, match="predicts 2 numbers"):
        shapley.explain(both, ROWS, BACKGROUND)


@pytest.mark.parametrize("codes", [["p", "q", "s"], [10, 20, 35]], ids=["text", "integers"])
@pytest.mark.parametrize("make", [
    lambda: lgbm(), lambda: lgbm(lgb.LGBMClassifier), lambda: xgboost(enable_categorical=True),
    lambda: xgboost(xgb.XGBClassifier, enable_categorical=True),
])  # fmt: skip
def test_categories(make, codes):
    table = pd.DataFrame(X, columns=list("abcd"))
    table["kind"] = pd.Categorical(rng.choice(codes, len(X)))
    y = table.a + 2 * (table.kind == codes[0])
    model = make()
    model.fit(table, (y > 0.5).astype(int) if hasattr(model, "predict_proba") else y)
    agrees_with_brute_force(model, table[:4], table[40:60])


def test_missing_values():
    holed = np.where(rng.random(X.shape) < 0.1, np.nan, X)
    for model in (lgbm(), xgboost()):
        assert agrees_with_brute_force(model.fit(holed, SHARE), holed[:4], holed[40:60]) == "tree"
